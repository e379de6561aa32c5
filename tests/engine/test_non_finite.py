# SPDX-License-Identifier: Apache-2.0
"""Weights that make NaN: counted, reported, and kept out of every other vector."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest

from vllm_fibquant.engine import non_finite

from .harness import cache_tensors, engine, in_batches, one_by_one, varied_prompts
from .models import VOCAB_SIZE, make_model

NUM_TOKENS = 4


def with_nan(model: str, folder: Path, weight: str) -> str:
    """A copy of a model with one NaN in row 0 of each weight whose name ends with `weight`."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, folder, dirs_exist_ok=True)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    names = [name for name in tensors if name.endswith(weight)]
    assert names
    for name in names:
        tensors[name][0, 0] = math.nan
    save_file(tensors, path, metadata={"format": "pt"})
    return str(folder)


@pytest.fixture
def warnings(monkeypatch) -> list[str]:
    """What the counter, set to zero, says."""
    told: list[str] = []
    monkeypatch.setattr(non_finite, "counter", non_finite.NonFiniteCounter())
    monkeypatch.setattr(non_finite.logger, "warning", lambda text, *args: told.append(text % args))
    return told


def test_keys_with_nan(model_folder, tmp_path, warnings):
    """Every key of one KV head of layer 0 holds a NaN: it is stored as zero, all else is finite."""
    model = with_nan(
        make_model("llama", model_folder), tmp_path, "layers.0.self_attn.k_proj.weight"
    )
    prompts = varied_prompts(12, VOCAB_SIZE, longest=100, seed=31)
    with engine(model, "fibquant_2bit") as llm:
        alone = one_by_one(llm, prompts, NUM_TOKENS)
        # The token generated last is never stored.
        stored = sum(len(prompt) + NUM_TOKENS - 1 for prompt in prompts)
        assert non_finite.counter.total == stored
        together = in_batches(llm, prompts, NUM_TOKENS)
        assert non_finite.counter.total == 2 * stored
        assert all(cache.numel() for cache in cache_tensors(llm))
    assert all(math.isfinite(value) for answer in alone for value in answer.logprobs)
    assert [a.bits for a in together] == [a.bits for a in alone]
    assert len(warnings) == 1, "at most once a minute"
    assert "with NaN or Inf as zero vectors" in warnings[0]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["exact", "quality"])
def test_hidden_states_with_nan(model_folder, tmp_path, warnings, mode):
    """Everything a layer gets is NaN: answers mean nothing, but the engine gives them."""
    model = with_nan(make_model("llama", model_folder), tmp_path, "layers.0.mlp.down_proj.weight")
    prompts = varied_prompts(8, VOCAB_SIZE, longest=100, seed=32)
    with engine(model, "fibquant_2bit", fibquant={"mode": mode}) as llm:
        answers = in_batches(llm, prompts, NUM_TOKENS)
    assert all(len(answer.tokens) == NUM_TOKENS for answer in answers)
    # Keys and values of both heads of layer 1.
    assert non_finite.counter.total == sum(4 * (len(p) + NUM_TOKENS - 1) for p in prompts)
    assert len(warnings) == 1
