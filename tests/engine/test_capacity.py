# SPDX-License-Identifier: Apache-2.0
"""`vllm-fibquant plan` says what a running engine says."""

from __future__ import annotations

import pytest

from vllm_fibquant.cli import plan

from .harness import engine
from .models import make_model

CONTEXT = 500
BATCHED_TOKENS = 512


@pytest.mark.parametrize(
    "shape, kv_cache_dtype, skip_layers",
    [
        ("llama", "fibquant_2bit", ()),
        ("llama", "fibquant_1bit", ("1",)),
        ("gemma3", "auto", ()),
        ("gemma3", "fibquant", ()),
        ("gemma3", "fibquant_2bit", ("0",)),
        ("gemma3", "fibquant_2bit", ("sliding_window",)),
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
        cache = llm.llm_engine.vllm_config.cache_config
        found = (cache.num_gpu_blocks, cache.kv_cache_size_tokens, cache.kv_cache_max_concurrency)
    capacities = plan.plan_capacities(
        plan.load_shape(model),
        cache.kv_cache_memory_bytes,
        CONTEXT,
        block_size=64,
        skip_layers=skip_layers,
        batched_tokens=BATCHED_TOKENS,
    )
    name = "bf16" if kv_cache_dtype == "auto" else kv_cache_dtype
    planned = next(c for c in capacities if c.kv_cache_dtype == name)
    assert found == (planned.num_blocks, planned.num_tokens, planned.max_concurrency)
