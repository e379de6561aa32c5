# SPDX-License-Identifier: Apache-2.0
"""A real engine whose attention layers take the GPU's door: the Triton kernels, interpreted.

Not collected by name: tests/engine/test_gpu_path.py runs this file in a process of its own, because
Triton decides when it is imported whether it interprets. It shows that the kernels understand what
vLLM hands out: block tables, slots, chunked prompts, cached prefixes, preempted requests.
"""

from __future__ import annotations

import pytest
import torch

from tests.engine.harness import engine, generate, largest_difference, num_preemptions
from tests.engine.models import make_model
from vllm_fibquant import ops
from vllm_fibquant.ops import gpu

# Interpreted, a token costs a second: just enough of them for two chunks, a shared block and a
# cache too small for both requests.
PROMPTS = [list(range(2, 26)), [*range(2, 18), 7, 5, 3]]
NUM_TOKENS = 16
SETTINGS = {
    "block_size": 16,
    "enable_prefix_caching": True,
    "max_model_len": 48,
    "max_num_batched_tokens": 16,
    "max_num_seqs": 2,
    "num_gpu_blocks_override": 5,
}


@pytest.fixture
def gpu_door(monkeypatch):
    """Sends CPU tensors to the Triton kernels; counts what went there."""
    calls = {"encode": 0, "attend": 0}

    class Counted(gpu.Triton):
        def encode_kv(self, *args):
            calls["encode"] += 1
            return super().encode_kv(*args)

        def paged_attention(self, *args):
            calls["attend"] += 1
            super().paged_attention(*args)

    triton = Counted()
    monkeypatch.setattr(ops, "choose", lambda codec, cache: triton)
    return calls


@pytest.mark.parametrize("prefill", ["codes", "raw"])
def test_an_engine_answers_as_with_the_cpu_kernels(model_folder, gpu_door, monkeypatch, prefill):
    settings = dict(SETTINGS, fibquant={"prefill": prefill, "self_check": prefill == "codes"})
    model = make_model("llama-1layer", model_folder)
    with engine(model, "fibquant_2bit", **settings) as llm:
        answers = generate(llm, PROMPTS, NUM_TOKENS)
        again = generate(llm, PROMPTS[:1], NUM_TOKENS)
        assert num_preemptions(llm) > 0
    assert gpu_door["encode"] > 0 and gpu_door["attend"] > 0
    assert again[0].num_cached > 0

    monkeypatch.undo()
    with engine(model, "fibquant_2bit", **settings) as llm:
        expected = generate(llm, PROMPTS, NUM_TOKENS)
        expected_again = generate(llm, PROMPTS[:1], NUM_TOKENS)
    other_tokens, _, difference = largest_difference(answers + again, expected + expected_again)
    assert other_tokens == 0
    assert difference < 1e-3
    assert torch.isfinite(torch.tensor([answer.logprobs for answer in answers])).all()
