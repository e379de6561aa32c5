# SPDX-License-Identifier: Apache-2.0
"""One table says what each implementation of the operations can do; all else follows from it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.keys.test_key_map import make_map
from tests.paged import make_paged, use_reference
from vllm_fibquant import ops
from vllm_fibquant.codec.codec import KVCodec
from vllm_fibquant.codec.config import PRESETS
from vllm_fibquant.ops import Attend, Batch, Copies, Fresh, Pages, checks, cuda, gpu
from vllm_fibquant.ops.features import FEATURES, IMPLEMENTATIONS

KERNELS = {k.implementation: k for k in (ops.REFERENCE, ops.CPU, cuda.Cuda(None), gpu.TRITON)}
OF_A_RUN = {"layers", "monitor"}
"""Asked of a run's configuration (tests/engine/test_plugin.py), not of a call."""


def ask(feature: str, kernels: ops.Kernels) -> None:
    """Checks a call that needs one feature, without making it."""
    codec = KVCodec.from_preset(PRESETS["fibquant_2bit"], 64)
    with use_reference():
        paged = make_paged(codec, [20, 5], [1, 1])
    if feature == "lists":
        side = SimpleNamespace(num_lists=2)
        codec = SimpleNamespace(layout=codec.layout, head_dim=64, key=side, value=side)
    maps = {"means": make_map(64), "transform": make_map(64, index_bytes=16)}
    pages = Pages(paged.cache, codec, maps.get(feature), kernels)
    options = {
        "window": {"window": 5},
        "chunk": {"chunk": 5},
        "soft_cap": {"soft_cap": 2.0},
        "sinks": {"sinks": torch.zeros(4)},
        "keep_first": {"keep_first": 2},
        "copies": {"copies": Copies(paged.key.half(), paged.value.half(), 1)},
    }
    attend = Attend(1.0, **options.get(feature, {}))
    fresh = Fresh(paged.new_key, paged.new_value) if feature == "raw" else None
    batch = Batch(paged.query_start_loc, paged.seq_lens, paged.block_table)
    checks.check_pair(pages, attend)
    checks.check_attention(paged.query, paged.query, pages, batch, attend, fresh)


def features_markdown() -> str:
    """The table of docs/kernels.md."""
    lines = [
        f"| feature | asked for by | {' | '.join(IMPLEMENTATIONS)} |",
        f"| --- | --- |{' :-: |' * len(IMPLEMENTATIONS)}",
    ]
    for row in FEATURES.values():
        marks = ("yes" if name in row.had_by else "" for name in IMPLEMENTATIONS)
        lines.append(f"| {row.what} | {row.asked_by} | {' | '.join(marks)} |")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("feature", [name for name in FEATURES if name not in OF_A_RUN])
def test_what_is_not_had_is_refused(feature: str, implementation: str) -> None:
    kernels = KERNELS[implementation]
    if implementation in FEATURES[feature].had_by:
        ask(feature, kernels)
        return
    with pytest.raises(ValueError, match=f"must be left out with the {implementation} kernels"):
        ask(feature, kernels)


def test_the_documents_table_is_the_codes() -> None:
    document = Path(__file__).parents[2] / "docs" / "kernels.md"
    assert features_markdown() in document.read_text(), features_markdown()


def test_kernels_pass_through_one_door() -> None:
    """All implementations have the operations' own parameters, eight at most."""
    import inspect

    for operation in ("encode_kv", "paged_attention"):
        names = list(inspect.signature(getattr(ops, operation)).parameters)
        assert len(names) <= 8
        for kernels in KERNELS.values():
            found = list(inspect.signature(getattr(kernels, operation)).parameters)
            assert found[: len(names)] == names, kernels.implementation
            assert len(found) <= 8
