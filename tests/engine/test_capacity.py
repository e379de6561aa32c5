# SPDX-License-Identifier: Apache-2.0
"""`vllm-fibquant plan` says what a running engine says."""

from __future__ import annotations

import pytest

from vllm_fibquant.cli import plan
from vllm_fibquant.cli.shape import load_shape
from vllm_fibquant.codec.config import PRESETS
from vllm_fibquant.engine import capacity, compat_pages

from .harness import engine, generate, varied_prompts
from .models import VOCAB_SIZE, make_model

CONTEXT = 500
BATCHED_TOKENS = 512
CACHE_BYTES = 64 << 20


@pytest.mark.parametrize(
    "shape, kv_cache_dtype, skip_layers",
    [
        ("llama", "fibquant_2bit", ()),
        ("llama", "fibquant_1bit", ("1",)),
        ("gemma3", "auto", ()),
        ("gemma3", "fibquant", ()),
        ("gemma3", "fibquant_2bit", ("0",)),
        ("gemma3", "fibquant_2bit", ("sliding_window",)),
        ("gemma2", "fibquant_1bit", ()),
        ("gemma4", "auto", ()),
        ("gemma4", "fibquant_2bit", ()),
        ("gemma4-112", "fibquant_2bit", ()),
        ("gpt-oss", "fibquant_2bit", ()),
        ("granite", "fibquant", ()),
        ("mistral", "fibquant_2bit", ()),
        ("olmo2", "fibquant_4bit", ()),
        ("qwen2", "fibquant_2bit", ()),
        ("qwen3", "fibquant_k4v2", ()),
        ("qwen3-moe", "fibquant_3bit", ()),
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
        cache = llm.llm_engine.vllm_config.cache_config
        found = (cache.num_gpu_blocks, cache.kv_cache_size_tokens, cache.kv_cache_max_concurrency)
    capacities = plan.plan_capacities(
        load_shape(model),
        cache.kv_cache_memory_bytes,
        CONTEXT,
        block_size=64,
        skip_layers=skip_layers,
        batched_tokens=BATCHED_TOKENS,
    )
    name = "bf16" if kv_cache_dtype == "auto" else kv_cache_dtype
    planned = next(c for c in capacities if c.kv_cache_dtype == name)
    assert found == (planned.num_blocks, planned.num_tokens, planned.max_concurrency)
    # What a server says of itself, beside 16 bits and every other preset.
    assert fits["stored"].num_tokens == planned.num_tokens
    if not skip_layers:
        expected = {c.kv_cache_dtype: c.num_tokens for c in capacities}
        assert fits["16bit"].num_tokens == expected["bf16"]
        if kv_cache_dtype != "auto":
            told = {n: fit.num_tokens for n, fit in fits.items() if n in PRESETS}
            assert told == {n: expected[n] for n in PRESETS if n in expected}


@pytest.mark.parametrize(("shape", "share"), [("gemma4", 0.3), ("gemma4-112", 0.3)])
def test_fitting_pages_saves_padding_and_changes_nothing_else(
    model_folder, shape, share, monkeypatch
):
    model, prompts = make_model(shape, model_folder), varied_prompts(6, VOCAB_SIZE)

    def served():
        with engine(model, "fibquant_2bit") as llm:
            fits = capacity.what_fits(llm.llm_engine.vllm_config, CACHE_BYTES)
            return [answer.bits for answer in generate(llm, prompts)], fits

    answers, fits = served()
    monkeypatch.setattr(compat_pages, "fitted", dict)
    expected, padded = served()
    assert answers == expected
    assert fits["stored"].padding < 0.06 < share < padded["stored"].padding
    assert fits["stored"].num_tokens > 1.3 * padded["stored"].num_tokens
    assert capacity.padding_advice(fits, "fibquant_2bit") is None
    told = capacity.padding_advice(padded, "fibquant_2bit")
    assert "of the cache holds nothing; least is wasted with fibquant_1bit" in told


def test_plan_refuses_what_the_engine_refuses(model_folder):
    """Layers that share another layer's cache are refused when they are built."""
    model = make_model("gemma4-shared", model_folder)
    with pytest.raises(ValueError, match="must each have a KV cache, got 3"):
        load_shape(model)
    with (
        pytest.raises(ValueError, match="must each have a KV cache, got one that shares"),
        engine(model, "fibquant_4bit"),
    ):
        pass
