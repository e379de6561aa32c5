# SPDX-License-Identifier: Apache-2.0
"""`vllm-fibquant plan` says what a running engine says."""

from __future__ import annotations

import logging

import pytest

from vllm_fibquant.cli import plan
from vllm_fibquant.codec.config import PRESETS
from vllm_fibquant.engine import capacity, compat_pages
from vllm_fibquant.engine.planned import planned

from .architectures import FAMILIES, HYBRIDS, QUICK, VOCAB_SIZE, quickly
from .harness import DEFAULTS, engine, generate, varied_prompts
from .models import make_model

CONTEXT = 500
BATCHED_TOKENS = 512
CACHE_BYTES = 64 << 20


def engines_cache(llm) -> tuple[int, int, float]:
    """Blocks, tokens and concurrent requests of an engine's cache."""
    cache = llm.llm_engine.vllm_config.cache_config
    return cache.num_gpu_blocks, cache.kv_cache_size_tokens, cache.kv_cache_max_concurrency


def by_name(capacities) -> dict[str, tuple[int, int, float]]:
    """The same of a plan, by cache dtype as vLLM calls it."""
    found = {c.kv_cache_dtype: (c.num_blocks, c.num_tokens, c.max_concurrency) for c in capacities}
    return {**found, "auto": found["bf16"]}


@pytest.mark.parametrize(
    "shape, kv_cache_dtype, skip_layers",
    [
        ("llama", "fibquant_1bit", ("1",)),
        ("gemma3", "auto", ()),
        ("gemma3", "fibquant", ()),
        ("gemma3", "fibquant_2bit", ("0",)),
        ("gemma3", "fibquant_2bit", ("sliding_window",)),
        ("gemma4", "fibquant_2bit", ()),
        ("gemma4-112", "fibquant_2bit", ()),
        ("llama4", "fibquant_2bit", ()),
        ("mistral", "fibquant_2bit", ()),
        ("qwen3", "fibquant_k4v2", ()),
    ],
)
def test_plan_is_the_engines_capacity(model_folder, shape, kv_cache_dtype, skip_layers):
    model = make_model(shape, model_folder)
    settings = {"kv_cache_dtype_skip_layers": list(skip_layers)} if skip_layers else {}
    with engine(
        model,
        kv_cache_dtype,
        dtype="bfloat16",
        max_model_len=CONTEXT,
        max_num_batched_tokens=BATCHED_TOKENS,
        block_size=64,
        **settings,
    ) as llm:
        fits = capacity.what_fits(llm.llm_engine.vllm_config, CACHE_BYTES)
        found = engines_cache(llm)
    _, _, capacities = plan.plan_model(
        model,
        CACHE_BYTES,
        CONTEXT,
        options={"mode": "exact"},
        block_size=64,
        skip_layers=skip_layers,
        batched_tokens=BATCHED_TOKENS,
    )
    expected = by_name(capacities)
    assert found == expected[kv_cache_dtype]
    # What a server says of itself, beside 16 bits and every other preset.
    assert fits["stored"].num_tokens == found[1]
    if not skip_layers:
        assert fits["16bit"].num_tokens == expected["auto"][1]
        if kv_cache_dtype != "auto":
            told = {n: fit.num_tokens for n, fit in fits.items() if n in PRESETS}
            assert told == {n: expected[n][1] for n in PRESETS if n in expected}


# Apertus' activation reads its weights when it is built.
@pytest.mark.parametrize("shape", quickly(f for f in FAMILIES if f != "apertus"))
def test_plan_is_what_vllm_makes_of_the_layers(model_folder, shape):
    """Every family, in vLLM's own layers without weights, which the next test compares with
    engines: the plan's arithmetic reads the same from the configuration."""
    model = make_model(shape, model_folder)
    _, _, capacities = plan.plan_model(model, CACHE_BYTES, CONTEXT, max_num_seqs=8)
    expected = by_name(capacities)
    for name in ("auto", "fibquant_2bit", "fibquant_k4v2"):
        made = planned(
            model,
            name,
            CACHE_BYTES,
            max_model_len=CONTEXT,
            block_size=plan.DEFAULT_BLOCK_SIZE,
            max_num_batched_tokens=plan.DEFAULT_BATCHED_TOKENS,
            max_num_seqs=8,
        )
        num_tokens = int(made.max_concurrency * CONTEXT)
        assert (made.num_blocks, num_tokens, made.max_concurrency) == expected[name], name


