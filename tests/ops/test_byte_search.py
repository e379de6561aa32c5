# SPDX-License-Identifier: Apache-2.0
"""Searches with vectors of bytes store the bytes that a comparison of all rows in floats does."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.keys.test_key_map import make_map
from tests.ops.test_encode import encode_both
from tests.ops.test_lanes import build_portable
from vllm_fibquant import ops
from vllm_fibquant.codec.codebook import load_codebook, make_codebook
from vllm_fibquant.codec.codec import KVCodec, VectorCodec
from vllm_fibquant.codec.config import PRESETS, CodeSpec
from vllm_fibquant.codec.rotation import make_rotation
from vllm_fibquant.codec.search import nearest_rows
from vllm_fibquant.ops import cpu, cpu_library, cpu_tables, search_tables
from vllm_fibquant.ops.search_tables import FINEST, SQUARES, make_boxes, make_scan, make_squares

PAIRS = [CodeSpec(2, 256, storage="float16"), CodeSpec(2, 1024, folded=True, storage="float16")]
FOURS = [CodeSpec(4, 256), CodeSpec(4, 4096, folded=True)]
NAMES = ["fibquant_k5v3", "fibquant_4bit", "fibquant_3bit", "fibquant_2bit", "fibquant_1bit"]


def vectors(num_tokens: int, head_dim: int) -> torch.Tensor:
    """Like those of models: some channels large, lengths of all kinds, some sparse, some of equal
    coordinates, whose subvectors lie between codewords."""
    generator = torch.Generator().manual_seed(head_dim)
    x = torch.randn(num_tokens, 2, head_dim, generator=generator)
    x *= torch.randn(2, head_dim, generator=generator).exp()
    x *= (2 * torch.randn(num_tokens, 2, 1, generator=generator)).exp()
    kind = torch.rand(num_tokens, 2, 1, generator=generator)
    sparse = x * (torch.rand(x.shape, generator=generator) < 0.03)
    x = torch.where(kind < 0.1, sparse, x)
    return torch.where(kind > 0.9, x.sign(), x)


def encoded(name: str, head_dim: int, num_tokens: int, transform: bool = False) -> torch.Tensor:
    """The pages of `vectors`, encoded at once and one by one."""
    codec = KVCodec.from_preset(PRESETS[name], head_dim)
    key_map = None
    if transform:
        key_map = make_map(head_dim, index_bytes=codec.layout.key_index_bytes)
    x = vectors(num_tokens, head_dim)
    cache = torch.zeros(2, 2, num_tokens, codec.layout.record_bytes, dtype=torch.uint8)
    pages, slots = ops.pages_of(cache, codec, key_map), torch.arange(2 * num_tokens)
    positions = torch.arange(num_tokens)  # first tokens, which have no transform, among others
    ops.encode_kv(x, x.flip(0), slots[:num_tokens], pages, positions)
    for i in range(num_tokens):
        one = slice(i, i + 1)
        ops.encode_kv(x[one], x.flip(0)[one], slots[num_tokens:][one], pages, positions[one])
    assert torch.equal(cache[0], cache[1])
    return cache[0]


CASES = [
    *((name, head_dim, False) for name in NAMES for head_dim in (64, 80, 128)),
    *((f"fibquant_{bits}bit", head_dim, True) for bits in (2, 3, 4) for head_dim in (64, 128)),
]


@pytest.mark.parametrize("isa", ["avx512-vnni"], indirect=True)
@pytest.mark.parametrize(("name", "head_dim", "transform"), CASES)
def test_bytes_store_what_floats_store(name: str, head_dim: int, transform: bool, isa: str) -> None:
    got = encoded(name, head_dim, 400, transform)
    cpu_library.select_isa("avx512")
    assert torch.equal(got, encoded(name, head_dim, 400, transform))


@pytest.mark.long  # compiles the library twice
def test_their_model_stores_what_floats_store(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for folder, flags in (("floats", []), ("bytes", ["-DFQ_BYTE_MODEL"])):
        (tmp_path / folder).mkdir()
        library = build_portable(tmp_path / folder, 16, *flags)
        monkeypatch.setattr(cpu_library, "LIBRARY_PATH", library)
        cpu_library.library.cache_clear()
        cpu_library.select_isa("portable")
        results.append([encoded(name, d, 60, transform) for name, d, transform in CASES])
    monkeypatch.undo()
    cpu_library.library.cache_clear()
    for case, floats, bytes_ in zip(CASES, *results, strict=True):
        assert torch.equal(floats, bytes_), case


@pytest.mark.parametrize(("name", "table"), [("fibquant_1bit", "scan"), ("fibquant_2bit", "boxes")])
@pytest.mark.parametrize("isa", ["avx512-vnni"], indirect=True)
def test_integers_without_their_margin_err(
    monkeypatch: pytest.MonkeyPatch, isa: str, name: str, table: str
) -> None:
    """The vectors above do come near enough to ties for the margin to matter."""
    expected = encoded(name, 64, 400)
    make = getattr(search_tables, f"make_{table}")

    def without(book):
        found = make(book)
        return None if found is None else replace(found, margin=-1)

    monkeypatch.setattr(cpu_tables, f"make_{table}", without)
    anew = cpu_tables.codec_struct.__wrapped__
    monkeypatch.setattr(cpu, "codec_struct", anew)
    monkeypatch.setattr(cpu_tables, "_code", cpu_tables._code.__wrapped__)
    assert not torch.equal(expected, encoded(name, 64, 400))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("spec", PAIRS, ids=lambda s: s.name)
def test_a_square_lists_the_rows_that_win_in_it(spec: CodeSpec, head_dim: int) -> None:
    book = load_codebook(spec, head_dim)
    squares = make_squares(book)
    assert squares is not None
    generator = torch.Generator().manual_seed(0)
    inside = squares.low + torch.rand(200_000, 2, generator=generator) * squares.size * SQUARES
    column, line = ((inside - squares.low) / squares.size).long().clamp(max=SQUARES - 1).unbind(-1)
    listed = squares.rows[column + SQUARES * line].long()
    is_full = (listed == 255).all(-1)
    assert is_full.float().mean() < 0.15  # they lie where few vectors do
    wins = nearest_rows(inside, book.rows)
    assert (is_full | (listed == wins.unsqueeze(-1)).any(-1)).all()
    assert (listed.diff(dim=-1) >= 0).all()


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_scores_beyond_the_margin_are_in_order(head_dim: int) -> None:
    spec = CodeSpec(8, 256)
    book = load_codebook(spec, head_dim)
    scan = make_scan(book)
    assert scan is not None
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(20_000, spec.subvec_dim, generator=generator) / head_dim**0.5
    words = (y / scan.step).round()
    y, words = (x[words.abs().amax(-1) <= scan.most].double() for x in (y, words))
    assert len(y) > 18_000
    packed = scan.table[:, 1:].long()
    low = (packed & 0xFFFF) - ((packed & 0x8000) << 1)
    rows = torch.stack((low, packed >> 16), -1).flatten(1)
    scores = words @ rows.double().T + scan.table[:, 0]
    assert scores.abs().max() < 2**31
    order = scores.topk(2, -1)
    clear = order.values[:, 0] - order.values[:, 1] > scan.margin
    assert 0.85 < clear.double().mean() < 1
    exact = y @ book.rows.double().T - book.rows.double().square().sum(-1) / 2
    assert torch.equal(exact.argmax(-1)[clear], order.indices[:, 0][clear])
    assert torch.equal(255 - (order.values[:, 0].long() & 255), order.indices[:, 0])


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("spec", FOURS, ids=lambda s: s.name)
def test_a_box_lists_the_rows_that_win_in_it(spec: CodeSpec, head_dim: int) -> None:
    book = load_codebook(spec, head_dim)
    boxes = make_boxes(book)
    assert boxes is not None
    generator = torch.Generator().manual_seed(0)
    anywhere = boxes.low + torch.rand(50_000, 4, generator=generator) * boxes.fine * FINEST
    usual = torch.randn(50_000, 4, generator=generator) / head_dim**0.5
    most = torch.tensor(boxes.reach)
    edges = torch.stack((-most, most, torch.nextafter(most, torch.tensor(0.0))))
    edges = torch.cartesian_prod(*[edges[1:] if spec.folded else edges] * 4)
    y = torch.cat((edges, anywhere, usual.abs() if spec.folded else usual))
    y = y[(y.abs() <= most).all(-1)]
    assert len(y) > 50_000 + len(edges) // 2
    # As the kernel has it: floats, and no part behind the last.
    part = boxes.sides[((y - boxes.low) * torch.tensor(1 / boxes.fine)).long()].long()
    rows = boxes.rows[part @ torch.tensor([1, 8, 64, 512])].long()  # [n, 16]
    is_full = rows[:, 0] == rows[:, 1]
    assert is_full[-40_000:].float().mean() < 0.05
    assert (rows.diff(dim=-1) > 0)[~is_full].all()
    exact = y.double() @ book.rows.double().T - book.rows.double().square().sum(-1) / 2
    wins = exact.argmax(-1)
    assert (is_full | (rows == wins.unsqueeze(-1)).any(-1)).all()

    words = book.table.double()[rows]
    whole = (y / boxes.step - boxes.shift).round().double()
    scores = (words @ whole.unsqueeze(-1)).squeeze(-1) - 64 * words.square().sum(-1)
    assert scores.abs().max() < 2**23 - 2**16  # what a score has beside the row's number
    order = scores.topk(2, -1)
    clear = ~is_full & (order.values[:, 0] - order.values[:, 1] > boxes.margin)
    assert 0.9 < clear[-40_000:].double().mean() < 1
    found = rows.gather(-1, order.indices[:, :1]).squeeze(-1)
    assert torch.equal(found[clear], wins[clear])


@pytest.mark.parametrize("isa", ["avx512-vnni"], indirect=True)
def test_a_book_whose_scores_leave_their_bits_is_searched_plainly(isa: str) -> None:
    """Rows opposite to a vector score so low that 24 bits would make them the highest."""
    spec, generator = CodeSpec(4, 256), torch.Generator().manual_seed(0)
    rows = torch.randint(124, 128, (spec.num_rows, 4), generator=generator).to(torch.int8)
    rows[torch.arange(len(rows)), torch.arange(len(rows)) % 4] *= -1
    rows[7] = -40
    book, _ = make_codebook(spec, 64, rows.numpy(), 1 / 1200, {})
    words, far = book.table.double(), torch.full((4,), -150.0 * 128, dtype=torch.float64)
    scores = (words @ far - 64 * words.square().sum(-1)).long()
    wrapped = (scores + 2**23) % 2**24 - 2**23
    assert scores.argmax() == 7 != wrapped.argmax(), "the case is what it says"
    assert make_boxes(book) is None

    side = VectorCodec(spec, 64, book, make_rotation(64))
    key = torch.randn(2, 200, 2, 64, generator=generator)
    key[:, :100] = side.rotation.inverse(0.02 * key[:, :100] - 1)  # near the vector above
    got, expected, *_ = encode_both(KVCodec(side, side), *key)
    assert torch.equal(got, expected)


def test_books_without_tables() -> None:
    for spec in (CodeSpec(2, 64), CodeSpec(16, 32), CodeSpec(4, 64)):
        rows = torch.randint(-127, 128, (spec.num_rows, spec.subvec_dim)).to(torch.int8)
        book, _ = make_codebook(spec, 64, rows.numpy(), 1 / 512, {})
        assert make_scan(book) is None and make_squares(book) is None
        assert make_boxes(book) is None
