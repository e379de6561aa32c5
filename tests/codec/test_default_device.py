# SPDX-License-Identifier: Apache-2.0
"""Codecs are the same whatever torch's default device and dtype are.

vLLM builds a model's layers, and so the first codec of a spawned worker, with the GPU as torch's
default device and the model's dtype as its default dtype. The device "meta" stands for the GPU.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from vllm_fibquant import ops
from vllm_fibquant.codec import codec, rotation, search
from vllm_fibquant.codec.codec import KVCodec
from vllm_fibquant.codec.config import HEAD_DIMS, PRESETS, Preset
from vllm_fibquant.ops import cuda_tables

CACHES = (
    rotation.make_rotation, codec._kv_codec, search.codeword_lists,
)  # fmt: skip


@pytest.fixture
def as_vllm_builds_layers() -> Iterator[None]:
    """Nothing is cached, the default device is not the CPU, the default dtype is bfloat16."""
    for cached in CACHES:
        cached.cache_clear()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(before)
        for cached in CACHES:
            cached.cache_clear()


def tensors_of(made: KVCodec) -> dict[str, torch.Tensor]:
    found = {}
    for side, code in (("key", made.key), ("value", made.value)):
        found |= {
            f"{side} signs": code.rotation.signs,
            f"{side} matrix": code.rotation.matrix,
            f"{side} rows": code.codebook.rows,
            f"{side} codewords": code.codewords,
        }
        if code.lists is not None:
            found |= {f"{side} cells": code.lists.cells, f"{side} members": code.lists.members}
    return found


def presets() -> list[Preset]:
    listed = PRESETS["fibquant_4bit"].with_overrides(
        {"key": {"num_lists": 4}, "value": {"num_lists": 4}}
    )
    return [*PRESETS.values(), listed]


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_codec_is_built_on_the_cpu_in_float32(head_dim: int, request) -> None:
    expected = [tensors_of(KVCodec.from_preset(preset, head_dim)) for preset in presets()]
    request.getfixturevalue("as_vllm_builds_layers")
    for preset, tensors in zip(presets(), expected, strict=True):
        made = KVCodec.from_preset(preset, head_dim)
        for name, tensor in tensors_of(made).items():
            assert tensor.device.type == "cpu", f"{preset.name}: {name}"
            assert tensor.dtype == tensors[name].dtype, f"{preset.name}: {name}"
            assert torch.equal(tensor, tensors[name]), f"{preset.name}: {name}"


def test_layers_are_accepted_and_tables_made(as_vllm_builds_layers) -> None:
    """What a layer's constructor and the first launch ask for, in a worker that was spawned."""
    for name, preset in PRESETS.items():
        for device in ("cpu", "cuda"):
            assert ops.unsupported_codec(KVCodec.from_preset(preset, 128), device) is None, name
        made = KVCodec.from_preset(preset, 128)
        struct = cuda_tables.codec_struct(made, torch.device("cpu"))
        assert struct.key.table and struct.value.half_sq
    x = torch.ones(3, 128, dtype=torch.float32, device="cpu")
    assert made.encode_records(x, x).device.type == "cpu"
