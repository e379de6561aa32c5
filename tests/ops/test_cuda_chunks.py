# SPDX-License-Identifier: Apache-2.0
"""Attention within chunks (Llama 4), CUDA kernels against the oracle, beside the options that have
chunks in the tests of the emulator, of copies and of maps of keys."""

from __future__ import annotations

import pytest
import torch

from tests import emulated as emu
from tests.ops import test_cuda_copies as copied
from tests.ops.test_copies import make_copies
from tests.ops.test_cuda_emulated import check, codec_of, paged_of
from tests.ops.test_cuda_mapped import mapped_of


@pytest.mark.parametrize("chunk", [1, 16, 33, 64, 100, 600])
@pytest.mark.parametrize("num_splits", [1, 5])
def test_lengths(library, chunk: int, num_splits: int) -> None:
    """Chunks of one token, of whole blocks and of others, and longer than all; prompts, decodes
    and what lies between, whose queries begin on both sides of where a chunk does."""
    lens = [1, chunk, chunk + 1, 2 * chunk + 3, 130, 70, 99]
    queries = [1, 1, 2, 5, 130, 9, 35]
    lens = [min(n, 200) for n in lens]
    queries = [min(n, q) for n, q in zip(lens, queries, strict=True)]
    paged = paged_of(codec_of("fibquant_2bit", 64), lens, queries, num_kv_heads=1)
    for wide in (False, True):
        check(library, paged, chunk=chunk, num_splits=num_splits, wide=wide)
        options = {"raw_states": emu.raw_states, "num_splits": num_splits, "wide": wide}
        got = emu.attend(library, paged, chunk=chunk, **options, **paged.raw)
        exact = paged.oracle(chunk=chunk, **paged.raw)
        assert (got.double() - exact).abs().max() < 3e-3


@pytest.mark.parametrize("head_dim", [80, 96, 112, 128, 192, 256])
def test_every_head_dim(library, head_dim: int) -> None:
    paged = paged_of(codec_of("fibquant_k5v3", head_dim), [60, 23], [3, 9], num_kv_heads=1)
    for wide in (False, True):
        check(library, paged, chunk=19, wide=wide)


@pytest.mark.parametrize("wide", [False, True])
def test_blocks_before_the_chunk_are_not_read(library, wide: bool) -> None:
    """vLLM frees them, as those before a window."""
    paged = paged_of(codec_of("fibquant_2bit", 64), [100, 70], [4, 2], group_size=3)
    before = emu.attend(library, paged, chunk=32, wide=wide)
    paged.block_table[0, :6] = 2**30  # positions 0 to 95
    paged.block_table[1, :4] = 2**30
    assert torch.equal(emu.attend(library, paged, chunk=32, wide=wide), before)
    paged.block_table[0, 6] = 2**30
    assert emu.attend(library, paged, chunk=32, wide=wide)[:4].isnan().all()


@pytest.mark.parametrize("kind", ["plain", "all"])
@pytest.mark.parametrize("chunk", [1, 8, 50])
def test_first_tokens_and_copies(library, kind: str, chunk: int) -> None:
    """First tokens, which a map codes in another way, and copies: some in a query's chunk, some
    before it, where all of a step's new tokens may be in later chunks."""
    args = "fibquant_3bit", 64, [90, 3, 33, 12, 101], [1, 2, 5, 9, 60]
    if kind == "plain":
        paged = paged_of(codec_of(*args[:2]), *args[2:], group_size=3)
    else:
        paged = mapped_of(*args, kind=kind, group_size=3)
        check(library, paged, chunk=chunk)
    for wide in (False, True):
        copies = make_copies(paged, 4, 40, torch.float16, 0.7)
        copied.check(library, paged, copies=copies, chunk=chunk, wide=wide)


def test_padded_requests(library) -> None:
    """A padded request of a CUDA graph has a row and no token: its position is -1."""
    paged = mapped_of("fibquant_3bit", 64, [40, 30], [1, 1], kind="all")
    expected = {chunk: emu.attend(library, paged, chunk=chunk) for chunk in (1, 16)}
    paged.query_start_loc = torch.tensor([0, 1, 2, 3], dtype=torch.int32)
    paged.query = torch.cat((paged.query, paged.query[:1]))
    paged.seq_lens = torch.cat((paged.seq_lens, torch.zeros(1, dtype=torch.int32)))
    paged.block_table = torch.cat((paged.block_table, torch.full_like(paged.block_table[:1], -1)))
    for chunk, wanted in expected.items():
        got = emu.attend(library, paged, chunk=chunk)
        assert torch.equal(got[:2], wanted) and (got[2] == 0).all()
