# SPDX-License-Identifier: Apache-2.0
"""Keys encoded through a map: the kernel against the oracle, and what the map is worth."""

from __future__ import annotations

import pytest
import torch

from tests.paged import Paged, make_paged
from tests.test_attention import attend_in_chunks, check_against_oracle, codec_of
from vllm_fibquant import ops
from vllm_fibquant.key_map import KeyMap
from vllm_fibquant.reference import TokenCopies

NUM_PLAIN = 4


def make_map(head_dim: int, num_kv_heads: int = 2, length: float = 3.0) -> KeyMap:
    generator = torch.Generator().manual_seed(7)
    mean = torch.randn(num_kv_heads, head_dim, generator=generator) * length
    return KeyMap(mean, NUM_PLAIN)


def mapped(
    seq_lens: list[int],
    query_lens: list[int],
    *,
    head_dim: int = 64,
    preset: str = "fibquant_2bit",
    **settings,
) -> Paged:
    codec = codec_of(preset, head_dim)
    return make_paged(codec, seq_lens, query_lens, key_map=make_map(head_dim), **settings)


@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("preset", ["fibquant_k5v3", "fibquant_4bit", "fibquant_1bit"])
def test_every_code(preset: str, head_dim: int) -> None:
    paged = mapped([70, 1, 33, 5], [1, 1, 4, 5], head_dim=head_dim, preset=preset, group_size=3)
    check_against_oracle(paged)


@pytest.mark.parametrize("raw", [False, True], ids=["codes", "raw"])
@pytest.mark.parametrize(
    "options",
    [{"window": 2}, {"window": 7}, {"window": 66}, {"soft_cap": 2.0}, {"sinks": True}],
    ids=str,
)
def test_options(options: dict, raw: bool) -> None:
    paged = mapped([66, 640, 5, 3], [60, 2, 5, 1], group_size=3)
    options = dict(options)
    if options.pop("sinks", False):
        options["sinks"] = torch.linspace(-2, 2, 6)
    if raw:
        options |= paged.raw
    check_against_oracle(paged, **options)


def test_copies_of_first_and_recent_tokens() -> None:
    """Copies are in the model's basis, beside codes that are not."""
    paged = mapped([66, 30, 6], [3, 1, 1], group_size=3)
    num_first, num_recent = 2, 8
    starts = torch.tensor([0, 66, 96])
    contexts = [63, 29, 5]
    table = torch.full((3, num_first + num_recent), -1, dtype=torch.int32)
    for req, context in enumerate(contexts):
        columns = torch.cat((torch.arange(num_first), context - num_recent + torch.arange(8)))
        is_copied = (columns >= 0) & (columns < context)
        is_copied[num_first:] &= columns[num_first:] >= num_first
        is_copied[-3] = False  # one was taken
        table[req, is_copied] = (starts[req] + columns[is_copied]).to(torch.int32)
    copies = TokenCopies(paged.key, paged.value, table, num_first)
    check_against_oracle(paged, copies=copies, **paged.raw)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_model_dtypes(dtype: torch.dtype) -> None:
    check_against_oracle(mapped([200, 77], [1, 50], group_size=4, dtype=dtype))


def test_every_instruction_set(isa: str) -> None:
    for query_lens in ([1, 1], [9, 20]):
        paged = mapped([70, 530], query_lens, group_size=3)
        check_against_oracle(paged, window=300, soft_cap=4.0)


@pytest.mark.parametrize("options", [{}, {"window": 100}, {"soft_cap": 3.0}], ids=str)
def test_bit_equal_however_the_prompt_is_cut(options: dict) -> None:
    paged = mapped([1100], [1100], group_size=3)
    whole = attend_in_chunks(paged, [1100], key_map=paged.key_map, **options)
    for chunks in ([512, 588], [1, 2, 1, 1096], [3, 1049, 48], [1073] + [1] * 27):
        cut = attend_in_chunks(paged, chunks, key_map=paged.key_map, **options)
        assert torch.equal(whole, cut)


def test_bit_equal_for_any_number_of_threads() -> None:
    paged, threads, results = mapped([1100], [1], group_size=3), torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(paged.attend())
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results)


def test_an_empty_map_changes_nothing_but_the_order_of_sums() -> None:
    codec = codec_of("fibquant_2bit", 64)
    plain = make_paged(codec, [70, 5], [1, 5], group_size=3)
    nothing = KeyMap(torch.zeros(2, 64), 0)
    paged = make_paged(codec, [70, 5], [1, 5], group_size=3, key_map=nothing)
    assert torch.equal(plain.cache, paged.cache)
    assert torch.equal(plain.attend(), paged.attend())


def test_a_mean_is_worth_a_bit() -> None:
    """Keys with a common part: at the same bytes the answer errs less than half as much."""
    paged = mapped([400], [1], group_size=3)
    key, value = (x.double().repeat_interleave(3, 1) for x in (paged.key, paged.value))
    scores = torch.einsum("hd,shd->hs", paged.query[0].double(), key) * paged.scale
    truth = torch.einsum("hs,shd->hd", scores.softmax(-1), value)
    with_map = (paged.attend()[0] - truth).norm()
    ops.encode_kv(paged.key, paged.value, paged.cache, paged.slots, paged.codec)
    paged.key_map = None
    assert with_map < 0.5 * (paged.attend()[0] - truth).norm()


@pytest.mark.parametrize(
    ("key_map", "message"),
    [
        (lambda: make_map(64, num_kv_heads=3), "key_map must be of 2 KV heads"),
        (lambda: make_map(128), "head_dim 64"),
        (lambda: KeyMap(torch.zeros(2, 64, dtype=torch.float64), 4), "contiguous float32"),
        (lambda: KeyMap(torch.full((2, 64), torch.nan), 4), "must be finite"),
        (lambda: KeyMap(torch.zeros(2, 64), -1), "num_plain must be at least 0"),
    ],
)
def test_bad_maps_are_refused(key_map, message: str) -> None:
    paged = make_paged(codec_of("fibquant_2bit", 64), [30, 9], [1, 1])
    with pytest.raises(ValueError, match=message):
        paged.key_map = key_map()
        paged.attend()


def test_not_with_keep_first() -> None:
    with pytest.raises(ValueError, match="keep_first must be 0 with key_map"):
        mapped([30], [1]).attend(keep_first=2)
