# SPDX-License-Identifier: Apache-2.0
"""The fidelity gate's reading of a layer by the CUDA kernels, emulated: what the CPU's say."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest
import torch

from tests import emulated as emu
from tests.ops.test_cuda_emulated import codec_of
from vllm_fibquant import ops
from vllm_fibquant.observe.loss import LayerReading
from vllm_fibquant.ops import Attend
from vllm_fibquant.ops.cuda import Cuda

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator needs g++")


@pytest.mark.parametrize("head_dim", [64, 80])
@pytest.mark.parametrize(
    "options", [("codes", 0, 0, {}), ("raw", 24, 4, {}), ("codes", 0, 0, {"keep_first": 4})],
    ids=["exact", "quality", "retain"],
)  # fmt: skip
def test_a_layers_loss(options, head_dim: int, monkeypatch) -> None:
    prefill, recent, first, attend = options
    layer = SimpleNamespace(
        codec=codec_of("fibquant_2bit", head_dim), key_map=None, num_heads=4, num_kv_heads=2,
        attend=Attend(head_dim**-0.5, window=30 if attend else 0, **attend),
        options=SimpleNamespace(prefill=prefill, recent_window=recent, num_copied_first=first),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    query, key, value = (
        torch.randn(70, heads, head_dim, generator=generator).half() for heads in (4, 2, 2)
    )
    served, found = Cuda(emu.emulated(), raw_states=emu.raw_states), []
    for kernels in (ops.CPU, served):
        monkeypatch.setattr(ops, "choose", lambda codec, cache, kernels=kernels: kernels)
        reading = LayerReading(layer, 30)
        outputs = [reading(query, key, value, torch.empty_like(query))]
        reading.reads_codes = True
        outputs.append(reading(query, key, value, torch.empty_like(query)))
        found.append((reading.cosines, outputs))
    (expected, outputs), (got, served_outputs) = found
    count, cosines = got
    assert count == expected[0] and 0.5 < cosines / count < 0.999
    assert got == pytest.approx(expected, rel=2e-3)
    for a, b in zip(outputs, served_outputs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=4e-3)
