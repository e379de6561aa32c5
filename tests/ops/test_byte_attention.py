# SPDX-License-Identifier: Apache-2.0
"""Attention with dot products of bytes, for models in 16 bits, against the oracle."""

from __future__ import annotations

import pytest
import torch

from tests.keys.test_key_map import KINDS, mapped
from tests.ops.test_attention import HEAD_DIMS, PRESET_NAMES, check_against_oracle, codec_of
from tests.paged import make_paged

DTYPES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("name", PRESET_NAMES)
def test_every_preset_and_head_dim(name: str, head_dim: int, dtype: torch.dtype) -> None:
    settings = {"group_size": 3, "dtype": dtype}
    paged = make_paged(codec_of(name, head_dim), [70, 1, 33, 1100], [1, 1, 4, 2], **settings)
    check_against_oracle(paged)


@pytest.mark.parametrize("group_size", [1, 2, 3, 4, 5, 6, 7, 8, 16, 50])
@pytest.mark.parametrize("name", ["fibquant_4bit", "fibquant_3bit", "fibquant_2bit"])
def test_every_group_size(name: str, group_size: int) -> None:
    settings = {"group_size": group_size, "dtype": torch.float16}
    check_against_oracle(make_paged(codec_of(name, 64), [600, 40], [1, 3], **settings))


@pytest.mark.parametrize("head_dim", [64, 80, 256])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "preset", ["fibquant_4bit", "fibquant_3bit", "fibquant_2bit", "fibquant_1bit"]
)
def test_mapped_keys(preset: str, kind: str, head_dim: int) -> None:
    settings = {"head_dim": head_dim, "preset": preset, "dtype": torch.float16, **KINDS[kind]}
    check_against_oracle(mapped([70, 1, 33, 600], [1, 1, 4, 5], group_size=3, **settings))
