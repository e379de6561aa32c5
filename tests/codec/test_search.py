# SPDX-License-Identifier: Apache-2.0
"""Coarse-to-fine search: exact with all lists, nearly so with few, in kernel as in oracle."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops.test_encode import check_records, encode_both
from vllm_fibquant import ops
from vllm_fibquant.codec.codebook import Codebook, make_codebook
from vllm_fibquant.codec.codec import KVCodec, VectorCodec
from vllm_fibquant.codec.config import DEFAULT_NUM_LISTS, CodeSpec
from vllm_fibquant.codec.rotation import make_rotation
from vllm_fibquant.codec.search import (
    CodewordLists,
    codeword_lists,
    nearest_listed_rows,
    nearest_rows,
)
from vllm_fibquant.codec.source_law import sample_source

SPECS = [
    CodeSpec(2, 256),
    CodeSpec(4, 1024),
    CodeSpec(8, 1024),
    CodeSpec(16, 128),
    CodeSpec(4, 4096, folded=True),
]


def random_book(spec: CodeSpec, distinct: int | None = None) -> Codebook:
    """A book of source samples, each of `distinct` rows repeated in mixed order."""
    rng = np.random.default_rng(1)
    rows = sample_source(64, spec.subvec_dim, distinct or spec.num_rows, rng)
    rows = rows[rng.permutation(np.resize(np.arange(len(rows)), spec.num_rows))]
    rows = np.abs(rows) if spec.folded else rows
    table = np.clip(np.rint(rows * 200), 0 if spec.folded else -127, 127).astype(np.int8)
    return make_codebook(replace(spec, gain="norm", num_lists=None), 64, table, 1 / 256, {})[0]


def codec_of(spec: CodeSpec, num_lists: int, book: Codebook) -> KVCodec:
    side = VectorCodec(replace(spec, num_lists=num_lists), 64, book, make_rotation(64))
    return KVCodec(side, side)


def vectors(num_tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(2, num_tokens, 2, 64, generator=torch.Generator().manual_seed(seed))


# ---- the oracle ---------------------------------------------------------------------------------


@given(data=st.data(), num_rows=st.integers(1, 40), num_cells=st.integers(1, 9))
@settings(deadline=None, max_examples=150)
def test_search_is_the_definition(data, num_rows: int, num_cells: int) -> None:
    """Whatever the lists: the best listed row of the nearest cells, integers making ties common."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    rows, cells, y = (
        torch.from_numpy(rng.integers(-2, 3, (n, 2)).astype(np.float32))
        for n in (num_rows, num_cells, 12)
    )
    members = torch.from_numpy(rng.random((num_cells, num_rows)) < 0.3)
    members[0] |= ~members.any(0)
    num_lists = data.draw(st.integers(1, num_cells))
    got = nearest_listed_rows(y, rows, CodewordLists(cells, members), num_lists)
    for point, index in zip(y, got.tolist(), strict=True):
        nearness = ((point - cells).square().sum(-1)).tolist()
        order = sorted(range(num_cells), key=lambda m, d=nearness: (d[m], m))[:num_lists]
        listed = sorted({r for m in order for r in members[m].nonzero().flatten().tolist()})
        distance = (point - rows).square().sum(-1).tolist()
        if listed:
            assert index == min(listed, key=lambda r, d=distance: (d[r], r))
    if num_lists == num_cells:
        assert torch.equal(got, nearest_rows(y, rows))


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_every_row_is_listed_and_more_lists_lose_less(spec: CodeSpec) -> None:
    book = random_book(spec)
    lists = codeword_lists(book)
    assert lists.cells.shape == (spec.num_cells, spec.subvec_dim)
    assert lists.members.any(0).all()
    samples = sample_source(64, spec.subvec_dim, 2000, np.random.default_rng(2))
    y = torch.from_numpy(np.abs(samples) if spec.folded else samples)
    exact = nearest_rows(y, book.rows)

    def error(index: torch.Tensor) -> float:
        return float((y - book.rows[index]).square().sum(-1).mean())

    found = [nearest_listed_rows(y, book.rows, lists, n) for n in range(1, spec.num_cells + 1)]
    recall = [float((f == exact).float().mean()) for f in found]
    assert recall[0] > {2: 0.97, 4: 0.97, 8: 0.75, 16: 0.75}[spec.subvec_dim]
    assert recall[1] > {2: 0.99, 4: 0.99, 8: 0.93, 16: 0.92}[spec.subvec_dim]
    assert error(found[1]) < 1.03 * error(exact)
    assert all(a <= b for a, b in zip(recall, recall[1:], strict=False))
    assert torch.equal(found[-1], exact)


