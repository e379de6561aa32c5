# SPDX-License-Identifier: Apache-2.0
"""A real engine whose prompts' raw new tokens are attended by a library, in the GPU's way: its
chunks, cached prefixes and preempted requests, against the CPU's kernels."""

from __future__ import annotations

import shutil

import pytest
import torch

from tests.engine.harness import engine, generate, largest_difference, num_preemptions
from tests.engine.models import make_model
from tests.engine.test_emulated_gpu import NUM_TOKENS, PROMPTS, SETTINGS, calls  # noqa: F401
from tests.ops.test_raw_states import flash_attn_varlen_func
from vllm_fibquant import ops
from vllm_fibquant.engine import raw_library
from vllm_fibquant.ops import raw_states

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator needs g++")


def test_an_engine_answers_as_with_the_cpu_kernels(model_folder, calls, monkeypatch):  # noqa: F811
    asked: list[int] = []

    def counted(q, *args, **options):
        asked.append(len(q))
        return flash_attn_varlen_func(q, *args, **options)

    library = raw_states.flash_attention(counted, 2)
    monkeypatch.setattr(raw_library, "library_for", lambda head_dim, soft_cap: library)
    # Decodes too, whose kernel needs a GPU, and a model in float32, which shows more.
    monkeypatch.setattr(raw_states, "MIN_NEW_TOKENS", 0)
    monkeypatch.setattr(raw_states, "LIBRARY_DTYPES", (torch.float32,))
    settings = dict(SETTINGS, fibquant={"prefill": "raw", "fidelity_gate": False,
                                        "self_check": False, "calibrate": "none"})  # fmt: skip
    model = make_model("llama-1layer", model_folder)
    with engine(model, "fibquant_2bit", **settings) as llm:
        answers = generate(llm, PROMPTS, NUM_TOKENS)
        again = generate(llm, PROMPTS[:1], NUM_TOKENS)
        assert num_preemptions(llm) > 0
    assert calls["attend"] > 0 and len(asked) == calls["attend"] and max(asked) > 1
    assert again[0].num_cached > 0

    with monkeypatch.context() as as_usual:
        as_usual.setattr(ops, "choose", lambda codec, cache: ops.CPU)
        with engine(model, "fibquant_2bit", **settings) as llm:
            expected = generate(llm, PROMPTS, NUM_TOKENS)
            expected_again = generate(llm, PROMPTS[:1], NUM_TOKENS)
    other_tokens, _, difference = largest_difference(answers + again, expected + expected_again)
    assert other_tokens == 0 and difference < 2e-2
