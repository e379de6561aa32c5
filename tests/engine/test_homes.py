# SPDX-License-Identifier: Apache-2.0
"""The default, measured keys included, for a user without a name, without a home, with one that
cannot be written: as in containers."""

from __future__ import annotations

import os
import shutil

import pytest

from tests.test_files import as_nobody

from .models import make_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.geteuid() != 0 or shutil.which("setpriv") is None,
        reason="becomes another user, which root can, with setpriv",
    ),
]

SERVE = """
import logging, sys
from vllm_fibquant.engine import layers, measure
from tests.engine.harness import DEFAULTS, engine, generate, random_text
measure.text_sequences = random_text
with engine({model!r}, "fibquant", fibquant=DEFAULTS) as llm:
    impls = layers.our_layers(llm.llm_engine.vllm_config).values()
    assert all(impl.key_map.transform is not None for impl in impls)
    print("ANSWER", generate(llm, [[5, 6, 7]], 4)[0].tokens)
"""


@pytest.mark.parametrize(
    "environ",
    [{}, {"HOME": "/none"}, {"HOME": "/proc"}],
    ids=["no home", "missing home", "read-only home"],
)
def test_served_with_measured_keys_and_told_that_nothing_is_kept(model_folder, environ):
    result = as_nobody(SERVE.format(model=make_model("llama", model_folder)), **environ)
    assert result.returncode == 0, result.stderr[-20000:]
    assert "ANSWER (" in result.stdout
    assert "FibQuant keeps nothing for the next start" in result.stdout + result.stderr
