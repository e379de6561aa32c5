# SPDX-License-Identifier: Apache-2.0
"""Latent attention's kernels against the oracle (codec/latent.py)."""

from __future__ import annotations

import pytest
import torch

from vllm_fibquant.codec import latent as oracle
from vllm_fibquant.codec.config import PRESETS
from vllm_fibquant.codec.latent import LatentCodec
from vllm_fibquant.ops import cpu_library, latent

LATENT, ROTARY, BLOCK_SIZE = 512, 64, 16
LENGTHS = (1, 0, 33, 15, 16, 17, 1030)
PRESET_NAMES = [name for name in PRESETS if name != "fibquant"]


def codec_of(name: str = "fibquant_3bit", dims: tuple[int, int] = (LATENT, ROTARY)) -> LatentCodec:
    return LatentCodec.from_preset(PRESETS[name], *dims)


class Case:
    """Requests of LENGTHS in shuffled blocks of a cache that is poisoned elsewhere."""

    def __init__(self, codec: LatentCodec, num_heads=16, lengths=LENGTHS, dtype=torch.float32):
        generator = torch.Generator().manual_seed(0)
        self.codec, self.lengths = codec, torch.tensor(lengths, dtype=torch.int32)
        counts = [-(-n // BLOCK_SIZE) for n in lengths]
        blocks = torch.randperm(sum(counts) + 2, generator=generator)[: sum(counts)].split(counts)
        self.table = torch.nn.utils.rnn.pad_sequence(blocks, batch_first=True).int()
        at = [torch.arange(n) for n in lengths]
        self.slots = torch.cat(
            [
                b[t // BLOCK_SIZE] * BLOCK_SIZE + t % BLOCK_SIZE
                for b, t in zip(blocks, at, strict=True)
            ]
        )
        width = codec.latent.head_dim + codec.rotary_dim
        tokens = torch.randn(len(self.slots), width, generator=generator).to(dtype)
        self.tokens = tokens.split([codec.latent.head_dim, codec.rotary_dim], dim=-1)  # views
        self.query = torch.randn(len(lengths), num_heads, width, generator=generator).to(dtype)
        shape = sum(counts) + 2, BLOCK_SIZE, codec.record_bytes
        self.caches = [torch.full(shape, 0xFF, dtype=torch.uint8) for _ in range(2)]
        self.count = latent.write_latents(codec, *self.tokens, self.caches[0], self.slots)
        oracle.write_latents(codec, *self.tokens, self.caches[1], self.slots)

    def attend(self, rows=slice(None), heads=slice(None)) -> torch.Tensor:
        query = self.query[rows, heads]
        return latent.attend_latents(
            self.codec, query, self.caches[0], self.table[rows], self.lengths[rows], 0.05
        )

    def expected(self) -> torch.Tensor:
        return oracle.attend_latents(
            self.codec, self.query.double(), self.caches[0], self.table, self.lengths, 0.05
        )


@pytest.fixture(params=["best", "portable"])
def isa(request):
    if request.param == "portable":
        cpu_library.select_isa("portable")
    yield
    cpu_library.select_isa(None)


@pytest.mark.parametrize("name", PRESET_NAMES)
def test_records_and_attention_are_the_oracles(name: str, isa) -> None:
    case = Case(codec_of(name))
    kernel, expected = case.caches
    assert (kernel != expected).any(-1).float().mean() <= 0.01, "more than ties"
    assert case.count == 0
    got, want = case.attend(), case.expected()
    assert (got - want).abs().max() < 1e-5 * want.abs().max()
    assert got[1].eq(0).all(), "a request of no tokens"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_16_bits(dtype: torch.dtype) -> None:
    case = Case(codec_of(), dtype=dtype)
    kernel, expected = case.caches
    assert (kernel != expected).any(-1).float().mean() <= 0.01
    got, want = case.attend(), case.expected()
    assert got.dtype == dtype
    assert (got - want).abs().max() <= 2 * torch.finfo(dtype).eps * want.abs().max()


@pytest.mark.parametrize("dims", [(256, 32), (512, 64), (64, 16)])
@pytest.mark.parametrize("num_heads", [1, 3, 16, 50, 128])
def test_every_number_of_heads(num_heads: int, dims: tuple[int, int]) -> None:
    case = Case(codec_of("fibquant_2bit", dims), num_heads, lengths=(40, 1, 600))
    got, want = case.attend(), case.expected()
    assert (got - want).abs().max() < 1e-5 * want.abs().max()


def test_bits_depend_on_a_rows_own_query_and_tokens_alone(isa) -> None:
    case, threads = Case(codec_of(), 50), torch.get_num_threads()
    together = case.attend()
    for row in range(len(LENGTHS)):
        assert torch.equal(case.attend(slice(row, row + 1)), together[row : row + 1])
    for heads in (slice(0, 1), slice(47, 50)):
        assert torch.equal(case.attend(heads=heads), together[:, heads])
    try:
        for count in (1, 3):  # splits are one thread's, or several's
            torch.set_num_threads(count)
            assert torch.equal(case.attend(), together)
            assert torch.equal(case.attend(slice(6, 7), slice(0, 1)), together[6:7, :1])
    finally:
        torch.set_num_threads(threads)


def test_one_token_alone_is_stored_as_among_others() -> None:
    case = Case(codec_of())
    alone = torch.full_like(case.caches[0], 0xFF)
    for i in range(0, len(case.slots), 97):
        tokens = [x[i : i + 1] for x in case.tokens]
        latent.write_latents(case.codec, *tokens, alone, case.slots[i : i + 1])
        at = int(case.slots[i]) // BLOCK_SIZE, int(case.slots[i]) % BLOCK_SIZE
        assert torch.equal(alone[at], case.caches[0][at])


def test_vectors_that_are_not_finite_are_zeros_and_counted() -> None:
    codec = codec_of()
    tokens, rotary = torch.randn(4, LATENT), torch.randn(4, ROTARY)
    tokens[1, 7], rotary[2, 5], tokens[3, 0] = float("nan"), float("inf"), float("inf")
    caches = [torch.full((1, 4, codec.record_bytes), 0xFF, dtype=torch.uint8) for _ in range(2)]
    slots = torch.tensor([0, 1, 2, -1])
    assert latent.write_latents(codec, tokens, rotary, caches[0], slots) == 2
    oracle.write_latents(codec, tokens, rotary, caches[1], slots)
    assert torch.equal(*caches)
    assert caches[0][0, 3].eq(0xFF).all(), "a token of slot -1 is stored nowhere"


def test_what_is_refused() -> None:
    case = Case(codec_of(), lengths=(40, 1))
    codec, cache = case.codec, case.caches[0]
    one = [x[:1] for x in case.tokens]
    with pytest.raises(ValueError, match="slot_mapping must hold slots below 96 or -1, got 96"):
        latent.write_latents(codec, *one, cache, torch.tensor([96]))
    with pytest.raises(ValueError, match="rotary must be .* last axis of 64"):
        latent.write_latents(codec, one[0], one[0], cache, torch.tensor([0]))
    rest = cache, case.table, case.lengths, 0.05
    with pytest.raises(ValueError, match="query must be .* last axis of 576"):
        latent.attend_latents(codec, case.query[..., :-1], *rest)
    with pytest.raises(ValueError, match="cache must be .* last axis of 322"):
        latent.attend_latents(codec, case.query, cache[..., :-2], *rest[1:])
    with pytest.raises(ValueError, match="block numbers inside the cache, below 6"):
        latent.attend_latents(codec, case.query, cache, case.table + 5, case.lengths, 0.05)
    with pytest.raises(ValueError, match="got 49 of 48 tokens"):
        latent.attend_latents(codec, case.query, cache, case.table, case.lengths + 9, 0.05)
    one_row = torch.zeros(1, 100, dtype=torch.int32)[:, :2]  # contiguous, says torch
    with pytest.raises(ValueError, match="got 40 of 32 tokens"):
        latent.attend_latents(codec, case.query[:1], cache, one_row, case.lengths[:1], 0.05)
    with pytest.raises(ValueError, match="must have 2 rows, as query, got 1 and 2"):
        latent.attend_latents(codec, case.query, cache, case.table[:1], case.lengths, 0.05)
    with pytest.raises(ValueError, match="a row for every slot, got .* 1 and 1 rows for 8"):
        latent.write_latents(codec, *one, cache, torch.arange(8))
    with pytest.raises(ValueError, match="must have one dtype"):
        latent.write_latents(codec, one[0], one[1].bfloat16(), cache, torch.tensor([0]))
    assert latent.unsupported_dims(LATENT, ROTARY) is None
    assert "kv_lora_rank: must be a multiple of 16" in str(latent.unsupported_dims(520, 64))
    assert "qk_rope_head_dim" in str(latent.unsupported_dims(512, 24))


def test_the_self_check_passes_and_notices(monkeypatch) -> None:
    result = latent.run_latent_check(codec_of(), torch.bfloat16, 16, BLOCK_SIZE)
    assert result.record_mismatch <= 0.01 and result.error <= result.tolerance
    attend = latent.attend_latents
    monkeypatch.setattr(latent, "attend_latents", lambda *args: attend(*args) * 1.01)
    with pytest.raises(RuntimeError, match="refusing to serve"):
        latent.run_latent_check(codec_of(), torch.float32, 16, BLOCK_SIZE)
