# SPDX-License-Identifier: Apache-2.0
"""Switches of vLLM's engine that must not change what the cache gives back."""

from __future__ import annotations

from .architectures import VOCAB_SIZE
from .harness import engine, generate, one_by_one, varied_prompts
from .models import make_model


def bits(answers) -> list:
    return [answer.bits for answer in answers]


def test_asynchronous_scheduling_is_off_on_cpus(model_folder):
    """vLLM turns it off there; asked for, answers are the same bit for bit."""
    model, prompts = make_model("llama", model_folder), varied_prompts(6, VOCAB_SIZE)
    with engine(model, "fibquant_2bit") as llm:
        expected = bits(generate(llm, prompts))
    with engine(model, "fibquant_2bit", async_scheduling=True) as llm:
        assert not llm.llm_engine.vllm_config.scheduler_config.async_scheduling
        assert bits(generate(llm, prompts)) == expected


def test_sleep_loses_nothing(model_folder):
    """vLLM's CPU workers ignore it: pages are where they were, and prefixes are found again."""
    model, prompts = make_model("llama", model_folder), varied_prompts(6, VOCAB_SIZE)
    with engine(model, "fibquant_2bit", enable_prefix_caching=True) as llm:
        expected = bits(one_by_one(llm, prompts))
        llm.sleep(level=1)
        llm.wake_up()
        found = one_by_one(llm, prompts)
    assert bits(found) == expected
    assert any(answer.num_cached for answer in found)
