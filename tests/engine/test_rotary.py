# SPDX-License-Identifier: Apache-2.0
"""Turning queries back with vLLM's rotary embeddings, and finding those."""

from __future__ import annotations

import pytest
import torch

from vllm_fibquant.engine import rotary

HEAD_DIM = 64
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 512,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0,
    "original_max_position_embeddings": 512,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
PARTIAL = {**PLAIN, "partial_rotary_factor": 0.25}
MROPE = {**PLAIN, "mrope_section": [8, 12, 12], "mrope_interleaved": False}
"""Of vision models; it takes no query without a key."""


def every_embedding(test):
    """Runs a test with every kind of embedding there is a product of, in both styles and dtypes."""
    kinds = [PLAIN, LLAMA3, YARN, LINEAR, PARTIAL, MROPE]
    test = pytest.mark.parametrize("parameters", kinds, ids=lambda p: f"{p['rope_type']}{len(p)}")(
        test
    )
    test = pytest.mark.parametrize("is_neox_style", [True, False])(test)
    return pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)(test)


class Impl:
    """Stands for a layer's implementation."""


class Layer(torch.nn.Module):
    def __init__(self, impl: Impl) -> None:
        super().__init__()
        self.impl = impl


def make_parent(embedding: torch.nn.Module | None, impl: Impl) -> torch.nn.Module:
    """An attention module of a model, as vLLM builds it."""
    rotary.watch(impl)
    parent = torch.nn.Module()
    parent.rotary_emb = embedding
    parent.attn = Layer(impl)
    return parent


class OtherStyle(torch.nn.Module):
    """An embedding that says the other pairing of its own."""

    def __init__(self, embedding: torch.nn.Module) -> None:
        super().__init__()
        self.inner = embedding
        self.rotary_dim, self.is_neox_style = embedding.rotary_dim, not embedding.is_neox_style
        self.cos_sin_cache = embedding.cos_sin_cache

    def forward(self, *given):
        return self.inner(*given)


def make_rotary(parameters, dtype=torch.float32, is_neox_style=True, max_position=4096):
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import get_rope

    with set_current_vllm_config(VllmConfig()):
        return get_rope(
            HEAD_DIM, max_position=max_position, is_neox_style=is_neox_style,
            rope_parameters=parameters, dtype=dtype,
        )  # fmt: skip


@every_embedding
def test_turned_is_rotated_less(parameters, is_neox_style, dtype):
    """R_p q turned back by g is R_(p-g) q, for every kind of embedding there is a product of."""
    embedding = make_rotary(parameters, dtype, is_neox_style)
    impl = Impl()
    parent = make_parent(embedding, impl)
    turn_back = rotary.turn_back_of(impl, 2048, HEAD_DIM, dtype)
    assert parent.attn.impl is impl

    def rotate(positions, x):
        return embedding(positions, x.flatten(1).clone(), x[:, 0].clone())[0].view(x.shape)

    generator = torch.Generator().manual_seed(0)
    query = torch.randn(50, 3, HEAD_DIM, generator=generator).to(dtype)
    position = torch.randint(0, 2048, (50,), generator=generator)
    distance = (position * torch.rand(50, generator=generator)).long()
    rotated = rotate(position, query)
    before = rotated.clone()
    turned = turn_back(rotated, distance)
    assert torch.equal(rotated, before)
    error = (turned.float() - rotate(position - distance, query).float()).abs().max()
    assert error < (2e-3 if dtype == torch.float32 else 0.1)
    assert (turned.float() - rotated.float()).abs().max() > 1
    # A row's bits must not depend on whether others of its batch are turned.
    assert torch.equal(turn_back(rotated, 0 * distance), rotated)


