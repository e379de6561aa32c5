# SPDX-License-Identifier: Apache-2.0
"""Layers with a preset of their own: what they store, and what the engine answers."""

from __future__ import annotations

import pytest
import torch

from vllm_fibquant.cli import plan
from vllm_fibquant.cli.shape import read_config, shape_of
from vllm_fibquant.codec.config import PRESETS
from vllm_fibquant.codec.layout import preset_layout
from vllm_fibquant.engine import measure
from vllm_fibquant.engine.report import worker_report

from .harness import cache_tensors, engine, generate, in_batches, random_text, varied_prompts
from .models import VOCAB_SIZE, make_model
from .test_exactness import assert_exact, run_everything

LOW, HIGH = "fibquant_1bit", "fibquant_4bit"
BYTES = {name: preset_layout(PRESETS[name], 64).record_bytes for name in (LOW, HIGH)}
SOME = {"layers": {"0,2-3": HIGH}}
PRESET_OF = (HIGH, LOW, HIGH, HIGH)


@pytest.fixture(scope="module")
def model(model_folder):
    return make_model("llama-4layers", model_folder)


def bits(answers) -> list:
    return [answer.bits for answer in answers]


def caches_by_layer(llm) -> list[torch.Tensor]:
    """The cache of each layer, in order of their numbers."""
    context = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    return [context[f"model.layers.{n}.self_attn.attn"].kv_cache for n in range(len(context))]


def prompt_logprobs(llm, prompts) -> torch.Tensor:
    """Log-probability of every prompt token but the first of each prompt."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = llm.generate(inputs, params, use_tqdm=False)
    return torch.tensor(
        [
            step[token].logprob
            for output in outputs
            for step, token in zip(
                output.prompt_logprobs[1:], output.prompt_token_ids[1:], strict=True
            )
        ]
    )


def test_every_layer_has_its_own_pages(model):
    memory = 8 << 20
    with engine(model, LOW, fibquant=SOME, kv_cache_memory_bytes=memory) as llm:
        caches = caches_by_layer(llm)
        config = llm.llm_engine.vllm_config
        report = worker_report(config)
        found = config.cache_config.num_gpu_blocks, config.cache_config.kv_cache_size_tokens
    page_bytes = [2 * 32 * BYTES[name] for name in PRESET_OF]
    num_blocks = memory // sum(page_bytes)
    assert [tuple(cache.shape) for cache in caches] == [
        (num_blocks, 2, 32, BYTES[name]) for name in PRESET_OF
    ]
    spans = sorted((c.data_ptr(), c.data_ptr() + c.numel()) for c in caches)
    assert all(end <= begin for (_, end), (begin, _) in zip(spans, spans[1:], strict=False))
    assert report["token_bytes"]["stored"] == sum(page_bytes) // 32
    assert report["num_coded_layers"] == 4
    assert {code["preset"]: code["record_bytes"] for code in report["codes"]} == BYTES
    presets = tuple(enumerate(PRESET_OF))
    capacities = plan.plan_capacities(
        shape_of(model, read_config(model)), memory, 512, block_size=32, layer_presets=presets
    )
    planned = next(c for c in capacities if c.kv_cache_dtype == LOW)
    assert found == (num_blocks, planned.num_tokens)
    assert planned.num_blocks == num_blocks


def test_nothing_else_matters(model):
    """Prefix cache, chunks, batches and preemption, as with one preset."""
    prompts = varied_prompts(24, VOCAB_SIZE)
    assert_exact(run_everything(model, LOW, prompts, 2, fibquant=SOME))


def test_quality_lies_between_the_presets(model):
    prompts = varied_prompts(12, VOCAB_SIZE, longest=300, shortest=100)
    found = {}
    for name, preset, fibquant in (
        ("exact", "auto", None), ("low", LOW, {}), ("some", LOW, SOME), ("high", HIGH, {}),
    ):  # fmt: skip
        with engine(model, preset, fibquant=fibquant) as llm:
            found[name] = prompt_logprobs(llm, prompts)
    error = {n: float((x - found["exact"]).abs().mean()) for n, x in found.items()}
    print(f"\nmean error of log-probabilities: {error}")
    assert error["high"] < error["some"] < 0.95 * error["low"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mode": "quality"},
        {"retain": {"recent": 64}},
        {"calibrate": "transform"},
        {"monitor": True},
    ],
    ids=lambda options: ", ".join(options) or "plain",
)
def test_all_layers_named_is_the_other_preset(model, options, tmp_path, monkeypatch):
    """With every option that works layer by layer."""
    monkeypatch.setenv("FIBQUANT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(measure, "text_sequences", random_text)
    prompts = varied_prompts(10, VOCAB_SIZE, longest=300)
    answers = []
    runs = [(HIGH, {}), (LOW, {"layers": {"0-3": HIGH}})]
    # That one layer less would show does not hang on the other options.
    runs += [] if options else [(LOW, SOME)]
    for preset, layers in runs:
        with engine(model, preset, fibquant={**options, **layers}) as llm:
            answers.append(bits(in_batches(llm, prompts, 4)))
    assert answers[0] == answers[1]
    assert answers[0] not in answers[2:]


@pytest.mark.parametrize("mode", ["exact", "quality"])
def test_two_names_of_one_preset_are_the_same(model, mode):
    """Two groups of layers, each with its own metadata and pool of copies, of the same codes."""
    prompts = varied_prompts(10, VOCAB_SIZE, longest=300)
    answers = []
    for layers in ({}, {"layers": {"0,2": "fibquant_3bit"}}):
        with engine(model, "fibquant", fibquant={"mode": mode, **layers}) as llm:
            answers.append(bits(in_batches(llm, prompts, 4)))
    assert answers[0] == answers[1]


def test_with_skipped_layers(model):
    with engine(model, LOW, fibquant=SOME, kv_cache_dtype_skip_layers=["1"]) as llm:
        found = [(cache.dtype, cache.shape[-1]) for cache in caches_by_layer(llm)]
        assert generate(llm, varied_prompts(1, VOCAB_SIZE), 4)
    high = (torch.uint8, BYTES[HIGH])
    assert found == [high, (torch.float32, 2 * 64), high, high]


def test_a_window_on_every_layer(model_folder):
    prompts = varied_prompts(16, VOCAB_SIZE, seed=1)
    answers = run_everything(
        make_model("mistral", model_folder), LOW, prompts, 3, fibquant={"layers": {"1": HIGH}}
    )
    assert_exact(answers)


def test_mixed_windows_without_the_hybrid_manager(model_folder):
    settings = {"fibquant": {"layers": {"5": "fibquant_4bit"}}}
    model = make_model("gemma3", model_folder)
    with engine(model, "fibquant_2bit", disable_hybrid_kv_cache_manager=True, **settings) as llm:
        sizes = sorted(cache.shape[-1] for cache in cache_tensors(llm))
        answers = in_batches(llm, varied_prompts(8, VOCAB_SIZE), 4)
    assert sizes == [132] * 5 + [260]
    assert all(len(answer.tokens) == 4 for answer in answers)
