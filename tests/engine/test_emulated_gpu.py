# SPDX-License-Identifier: Apache-2.0
"""Real engines whose attention layers take the GPU's door: the CUDA kernels, emulated.

They show that the kernels understand what vLLM hands out (block tables, slots, chunked prompts,
cached prefixes, preempted requests) with a calibration's means and transform, biases of key
projections, and layers with presets of their own.
"""

from __future__ import annotations

import shutil
import statistics

import pytest

from tests import emulated as emu
from tests.engine.harness import engine, generate, num_preemptions, random_text
from tests.engine.models import make_model
from vllm_fibquant import ops
from vllm_fibquant.engine import measure
from vllm_fibquant.ops.cuda import Cuda

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator needs g++")

# Just enough tokens for two chunks, a shared block and a cache too small for both requests.
PROMPTS = [list(range(2, 42)), [*range(2, 34), 7, 5, 3]]
NUM_TOKENS = 23
SETTINGS = {
    "block_size": 16,
    "enable_prefix_caching": True,
    "max_model_len": 64,
    "max_num_batched_tokens": 24,
    "max_num_seqs": 2,
    "num_gpu_blocks_override": 6,
}
CASES = {
    "transform": ("llama-1layer", "fibquant_3bit", {"calibrate": "transform"}),
    "means": ("llama-1layer", "fibquant_2bit", {"calibrate": "means"}),
    "bias": ("qwen2", "fibquant_4bit", {}),
    "layers": ("llama", "fibquant_2bit", {"layers": {"0": "fibquant_4bit"}}),
}


@pytest.fixture
def calls(monkeypatch) -> dict[str, int]:
    """Sends CPU tensors to the emulated library; counts what went there, mapped or not."""
    counts = {"encode": 0, "attend": 0, "mapped": 0}

    class Counted(Cuda):
        def encode_kv(self, key, value, slot_mapping, pages, positions=None):
            counts["encode"] += 1
            return super().encode_kv(key, value, slot_mapping, pages, positions)

        def paged_attention(self, query, out, pages, batch, attend, fresh=None):
            counts["attend"] += 1
            counts["mapped"] += pages.key_map is not None
            super().paged_attention(query, out, pages, batch, attend, fresh)

    served, choose = Counted(emu.emulated()), ops.choose

    def door(codec, cache):
        # What reads a text before there are pages has none to be served from.
        return choose(codec, cache) if cache.shape[0] == 1 else served

    monkeypatch.setattr(ops, "choose", door)
    return counts


@pytest.mark.parametrize("name", CASES)
def test_an_engine_answers_as_with_the_cpu_kernels(
    name, model_folder, calls, monkeypatch, tmp_path
):
    shape, preset, options = CASES[name]
    monkeypatch.setenv("FIBQUANT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(measure, "text_sequences", random_text)
    # The self-check refuses float32, which shows more of what differs.
    unchecked = {"fidelity_gate": False, "self_check": False}
    settings = dict(SETTINGS, fibquant={**options, **unchecked})
    model = make_model(shape, model_folder)
    with engine(model, preset, **settings) as llm:
        answers = generate(llm, PROMPTS, NUM_TOKENS)
        again = generate(llm, PROMPTS[:1], NUM_TOKENS)
        assert num_preemptions(llm) > 0
    assert calls["encode"] > 0 and calls["attend"] > 0
    assert calls["mapped"] == (0 if name == "layers" else calls["attend"])
    assert again[0].num_cached > 0

    with monkeypatch.context() as as_usual:
        as_usual.setattr(ops, "choose", lambda codec, cache: ops.CPU)
        with engine(model, preset, **settings) as llm:
            expected = generate(llm, PROMPTS, NUM_TOKENS)
            expected_again = generate(llm, PROMPTS[:1], NUM_TOKENS)
    # Queries are read as float16, and so are means that turn, which a bias makes long. Once in a
    # while that makes another code of a key in a later layer, and then another token.
    differences = []
    for got, wanted in zip(answers + again, expected + expected_again, strict=True):
        alike = [a == b for a, b in zip(got.tokens, wanted.tokens, strict=True)]
        num_same = (alike + [False]).index(False)
        differences += [
            abs(a - b) for a, b in zip(got.logprobs[:num_same], wanted.logprobs, strict=False)
        ]
    assert len(differences) > NUM_TOKENS
    assert statistics.median(differences) < (5e-2 if name == "bias" else 1e-2)
