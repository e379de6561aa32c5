# SPDX-License-Identifier: Apache-2.0
"""Head dims that a warp does not divide, CUDA kernels against the oracle.

Lanes hold no equal numbers of coordinates there, and records and their fields begin at any even
address.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.keys.test_key_map import make_turns
from tests.ops.test_cuda_emulated import OPTIONS, PRESET_NAMES, check, codec_of, encode_both
from tests.ops.test_cuda_emulated import paged_of as plain_of
from tests.ops.test_cuda_mapped import map_of, mapped_of
from tests.paged import check_records
from vllm_fibquant.keys.key_map import TurningMean
from vllm_fibquant.ops import cuda_tables

HEAD_DIMS = [80, 112]


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("name", PRESET_NAMES)
def test_every_preset(library, name: str, head_dim: int, wide: bool) -> None:
    codec = codec_of(name, head_dim)
    for num_splits in (1, 3):
        paged = plain_of(codec, [70, 1, 33], [1, 1, 9], group_size=3)
        check(library, paged, wide=wide, num_splits=num_splits)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("name", PRESET_NAMES)
def test_every_presets_records(library, name: str, head_dim: int) -> None:
    codec = codec_of(name, head_dim)
    key, value = torch.randn(2, 21, 2, head_dim, generator=torch.Generator().manual_seed(2)) * 3
    key[3, 1, 7], value[4, 0, 8], key[5] = float("nan"), -float("inf"), 0.0
    slots = torch.randperm(64, generator=torch.Generator().manual_seed(3))[:20]
    slots[9] = -1
    got, expected, counters = encode_both(library, codec, key, value, slots)
    assert counters == [2, 0]
    check_records(codec, got, expected)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(library, options: dict, wide: bool) -> None:
    paged = plain_of(codec_of("fibquant_3bit", 80), [50, 101, 5], [9, 2, 5], group_size=3)
    check(library, paged, num_splits=3, wide=wide, **paged.given(options))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize(
    ("name", "kind"), [("fibquant_k4v2", "all"), ("fibquant_3bit", "first"),
                       ("fibquant_k5v4", "turning"), ("fibquant_1bit", "means")],
)  # fmt: skip
def test_mapped_keys(library, name: str, kind: str, head_dim: int) -> None:
    for wide in (False, True):
        paged = mapped_of(name, head_dim, [40, 23], [1, 3], kind=kind, num_kv_heads=1, group_size=3)
        check(library, paged, wide=wide)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_as_many_pairs_turn_as_may(library, head_dim: int) -> None:
    """A quarter of the coordinates, rounded up to whole products."""
    codec = codec_of("fibquant_2bit", head_dim)
    c = torch.randn(2, head_dim, generator=torch.Generator().manual_seed(8))
    turning = TurningMean.strongest(c, make_turns(head_dim), head_dim // 8)
    assert turning.chosen.shape[1] > 8 * (head_dim // 32)  # more than whole products of it
    key_map = dataclasses.replace(map_of(codec), turning=turning)
    paged = plain_of(codec, [40, 23], [1, 3], group_size=3, key_map=key_map)
    for wide in (False, True):
        check(library, paged, wide=wide)
    assert cuda_tables.unsupported_key_map(key_map) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_model_dtypes(library, dtype: torch.dtype) -> None:
    paged = plain_of(codec_of("fibquant_k5v4", 80), [90, 40], [1, 3], group_size=8, dtype=dtype)
    check(library, paged)
