# SPDX-License-Identifier: Apache-2.0
"""Codes of latent vectors, key and value at once (docs/mla.md), and attention over their pages."""

from __future__ import annotations

import pytest
import torch

from vllm_fibquant.codec.codec import VectorCodec
from vllm_fibquant.codec.config import PRESETS
from vllm_fibquant.codec.latent import LatentCodec, attend_latents, write_latents

LATENT, ROTARY, HEAD_DIM, HEADS, TOKENS = 512, 64, 128, 4, 96


def inputs() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    to_keys, to_values = (normal(HEADS, HEAD_DIM, LATENT) / LATENT**0.5 for _ in range(2))
    return (
        normal(HEADS, HEAD_DIM), normal(HEADS, ROTARY), normal(TOKENS, LATENT),
        normal(TOKENS, ROTARY), to_keys, to_values,
    )  # fmt: skip


def absorbed(query, query_rotary, latent, rotary, to_keys, to_values) -> torch.Tensor:
    """Attention to latents themselves: what a kernel would do."""
    scores = torch.einsum("hd,hdc->hc", query, to_keys) @ latent.T + query_rotary @ rotary.T
    weights = (scores / (HEAD_DIM + ROTARY) ** 0.5).softmax(-1)
    return torch.einsum("hc,hdc->hd", weights @ latent, to_values)


def expanded(query, query_rotary, latent, rotary, to_keys, to_values) -> torch.Tensor:
    """Attention to every head's keys and values, made of latents: what the model says."""
    keys = torch.cat(
        (torch.einsum("tc,hdc->htd", latent, to_keys), rotary.expand(HEADS, -1, -1)), -1
    )
    scores = torch.einsum("hd,htd->ht", torch.cat((query, query_rotary), -1), keys)
    weights = (scores / (HEAD_DIM + ROTARY) ** 0.5).softmax(-1)
    return torch.einsum("ht,tc,hdc->hd", weights, latent, to_values)


def coded(preset: str, latent: torch.Tensor) -> torch.Tensor:
    codec = VectorCodec.from_spec(PRESETS[preset].value, latent.shape[-1])
    return codec.decode(*codec.encode(latent.float()[:, None]))[:, 0].double()


@pytest.mark.parametrize("preset", ["fibquant_4bit", "fibquant_3bit", "fibquant_2bit"])
def test_attention_over_coded_latents_is_the_models(preset):
    query, query_rotary, latent, rotary, to_keys, to_values = inputs()
    read = coded(preset, latent), coded("fibquant_4bit", rotary)
    rest = to_keys, to_values
    got = absorbed(query, query_rotary, *read, *rest)
    want = expanded(query, query_rotary, *read, *rest)
    assert (got - want).abs().max() < 1e-12
    # One record is read as key and as value: another latent changes both.
    assert not torch.allclose(got, absorbed(query, query_rotary, latent, rotary, *rest), atol=1e-3)


def test_more_bits_are_nearer():
    latent = inputs()[2]
    errors = [
        float(
            (coded(f"fibquant_{bits}bit", latent) - latent).square().sum() / latent.square().sum()
        )
        for bits in (4, 3, 2, 1)
    ]
    assert errors == sorted(errors) and errors[0] < 0.02 < errors[2] < 0.15, errors


def paged(num_reqs: int = 3, block_size: int = 16):
    """Requests of 0, 1 and 40 tokens in shuffled blocks of a cache that is poisoned elsewhere."""
    codec = LatentCodec.from_preset(PRESETS["fibquant_2bit"], LATENT, ROTARY)
    generator = torch.Generator().manual_seed(1)
    seq_lens = torch.tensor([0, 1, 40])[:num_reqs]
    blocks = torch.randperm(12, generator=generator)[:9].reshape(3, 3)
    cache = torch.full((12, block_size, codec.record_bytes), 0xFF, dtype=torch.uint8)
    latent = torch.randn(41, LATENT, generator=generator)
    rotary = torch.randn(41, ROTARY, generator=generator)
    at = torch.arange(40)
    slots = torch.cat((blocks[1, :1] * block_size, blocks[2, at // block_size] * block_size))
    slots[1:] += at % block_size
    mapping = torch.cat((slots, torch.tensor([-1])))
    padded = torch.cat((latent, latent[:1])), torch.cat((rotary, rotary[:1]))
    write_latents(codec, *padded, cache, mapping)
    query = torch.randn(3, HEADS, LATENT + ROTARY, generator=generator)
    return codec, latent, rotary, query, cache, blocks, seq_lens


def test_records_are_as_long_as_the_page_says():
    sizes = {
        name: LatentCodec.from_preset(PRESETS[name], LATENT, ROTARY).record_bytes
        for name in ("fibquant_3bit", "fibquant_2bit")
    }
    assert sizes == {"fibquant_3bit": 322, "fibquant_2bit": 258}  # docs/mla.md


def test_attention_over_pages_is_attention_over_decoded_latents():
    codec, latent, rotary, query, cache, blocks, seq_lens = paged()
    got = attend_latents(codec, query, cache, blocks, seq_lens, 0.1)
    indices, norms = codec.latent.encode(latent)
    read = codec.latent.decode(indices, norms).double()
    keys = torch.cat((read, rotary.bfloat16().double()), -1)
    want = torch.zeros(3, HEADS, LATENT, dtype=torch.float64)
    for row, (begin, end) in {1: (0, 1), 2: (1, 41)}.items():
        scores = 0.1 * query[row].double() @ keys[begin:end].T
        want[row] = scores.softmax(-1) @ read[begin:end]
    assert (got - want).abs().max() < 1e-5
    assert got[0].eq(0).all()
    assert torch.equal(got, attend_latents(codec, query, cache, blocks, seq_lens, 0.1))


@pytest.mark.parametrize("byte", [0, 129, 131], ids=["index", "norm", "rotary"])
def test_every_part_of_a_record_is_read(byte):
    codec, _, _, query, cache, blocks, seq_lens = paged()
    before = attend_latents(codec, query, cache, blocks, seq_lens, 0.1)
    cache[blocks[2, 1], 3, byte] ^= 0x08
    after = attend_latents(codec, query, cache, blocks, seq_lens, 0.1)
    assert not torch.equal(before[2], after[2])
    assert torch.equal(before[:2], after[:2])
    others = blocks.clone()
    others[2, 0] = blocks[2, 2]
    assert not torch.equal(after, attend_latents(codec, query, cache, others, seq_lens, 0.1))
