# SPDX-License-Identifier: Apache-2.0
"""Chunked local attention (Llama 4): requests of several chunks, whose oldest pages vLLM frees.

What they answer beside `auto` is in test_models.py.
"""

from __future__ import annotations

from vllm_fibquant.engine.layers import our_layers

from .harness import engine, generate, varied_prompts
from .models import VOCAB_SIZE, make_model

CHUNK = 128


def attends_of(llm) -> list:
    """How each layer attends."""
    return [layer.attend for layer in our_layers(llm.llm_engine.vllm_config).values()]


def test_steps_and_cached_prefixes_do_not_matter(model_folder):
    """Chunks begin where the request's positions say, however it is cut into steps, and are found
    again by the prefix cache; the tokens before them are forgotten."""
    model = make_model("llama4", model_folder)
    prompts = varied_prompts(6, VOCAB_SIZE, longest=300, shortest=100)
    answers = []
    for settings in (
        {"max_num_batched_tokens": 2048},
        {"max_num_batched_tokens": 96},
        {"max_num_batched_tokens": 2048, "enable_prefix_caching": True},
    ):
        with engine(model, "fibquant_2bit", **settings) as llm:
            assert sorted(attend.chunk for attend in attends_of(llm)) == [0, CHUNK]
            answers.append(generate(llm, prompts, 4))
            if "enable_prefix_caching" in settings:
                answers.append(generate(llm, prompts, 4))
    assert any(answer.num_cached >= CHUNK for answer in answers[-1])
    assert all([a.bits for a in x] == [a.bits for a in answers[0]] for x in answers)


def test_a_limit_of_one_chunk_needs_no_mask(model_folder):
    """Nor what it costs."""
    model = make_model("llama4", model_folder)
    with engine(model, "fibquant_2bit", max_model_len=CHUNK) as llm:
        assert not any("chunk" in attend.asked for attend in attends_of(llm))
