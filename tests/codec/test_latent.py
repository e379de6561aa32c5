# SPDX-License-Identifier: Apache-2.0
"""Codes of latent vectors, key and value at once (docs/mla.md); nothing serves them yet."""

from __future__ import annotations

import pytest
import torch

from vllm_fibquant.codec.codec import VectorCodec
from vllm_fibquant.codec.config import PRESETS

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
