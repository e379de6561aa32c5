# SPDX-License-Identifier: Apache-2.0
"""The recent window in the engine: copies are found, are counted, and never lie."""

from __future__ import annotations

import pytest

from vllm_fibquant.engine import layers

from .harness import (
    engine,
    generate,
    in_batches,
    largest_difference,
    num_preemptions,
    one_by_one,
    varied_prompts,
)
from .models import VOCAB_SIZE, make_model

pytestmark = pytest.mark.versions

QUALITY = {"mode": "quality"}
ALL = {**QUALITY, "recent_window": 256}  # longer than any prompt and answer here


@pytest.fixture(autouse=True)
def copies_in_float32(monkeypatch):
    """A float32 model's copies are bfloat16; without that rounding answers can be compared."""
    monkeypatch.setattr(layers, "copy_dtype", lambda model_dtype: model_dtype)


@pytest.fixture(scope="module")
def model(model_folder):
    return make_model("llama", model_folder)


@pytest.fixture(scope="module")
def stock(model):
    prompts = varied_prompts(12, VOCAB_SIZE, longest=120)
    with engine(model, "auto") as llm:
        return prompts, in_batches(llm, prompts, 40)


def test_a_window_over_everything_is_stock_attention(model, stock):
    """One bit per coordinate says little: copies that were missing or wrong would show."""
    prompts, expected = stock
    with engine(model, "fibquant_1bit", fibquant=ALL) as llm:
        answers = in_batches(llm, prompts, 40)
    with engine(model, "fibquant_1bit", fibquant={"prefill": "raw"}) as llm:
        without = in_batches(llm, prompts, 40)
    assert largest_difference(expected, answers)[2] < 1e-3
    assert largest_difference(expected, answers)[0] == 0
    assert largest_difference(expected, without)[0] > 6, "codes alone would do"


@pytest.mark.parametrize(
    "settings",
    [
        {"enable_prefix_caching": True, "max_num_seqs": 32, "kv_cache_memory_bytes": 256 << 20},
        {"max_num_batched_tokens": 48, "max_model_len": 512},
        {"num_gpu_blocks_override": 17},
    ],
    ids=["prefix caching", "chunked prefill", "preemption"],
)
def test_the_same_under_every_schedule(model, stock, settings):
    prompts, expected = stock
    # A block shared in the very step that writes it has no copies yet: one request at a time.
    run = one_by_one if "enable_prefix_caching" in settings else in_batches
    with engine(model, "fibquant_1bit", fibquant=ALL, **settings) as llm:
        answers = run(llm, prompts, 40)
        if "num_gpu_blocks_override" in settings:
            assert num_preemptions(llm) > 0
        if "enable_prefix_caching" in settings:
            again = run(llm, prompts, 40)
            assert sum(answer.num_cached for answer in again) > 0
            assert largest_difference(expected, again)[0] == 0
    assert largest_difference(expected, answers)[0] == 0


def test_a_small_window_is_better_than_none(model, stock):
    prompts, expected = stock
    other = {}
    for window in (0, 32):
        options = {"prefill": "raw", "recent_window": window}
        with engine(model, "fibquant_2bit", fibquant=options) as llm:
            other[window] = largest_difference(expected, in_batches(llm, prompts, 40))[0]
    assert 0 < other[32] < other[0]


def test_alone_or_in_a_crowd(model):
    """With rows for every request, others in the batch change nothing."""
    prompts = varied_prompts(16, VOCAB_SIZE, longest=100)
    with engine(model, "fibquant_2bit", fibquant=QUALITY) as llm:
        alone = one_by_one(llm, prompts, 24)
        crowd = in_batches(llm, prompts, 24)
    assert largest_difference(alone, crowd)[1] == 0


def test_copies_are_counted(model):
    """Pages and copies together take what was given, and copies at most a tenth."""
    prompt = varied_prompts(1, VOCAB_SIZE)[0]
    blocks = {}
    for name, options in (("without", None), ("with", QUALITY)):
        with engine(model, "fibquant_2bit", fibquant=options) as llm:
            blocks[name] = llm.llm_engine.vllm_config.cache_config.num_gpu_blocks
            context = llm.llm_engine.vllm_config.compilation_config.static_forward_context
            layers = [layer for layer in context.values() if hasattr(layer, "impl")]
            page_bytes = sum(layer.kv_cache[0].numel() for layer in layers)
            copies = [c.key for layer in layers if (c := layer.impl.attend.copies)]
            copied = sum(2 * c.numel() * c.element_size() for c in copies)
            generate(llm, [prompt], 2)
    assert 0 < copied <= 0.1 * (64 << 20)
    taken = (blocks["without"] - blocks["with"]) * page_bytes
    assert abs(taken - copied) <= page_bytes


def test_connectors_are_refused(model):
    """Pages written by others leave copies of what was there before."""
    from vllm.config import KVTransferConfig

    transfer = KVTransferConfig(kv_connector="ExampleConnector", kv_role="kv_both")
    with (
        pytest.raises(ValueError, match="recent_window"),
        engine(model, "fibquant_2bit", fibquant=QUALITY, kv_transfer_config=transfer),
    ):
        pass