def test_lists_are_shorter_than_the_book_and_reproducible() -> None:
    spec = CodeSpec(4, 1024)
    lists = codeword_lists(random_book(spec))
    assert lists.members.float().mean() < 0.15
    codeword_lists.cache_clear()
    again = codeword_lists(random_book(spec))
    assert again is not lists
    assert torch.equal(again.members, lists.members) and torch.equal(again.cells, lists.cells)


def test_bad_arguments_are_refused() -> None:
    spec = CodeSpec(4, 256)
    book = random_book(spec)
    lists = codeword_lists(book)
    y = torch.zeros(3, 4)
    for bad in (0, 17):
        with pytest.raises(ValueError, match=f"num_lists must be from 1 to 16, got {bad}"):
            nearest_listed_rows(y, book.rows, lists, bad)
    with pytest.raises(ValueError, match="rows must have the 256 rows of the lists, got 255"):
        nearest_listed_rows(y, book.rows[1:], lists, 1)
    with pytest.raises(ValueError, match="num_lists must be from 0 to 16 for 256 rows, got 17"):
        CodeSpec(4, 256, num_lists=17)
    assert nearest_listed_rows(y[:0], book.rows, lists, 1).shape == (0,)


def test_defaults() -> None:
    for (subvec_dim, num_codewords), num_lists in DEFAULT_NUM_LISTS.items():
        assert CodeSpec(subvec_dim, num_codewords).lists_searched == num_lists > 0
    assert CodeSpec(4, 256).lists_searched == 0
    assert CodeSpec(4, 4096, folded=True).lists_searched == 0
    assert CodeSpec(4, 4096, num_lists=0).lists_searched == 0
    assert CodeSpec(4, 256, num_lists=3).lists_searched == 3


# ---- the kernel ---------------------------------------------------------------------------------


@pytest.mark.parametrize("num_lists", [1, 2, 3, "all"])
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_kernel_equals_the_oracle(isa: str, spec: CodeSpec, num_lists) -> None:
    num_lists = spec.num_cells if num_lists == "all" else num_lists
    codec = codec_of(spec, num_lists, random_book(spec))
    got, expected, *_ = encode_both(codec, *vectors(60))
    check_records(codec, got, expected)
    equal = (got == expected).all(-1).float().mean()
    assert equal > 0.99


@pytest.mark.parametrize("num_lists", [1, 2, "all"])
def test_a_vector_has_one_code_whatever_is_encoded_with_it(isa: str, num_lists) -> None:
    """Subvectors are searched cell by cell, thousands together, in parts of 4096 searches."""
    spec = CodeSpec(8, 256)
    num_lists = spec.num_cells if num_lists == "all" else num_lists
    codec = codec_of(spec, num_lists, random_book(spec))
    key, value = vectors(1500)

    def encode(size: int) -> torch.Tensor:
        cache = torch.zeros(1, 2, 1500, codec.layout.record_bytes, dtype=torch.uint8)
        pages = ops.pages_of(cache, codec)
        for begin in range(0, 1500, size):
            part = slice(begin, min(begin + size, 1500))
            ops.encode_kv(key[part], value[part], torch.arange(1500)[part], pages)
        return cache

    alone = encode(1)
    assert len(alone.flatten(0, 2).unique(dim=0)) > 2900
    for size in (37, 700, 1500):
        assert torch.equal(encode(size), alone)


@pytest.mark.parametrize("distinct", [None, 40])
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_all_lists_are_the_exhaustive_search(isa: str, spec: CodeSpec, distinct) -> None:
    """Bit for bit, also in a book whose rows repeat, where the first of them is stored."""
    book = random_book(spec, distinct)
    key, value = vectors(40, seed=3)
    exhaustive, *_ = encode_both(codec_of(spec, 0, book), key, value)
    listed, *_ = encode_both(codec_of(spec, spec.num_cells, book), key, value)
    assert torch.equal(listed, exhaustive)
    if distinct is None and spec.subvec_dim == 8:
        few, *_ = encode_both(codec_of(spec, 1, book), key, value)
        assert not torch.equal(few, exhaustive), "one list should miss something"


@pytest.mark.parametrize("spec", SPECS[:4], ids=lambda s: s.name)
def test_ties_between_lists_go_to_the_lowest_index(isa: str, spec: CodeSpec) -> None:
    """Equal rows in lists of different cells, which no lists made from a codebook have."""
    book = random_book(spec, distinct=40)
    key, value = vectors(40, seed=4)
    exhaustive, *_ = encode_both(codec_of(spec, 0, book), key, value)
    codec = codec_of(spec, spec.num_cells, book)
    cell_of = torch.randint(spec.num_cells, (spec.num_rows,), generator=torch.Generator())
    members = torch.arange(spec.num_cells).unsqueeze(-1) == cell_of
    codec.key.lists = CodewordLists(codec_of(spec, 1, book).key.lists.cells, members)
    listed, expected, *_ = encode_both(codec, key, value)
    assert torch.equal(listed, exhaustive) and torch.equal(expected, exhaustive)
