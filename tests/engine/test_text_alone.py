# SPDX-License-Identifier: Apache-2.0
"""Texts of models whose classes vLLM imports with an image processor.

In processes of their own: the processors' imports are stand-ins (`stand_in/torchvision`), which
must not be seen by other tests.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
BOUNDS = {"gemma3-images": 1e-4}
"""As in test_models.py, in float32."""


@pytest.mark.slow
@pytest.mark.parametrize("shape", BOUNDS)
def test_texts_are_stock_attention(tmp_path, shape):
    command = [sys.executable, "-m", "tests.engine.text_alone", shape, str(tmp_path)]
    environment = dict(os.environ, PYTHONPATH=str(HERE / "stand_in"))
    run = subprocess.run(
        command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True, timeout=1200
    )
    assert run.returncode == 0, run.stderr[-3000:]
    (line,) = [line for line in run.stdout.splitlines() if line.startswith("DIFFERENCE ")]
    _, other_tokens, largest = line.split()
    assert (int(other_tokens), float(largest) < BOUNDS[shape]) == (0, True), line
