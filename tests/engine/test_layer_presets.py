# SPDX-License-Identifier: Apache-2.0
"""Presets for single layers: the cheapest for so many bytes, by what each layer's codes cost."""

from __future__ import annotations

import itertools
import json
import random
import shlex

import pytest
import torch

from vllm_fibquant.cli import calibrate
from vllm_fibquant.codec.config import PRESETS
from vllm_fibquant.engine import layer_presets as shares
from vllm_fibquant.engine import measure
from vllm_fibquant.options import parse_layers

from .harness import engine, generate, random_text, varied_prompts
from .models import VOCAB_SIZE, make_model


def test_nothing_of_as_many_bytes_is_cheaper():
    draw = random.Random(0)
    sizes = {"a": 20, "b": 36, "c": 52, "d": 76}
    for budget in (80, 100, 144, 210, 400):
        costs = [{name: draw.random() / size for name, size in sizes.items()} for _ in range(4)]
        chosen = shares.cheapest(costs, sizes, budget)
        assert sum(sizes[name] for name in chosen) <= budget

        def cost(names, costs=costs):
            return sum(of_layer[name] for of_layer, name in zip(costs, names, strict=True))

        every = itertools.product(sizes, repeat=4)
        fit = [names for names in every if sum(sizes[name] for name in names) <= budget]
        assert cost(chosen) == pytest.approx(min(map(cost, fit)))


def test_two_presets_tell_keys_from_values():
    k, v = 0.003, 0.0004
    costs = shares.costs_of(k + v, shares.KEY_COST[3] * k + shares.VALUE_COST[1] * v)
    assert set(costs) == set(PRESETS)
    assert costs["fibquant_2bit"] == pytest.approx(k + v)
    assert costs["fibquant_k2v3"] == pytest.approx(k + shares.VALUE_COST[3] * v)
    assert costs["fibquant_k5v4"] == pytest.approx(
        shares.KEY_COST[5] * k + shares.VALUE_COST[4] * v
    )
    assert min(shares.costs_of(1e-3, 0.0).values()) >= 0, "rounding costs nothing less"


def test_choices_are_written_as_options():
    chosen = ["a", "b", "b", "c", "b", "a", "b"]
    base, layers = shares.as_options(chosen)
    assert base == "b" and layers == {"0,5": "a", "3": "c"}
    names = ["fibquant_1bit", "fibquant_2bit", "fibquant_2bit", "fibquant_2bit", "fibquant_1bit"]
    base, layers = shares.as_options(names)
    assert [dict(parse_layers(layers)).get(i, base) for i in range(5)] == names


@pytest.fixture
def half_deaf(tmp_path, monkeypatch) -> str:
    """A model whose first layer's attention changes nothing."""
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(measure, "text_sequences", random_text)
    monkeypatch.setenv("FIBQUANT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    path = make_model("llama", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
    model.save_pretrained(path)
    return path


def test_bytes_go_where_they_are_heard(half_deaf):
    found = calibrate.choose_layers(half_deaf, "fibquant", "float32")
    options, what = found.splitlines()
    _, base, _, given = shlex.split(options)
    layers = json.loads(given)["fibquant"]["layers"]
    assert base == "fibquant_1bit" and layers == {"1": "fibquant_k5v4"}
    words = what.split()
    mixed, uniform = float(words[1]), float(words[words.index("layer:") + 1])
    assert mixed < uniform / 2 and "48.0 bytes" in what and "with 52" in what
    with engine(half_deaf, base, fibquant={"layers": layers}) as llm:
        assert generate(llm, varied_prompts(2, VOCAB_SIZE))


def test_models_that_cannot_have_them_are_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    with pytest.raises(ValueError, match="mix full and sliding-window attention"):
        calibrate.choose_layers(make_model("gemma3", tmp_path), "fibquant_3bit", "float32")
    with pytest.raises(ValueError, match="kv_cache_dtype must be one of"):
        calibrate.choose_layers("no folder", "fibquant_9bit", "float32")
