# SPDX-License-Identifier: Apache-2.0
"""First tokens kept beside a window (`retain`), CUDA kernels against the oracle."""

from __future__ import annotations

import pytest
import torch

from tests import emulated as emu
from tests.ops.test_cuda_emulated import PRESET_NAMES, check, codec_of, paged_of
from tests.ops.test_retention import other_query
from vllm_fibquant import ops
from vllm_fibquant.ops import cuda, selfcheck


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("name", PRESET_NAMES)
def test_every_preset(library, name: str, wide: bool) -> None:
    paged = paged_of(codec_of(name, 64), [70, 1, 33], [1, 1, 9], group_size=3)
    check(library, paged, wide=wide, keep_first=4, window=20, first_query=other_query(paged))


@pytest.mark.parametrize("head_dim", [80, 96, 112, 128, 192, 256])
def test_every_head_dim(library, head_dim: int) -> None:
    codec = codec_of("fibquant_k5v3", head_dim)
    paged = paged_of(codec, [60, 23], [1, 5], num_kv_heads=1, group_size=5)
    for wide in (False, True):
        check(library, paged, wide=wide, keep_first=4, window=20, first_query=other_query(paged))


@pytest.mark.parametrize("keep_first", [1, 4, 16, 40, 700])
@pytest.mark.parametrize("window", [0, 1, 20, 100])
@pytest.mark.parametrize("num_splits", [1, 3])
def test_lengths(library, keep_first: int, window: int, num_splits: int) -> None:
    """Around keep_first, the window, a tile and a block; prompts and decodes."""
    kept = min(keep_first, 60)
    lens = [1, 4, kept, kept + 1, kept + max(window, 1) + 1, 130]
    for query_lens in ([1] * 6, [1, 3, kept, min(kept + 1, 9), 2, 30]):
        paged = paged_of(codec_of("fibquant_2bit", 64), lens, query_lens, num_kv_heads=1)
        options = {"keep_first": keep_first, "window": window, "num_splits": num_splits}
        check(library, paged, **options)
        check(library, paged, **options, first_query=other_query(paged))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_model_dtypes_and_every_other_option(library, dtype: torch.dtype) -> None:
    paged = paged_of(codec_of("fibquant_4bit", 128), [100, 77], [1, 5], group_size=4, dtype=dtype)
    options = {"keep_first": 4, "window": 33, "soft_cap": 3.0, "sinks": torch.linspace(-2, 2, 8)}
    check(library, paged, **options, first_query=other_query(paged))


def test_padded_requests_are_not_written(library) -> None:
    paged = paged_of(codec_of("fibquant_2bit", 64), [40, 30], [1, 1])
    options = {"keep_first": 4, "window": 10}
    expected = emu.attend(library, paged, **options)
    paged.query_start_loc = torch.tensor([0, 1, 2, 2], dtype=torch.int32)
    paged.query = paged.query[[0, 1, 1]]
    paged.seq_lens = torch.tensor([40, 30, 0], dtype=torch.int32)
    paged.block_table = torch.cat((paged.block_table, paged.block_table[:1]))
    got = emu.attend(library, paged, **options)
    assert torch.equal(got[:2], expected) and got[2].isnan().all()


def test_a_block_outside_the_cache_is_not_followed(library) -> None:
    paged = paged_of(codec_of("fibquant_2bit", 64), [80, 90], [1, 1])
    options = {"keep_first": 4, "window": 20}
    before = emu.attend(library, paged, **options)
    paged.block_table[0, 0] = 2**30
    after = emu.attend(library, paged, **options)
    assert after[0].isnan().all() and torch.equal(after[1], before[1])


def test_blocks_between_are_not_read(library) -> None:
    """The engine gives them back: vLLM's null block stands in their place."""
    paged = paged_of(codec_of("fibquant_2bit", 64), [150], [2])
    options = {"keep_first": 4, "window": 20}
    before = emu.attend(library, paged, **options)
    paged.block_table[0, 1:8] = -1
    assert torch.equal(emu.attend(library, paged, **options), before)


def test_what_cannot_be_combined_is_refused(library) -> None:
    """By the checks, and by the library for who passes them by."""
    paged = paged_of(codec_of("fibquant_2bit", 64), [40], [2])
    with pytest.raises(RuntimeError, match="without a map of keys, copies and raw new tokens"):
        emu.attend(library, paged, keep_first=4, raw_states=emu.raw_states, **paged.raw)


def test_the_self_check_runs_them(library, monkeypatch) -> None:
    """And sees queries that are not those of the first tokens."""
    kernels = cuda.Cuda(library)
    monkeypatch.setattr(ops, "choose", lambda codec, cache: kernels)
    args = codec_of("fibquant_3bit", 64), torch.float16, 8, 2, 16
    selfcheck.run_self_check(*args, keeps_first=True, all_cases=True)

    class Forgets(cuda.Cuda):
        def paged_attention(self, query, out, pages, batch, attend, fresh=None):
            super().paged_attention(query, out, pages, batch, attend, None)

    monkeypatch.setattr(ops, "choose", lambda codec, cache: Forgets(library))
    selfcheck.run_self_check(*args, all_cases=True)
    with pytest.raises(RuntimeError, match="keep_first=4"):
        selfcheck.run_self_check(*args, keeps_first=True, all_cases=True)
