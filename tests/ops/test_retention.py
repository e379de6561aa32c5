# SPDX-License-Identifier: Apache-2.0
"""Attention that keeps a request's first positions beside its window: the kernel and the oracle."""

from __future__ import annotations

import pytest
import torch

from tests.ops.test_attention import attend_in_chunks, check_against_oracle, codec_of
from tests.paged import make_paged
from vllm_fibquant.ops import cpu_library


def other_query(paged, seed: int = 9) -> torch.Tensor:
    """Queries unlike paged.query, in a layout of their own."""
    generator = torch.Generator().manual_seed(seed)
    shape = paged.query.shape
    wide = torch.randn(shape[0], shape[1] + 1, shape[2] + 16, generator=generator)
    return wide.to(paged.query.dtype)[:, 1:, : shape[2]]


@pytest.mark.parametrize("head_dim", [64, 80, 256])
@pytest.mark.parametrize("keep_first", [1, 4, 16, 40, 700])
@pytest.mark.parametrize("window", [0, 1, 20, 600])
def test_oracle(keep_first: int, window: int, head_dim: int) -> None:
    """Lengths around keep_first, the window, a tile, a block and a split; prompts and decodes."""
    codec = codec_of("fibquant_3bit", head_dim)
    lens = [1, 4, keep_first, keep_first + 1, keep_first + max(window, 1) + 1, 513, 640]
    for query_lens in ([1] * 7, [1, 3, keep_first, keep_first + 1, 2, 60, 640]):
        paged = make_paged(codec, lens, query_lens, group_size=3)
        options = {"keep_first": keep_first, "window": window}
        check_against_oracle(paged, **options)
        check_against_oracle(paged, **options, first_query=other_query(paged))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_model_dtypes_and_every_other_option(dtype: torch.dtype) -> None:
    codec = codec_of("fibquant_4bit", 128)
    paged = make_paged(codec, [200, 77], [1, 50], group_size=4, dtype=dtype)
    sinks = torch.linspace(-2, 2, 8)
    options = {"keep_first": 4, "window": 33, "soft_cap": 3.0, "sinks": sinks}
    check_against_oracle(paged, **options, first_query=other_query(paged))


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "avx512-vnni"])
def test_every_instruction_set(isa: str) -> None:
    try:
        cpu_library.select_isa(isa)
    except ValueError:
        pytest.skip(f"this CPU does not have {isa}")
    try:
        paged = make_paged(codec_of("fibquant_2bit", 64), [70, 530], [9, 20], group_size=3)
        check_against_oracle(paged, keep_first=5, window=40, first_query=other_query(paged))
    finally:
        cpu_library.select_isa(None)


def test_the_same_query_over_everything_is_plain_attention() -> None:
    """A window that hides nothing and no other query: only the split of the sums differs."""
    paged = make_paged(codec_of("fibquant_3bit", 64), [100, 600], [100, 3], group_size=3)
    plain = paged.attend()
    assert torch.allclose(paged.attend(keep_first=4), plain, atol=2e-6)
    assert torch.allclose(paged.attend(keep_first=4, first_query=paged.query), plain, atol=2e-6)


def test_first_query_is_used_for_the_first_positions_alone() -> None:
    paged = make_paged(codec_of("fibquant_3bit", 64), [100], [3], group_size=3)
    options = {"keep_first": 4, "window": 50}
    before = paged.attend(**options, first_query=other_query(paged))
    assert not torch.equal(before, paged.attend(**options))
    paged.query = other_query(paged, seed=10)
    assert not torch.equal(before, paged.attend(**options, first_query=other_query(paged)))


@pytest.mark.parametrize("keep_first", [4, 520])
@pytest.mark.parametrize("window", [100, 550])
def test_bit_equal_however_the_prompt_is_cut(keep_first: int, window: int) -> None:
    length = 1100
    paged = make_paged(codec_of("fibquant_3bit", 64), [length], [length], group_size=3)
    first = other_query(paged)

    def cut(chunks: list[int]) -> torch.Tensor:
        out, begin = [], 0
        whole = paged.query
        for chunk in chunks:
            end = begin + chunk
            paged.query = whole[begin:end]
            paged.query_start_loc = torch.tensor([0, chunk], dtype=torch.int32)
            paged.seq_lens = torch.tensor([end], dtype=torch.int32)
            options = {"keep_first": keep_first, "window": window}
            out.append(paged.attend(**options, first_query=first[begin:end]))
            begin = end
        paged.query = whole
        assert begin == length
        return torch.cat(out)

    whole = cut([length])
    assert torch.equal(whole, cut([512, 588]))
    assert torch.equal(whole, cut([3, 2, 507, 561] + [1] * 27))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(5)  # several jobs for one row, merged in a second pass
        assert torch.equal(whole, cut([length - 2, 1, 1]))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(
        attend_in_chunks(paged, [length], keep_first=keep_first, window=window),
        attend_in_chunks(paged, [5, 1095], keep_first=keep_first, window=window),
    )


def test_blocks_between_are_not_read() -> None:
    """The manager frees them: the table may say anything there."""
    paged = make_paged(codec_of("fibquant_2bit", 64), [200], [2], group_size=3)
    before = paged.attend(keep_first=20, window=50)
    paged.block_table[0, 2:9] = 2**30  # positions 32 to 143; the window begins at 149
    assert torch.equal(paged.attend(keep_first=20, window=50), before)
    paged.block_table[0, 1] = 2**30  # positions 16 to 19 are kept
    with pytest.raises(ValueError, match="inside the cache"):
        paged.attend(keep_first=20, window=50)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_first": -1}, "keep_first and chunk must be at least 0"),
        ({"first_query": torch.zeros(2, 4, 64)}, "a keep_first above 0"),
        (
            {"keep_first": 2, "first_query": torch.zeros(1, 4, 64)},
            "first_query must be .*at least 2",
        ),
        ({"keep_first": 2, "first_query": torch.zeros(2, 4, 80)}, "first_query must be"),
        (
            {
                "keep_first": 2,
                "raw_key": torch.zeros(2, 2, 64),
                "raw_value": torch.zeros(2, 2, 64),
            },
            "0 with raw_key",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_arguments_are_refused(options: dict, message: str) -> None:
    paged = make_paged(codec_of("fibquant_2bit", 64), [30, 9], [1, 1])
    with pytest.raises(ValueError, match=message):
        paged.attend(**options)