@every_embedding
def test_turns_are_those_of_the_embedding(parameters, is_neox_style, dtype):
    embedding = make_rotary(parameters, dtype, is_neox_style)
    impl = Impl()
    parent = make_parent(embedding, impl)
    turns = rotary.turns_of(impl, 2000, HEAD_DIM, dtype)
    assert rotary.turns_of(impl, 2000, HEAD_DIM, dtype) is turns
    assert parent.attn.impl is impl
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 3, HEAD_DIM, generator=generator).to(dtype)
    positions = torch.randint(0, 2000, (50,), generator=generator)
    expected = embedding(positions, x.flatten(1).clone(), x[:, 0].clone())[0].view(x.shape).float()
    turned = turns.turn(x.float(), positions)
    turning = slice(None, embedding.rotary_dim)
    error = (turned - expected)[..., turning].abs().max()
    assert error < (1e-3 if dtype == torch.float32 else 0.05)  # float32 angles up to 2000
    assert not turned[..., embedding.rotary_dim :].any()
    # The wrong pairing is another rotation, and it is noticed.
    other, says = Impl(), OtherStyle(embedding)
    parent = make_parent(says, other)
    with pytest.raises(ValueError, match="an error of"):
        rotary.turns_of(other, 2000, HEAD_DIM, dtype)


def test_models_without_one_embedding_beside_each_layer_are_refused():
    impl = Impl()
    with pytest.raises(ValueError, match="got 0 of them"):
        rotary.turn_back_of(impl, 100, HEAD_DIM, torch.float32)
    parent = make_parent(None, impl)
    with pytest.raises(ValueError, match="got 0 of them"):
        rotary.turn_back_of(impl, 100, HEAD_DIM, torch.float32)
    parent.one, parent.two = make_rotary(PLAIN), make_rotary(LINEAR)
    with pytest.raises(ValueError, match="got 2 of them"):
        rotary.turn_back_of(impl, 100, HEAD_DIM, torch.float32)


def test_a_table_that_is_too_short_is_refused():
    impl = Impl()
    parent = make_parent(make_rotary(PLAIN, max_position=128), impl)
    assert parent is not None
    with pytest.raises(ValueError, match="know all 129 positions.*got 128.*--hf-overrides"):
        rotary.turn_back_of(impl, 129, HEAD_DIM, torch.float32)
    rotary.turn_back_of(impl, 128, HEAD_DIM, torch.float32)


def test_an_embedding_that_is_no_rotation_is_refused():
    class Shear(torch.nn.Module):
        rotary_dim, is_neox_style, cos_sin_cache = HEAD_DIM, True, torch.zeros(200, HEAD_DIM)

        def forward(self, positions, query, key):
            return query * (1 + positions[:, None]), key

    class NeedsKeys(Shear):
        def forward(self, positions, query, key):
            return query + key, key

    for embedding, got in ((Shear(), "an error of"), (NeedsKeys(), "NeedsKeys")):
        impl = Impl()
        parent = make_parent(embedding, impl)
        assert parent is not None
        with pytest.raises(ValueError, match=got):
            rotary.turns_of(impl, 100, HEAD_DIM, torch.float32)
        with pytest.raises(ValueError, match=got):
            rotary.turn_back_of(impl, 200, HEAD_DIM, torch.float32)


def test_what_the_defaults_are_makes_no_difference():
    """A GPU's worker loads its model beside a default device."""
    embedding, impl, other = make_rotary(PLAIN), Impl(), Impl()
    parents = make_parent(embedding, impl), make_parent(make_rotary(LINEAR), other)
    plain = rotary.turn_back_of(impl, 2048, HEAD_DIM, torch.float32)
    rotary._turns.clear()
    with torch.device("meta"):
        made = rotary.turn_back_of(impl, 2048, HEAD_DIM, torch.float32)
        rotary.turn_back_of(other, 2048, HEAD_DIM, torch.float32)
    assert parents
    query, distance = torch.randn(5, 2, HEAD_DIM), torch.arange(5)
    assert torch.equal(made(query, distance), plain(query, distance))