def test_a_plan_leaves_nothing_to_an_engine_of_the_same_process(model_folder):
    """vLLM shares rotary tables between the models of a process: a plan's have no numbers."""
    from vllm.model_executor.layers.rotary_embedding import _ROPE_DICT

    before = dict(_ROPE_DICT)
    planned(make_model("llama", model_folder), "auto", CACHE_BYTES, max_model_len=CONTEXT)
    assert before == _ROPE_DICT
    assert not any(rope.cos_sin_cache.is_meta for rope in _ROPE_DICT.values())


@pytest.mark.parametrize("shape", quickly(HYBRIDS))
def test_plan_beside_layers_that_keep_a_state(model_folder, shape):
    """There the size of a block follows from that of a state: vLLM is asked."""
    model = make_model(shape, model_folder)
    kv_cache_dtypes = ("fibquant_2bit",) if shape in QUICK else ("auto", "fibquant_4bit")
    found = {}
    for name in kv_cache_dtypes:
        with engine(
            model,
            name,
            fibquant=DEFAULTS,
            dtype="bfloat16",
            max_model_len=CONTEXT,
            max_num_batched_tokens=BATCHED_TOKENS,
            enable_prefix_caching=None,
        ) as llm:
            found[name] = engines_cache(llm)
            generate(llm, varied_prompts(2, VOCAB_SIZE), 2)
    planned_shape, _, capacities = plan.plan_model(
        model,
        CACHE_BYTES,
        CONTEXT,
        block_size=32,
        batched_tokens=BATCHED_TOKENS,
        max_num_seqs=8,
    )
    assert planned_shape.num_states > 0
    expected = by_name(capacities)
    assert found == {name: expected[name] for name in kv_cache_dtypes}
    told = plan.render(planned_shape, CACHE_BYTES, CONTEXT, capacities)
    assert f"beside {planned_shape.num_states} that keep a state" in told


@pytest.mark.parametrize(
    "settings, reason",
    [
        ({"options": {"layers": {"1": "fibquant_4bit"}}}, "layers must all be attention"),
        ({"tensor_parallel_size": 2}, "--tensor-parallel-size must be 1"),
        ({"context": 10**6}, "max_model_len"),
    ],
)
def test_plan_refuses_models_with_states_as_the_engine_does(model_folder, settings, reason):
    model = make_model("lfm2", model_folder)
    with pytest.raises(ValueError, match=reason):
        plan.plan_model(model, CACHE_BYTES, **{"context": CONTEXT, **settings})


@pytest.mark.parametrize(("shape", "share"), [("gemma4", 0.3), ("gemma4-112", 0.3)])
def test_fitting_pages_saves_padding_and_changes_nothing_else(
    model_folder, shape, share, monkeypatch, caplog
):
    model, prompts = make_model(shape, model_folder), varied_prompts(6, VOCAB_SIZE)

    def served():
        with engine(model, "fibquant_2bit") as llm:
            fits = capacity.what_fits(llm.llm_engine.vllm_config, CACHE_BYTES)
            return [answer.bits for answer in generate(llm, prompts)], fits

    answers, fits = served()
    monkeypatch.setattr(compat_pages, "fitted", dict)
    assert "of the cache holds nothing" not in caplog.text
    with caplog.at_level(logging.WARNING):
        expected, padded = served()
    assert answers == expected
    assert fits["stored"].padding < 0.06 < share < padded["stored"].padding
    assert fits["stored"].num_tokens > 1.3 * padded["stored"].num_tokens
    assert capacity.padding_advice(fits, "fibquant_2bit") is None
    told = capacity.padding_advice(padded, "fibquant_2bit")
    assert "of the cache holds nothing; least is wasted with fibquant_1bit" in told
    assert told in caplog.text  # as the start warned
