# SPDX-License-Identifier: Apache-2.0
"""vLLM features that touch the cache."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vllm_fibquant.codec.config import PRESETS
from vllm_fibquant.codec.layout import preset_layout

from .harness import cache_tensors, engine, generate, in_batches, one_by_one, varied_prompts
from .models import VOCAB_SIZE, make_model

pytestmark = pytest.mark.versions


def num_tokens_of_cache(llm) -> int:
    return llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens


def bits(answers) -> list:
    return [answer.bits for answer in answers]


def test_capacity_grows_by_exactly_the_byte_ratio(model_folder):
    model = make_model("llama", model_folder)
    memory = {"dtype": "bfloat16", "kv_cache_memory_bytes": 1 << 30}
    dense_bytes = 2 * 64 * 2  # K and V, head_dim 64, bfloat16
    budget = 2**30 // 2 // 2  # 1 GiB over 2 layers and 2 KV heads
    with engine(model, "auto", **memory) as llm:
        stock = num_tokens_of_cache(llm)
    assert stock == budget // (32 * dense_bytes) * 32
    for preset in ("fibquant", "fibquant_2bit"):
        record_bytes = preset_layout(PRESETS[preset], 64).record_bytes
        with engine(model, preset, **memory) as llm:
            ours = num_tokens_of_cache(llm)
            shapes = {tuple(cache.shape[1:]) for cache in cache_tensors(llm)}
        assert shapes == {(2, 32, record_bytes)}
        assert ours == budget // (32 * record_bytes) * 32
    assert ours >= 7.0 * stock


def test_skipped_layers_keep_their_dtype(model_folder):
    prompts = varied_prompts(8, VOCAB_SIZE)
    model = make_model("llama", model_folder)
    with engine(model, "fibquant_2bit", kv_cache_dtype_skip_layers=["0"]) as llm:
        dtypes = sorted(str(cache.dtype) for cache in cache_tensors(llm))
        some = in_batches(llm, prompts, 4)
    assert dtypes == ["torch.float32", "torch.uint8"]
    with engine(model, "fibquant_2bit", kv_cache_dtype_skip_layers=["0", "1"]) as llm:
        none_left = in_batches(llm, prompts, 4)
    with engine(model, "auto") as llm:
        stock = in_batches(llm, prompts, 4)
    with engine(model, "fibquant_2bit") as llm:
        every = in_batches(llm, prompts, 4)
    assert [a.tokens for a in none_left] == [a.tokens for a in stock]
    assert bits(some) != bits(every)


@pytest.mark.parametrize("shape", [pytest.param("gemma2", marks=pytest.mark.slow), "gemma3"])
def test_skipping_sliding_window_layers(model_folder, shape):
    prompts = varied_prompts(8, VOCAB_SIZE)
    model = make_model(shape, model_folder)
    with engine(model, "fibquant_4bit", kv_cache_dtype_skip_layers=["sliding_window"]) as llm:
        assert {cache.dtype for cache in cache_tensors(llm)} == {torch.uint8, torch.float32}
        assert all(len(answer.tokens) == 4 for answer in in_batches(llm, prompts, 4))


def test_hybrid_manager_does_not_matter(model_folder):
    prompts = varied_prompts(8, VOCAB_SIZE)
    model = make_model("gemma3", model_folder)
    answers = []
    for disabled in (False, True):
        with engine(model, "fibquant_3bit", disable_hybrid_kv_cache_manager=disabled) as llm:
            answers.append(bits(in_batches(llm, prompts, 4)))
    assert answers[0] == answers[1]


def check_ngram_speculation(model: str) -> None:
    # Repetitive prompts, so that n-grams are found and drafts are accepted now and then.
    prompts = [(prompt[:20] * 4)[:80] for prompt in varied_prompts(12, VOCAB_SIZE, longest=40)]
    with engine(model, "fibquant_2bit") as llm:
        plain = one_by_one(llm, prompts, 16)
    speculation = {
        "method": "ngram",
        "num_speculative_tokens": 3,
        "prompt_lookup_max": 3,
        "prompt_lookup_min": 1,
    }
    with engine(model, "fibquant_2bit", speculative_config=speculation) as llm:
        drafted = one_by_one(llm, prompts, 16)
        metrics = {m.name: m for m in llm.get_metrics()}
        assert metrics["vllm:spec_decode_num_draft_tokens"].value > 0
    assert bits(plain) == bits(drafted)


def test_ngram_speculation_does_not_matter(model_folder):
    """Verification rows read the same codes as decode rows: same tokens, same bits.

    In a process of its own: after an n-gram drafter vLLM 0.32.0 cannot start a second engine in
    the same process (its search for Triton kernels trips over a cffi object).
    """
    model = make_model("llama", model_folder)
    code = f"from engine.test_features import check_ngram_speculation as f; f({model!r})"
    tests = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tests, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_options_change_what_is_stored(model_folder):
    """Two engines in one process with the same preset and other options do not mix them up."""
    prompts = varied_prompts(8, VOCAB_SIZE)
    model = make_model("llama", model_folder)
    finer_values = {"value": {"subvec_dim": 2, "storage": "float16"}}
    options = [{}, {"key": {"gain": "norm"}}, {"rotation_seed": 7}, finer_values]
    answers, sizes = [], []
    for option in [*options, {}]:
        with engine(model, "fibquant_2bit", fibquant=option) as llm:
            sizes.append(cache_tensors(llm)[0].shape[-1])
            answers.append(bits(in_batches(llm, prompts, 4)))
    assert answers[0] == answers[-1]
    assert all(other != answers[0] for other in answers[1:-1])
    assert sizes == [36, 36, 36, 52, 36]


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_other_dtypes(model_folder, dtype):
    prompts = varied_prompts(8, VOCAB_SIZE, longest=40)
    model = make_model("llama", model_folder)
    with engine(model, "fibquant_4bit", dtype=dtype) as llm:
        assert all(len(answer.tokens) == 4 for answer in in_batches(llm, prompts, 4))


def test_non_finite_keys_are_counted_and_do_not_spread(model_folder, monkeypatch):
    from vllm_fibquant.engine import attention, non_finite

    prompts = varied_prompts(2, VOCAB_SIZE, longest=60)
    model = make_model("llama", model_folder)
    with engine(model, "fibquant_4bit") as llm:
        expected = generate(llm, prompts[:1], 4)
        before = non_finite.counter.total
        update = attention.FibQuantImpl.do_kv_cache_update

        def poisoned(self, layer, key, value, kv_cache, slot_mapping):
            update(self, layer, torch.full_like(key, float("nan")), value, kv_cache, slot_mapping)

        monkeypatch.setattr(attention.FibQuantImpl, "do_kv_cache_update", poisoned)
        generate(llm, prompts[1:], 4)
        assert non_finite.counter.total > before
        monkeypatch.undo()
        assert bits(generate(llm, prompts[:1], 4)) == bits(expected)


def test_structured_output(model_folder):
    """Masks are of tokens, after attention: the answer keeps to them."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    model, prompts = make_model("llama", model_folder), varied_prompts(4, VOCAB_SIZE)
    params = SamplingParams(
        temperature=0, max_tokens=3,
        structured_outputs=StructuredOutputsParams(choice=["w5w7w8", "w6w9w2"]),
    )  # fmt: skip
    with engine(model, "fibquant_2bit", skip_tokenizer_init=False) as llm:
        given = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        answers = [list(o.outputs[0].token_ids) for o in llm.generate(given, params)]
    assert all(answer in ([5, 7, 8], [6, 9, 2]) for answer in answers), answers


def test_kv_events_are_stock_vllms(model_folder):
    """Which blocks are stored and removed follows from tokens alone."""
    from vllm.config import KVEventsConfig

    model, prompts = make_model("llama", model_folder), varied_prompts(6, VOCAB_SIZE)
    told = {}
    for name in ("auto", "fibquant_2bit"):
        events: list = []
        with engine(
            model, name, enable_prefix_caching=True,
            kv_events_config=KVEventsConfig(enable_kv_cache_events=True, publisher="null"),
        ) as llm:  # fmt: skip
            scheduler = llm.llm_engine.engine_core.engine_core.scheduler
            scheduler.kv_event_publisher.publish = lambda batch, to=events: to.extend(batch.events)
            generate(llm, prompts, 1)
            llm.reset_prefix_cache()
            generate(llm, prompts[:1], 1)
        told[name] = [(type(e).__name__, getattr(e, "token_ids", None)) for e in events]
    assert told["auto"] == told["fibquant_2bit"]
    assert {kind for kind, _ in told["auto"]} == {"BlockStored", "AllBlocksCleared"}
