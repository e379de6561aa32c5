# SPDX-License-Identifier: Apache-2.0
"""Real engines whose attention layers take the GPU's door: the CUDA kernels, emulated.

They show that the kernels understand what vLLM hands out (block tables, slots, chunked prompts,
cached prefixes, preempted requests) with a calibration's means and transform, biases of key
projections, layers with presets of their own, and mode quality with the pool of copies of a GPU.
"""

from __future__ import annotations

import shutil
import statistics

import pytest
import torch

from tests import emulated as emu
from tests.engine.harness import (
    engine,
    generate,
    num_preemptions,
    random_text,
)
from tests.engine.models import make_model
from tests.engine.test_monitor import Findings
from vllm_fibquant import ops
from vllm_fibquant.engine import backend, device_pool, gate, layers, measure, monitored
from vllm_fibquant.observe.ledger import HEALTHY, UNKNOWN, Ledger
from vllm_fibquant.ops import raw_states
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
NUM_ROWS = 4096
"""Of copies: enough that none is lost, whose row another token takes."""
CASES = {
    "transform": ("llama-1layer", "fibquant_3bit", {"calibrate": "transform"}),
    "means": ("llama-1layer", "fibquant_2bit", {"calibrate": "means"}),
    "bias": ("qwen2", "fibquant_4bit", {}),
    "layers": ("llama", "fibquant_2bit", {"layers": {"0": "fibquant_4bit"}}),
    "quality": (
        "llama-1layer",
        "fibquant_3bit",
        {"mode": "quality", "recent_window": 24, "calibrate": "transform"},
    ),
}


@pytest.fixture
def calls(monkeypatch) -> dict[str, int]:
    """Sends CPU tensors to the emulated library, by vLLM's two operators of a GPU, encode and
    attend; counts what went there, mapped or not."""
    counts = {"encode": 0, "attend": 0, "mapped": 0, "copies": 0}

    class Counted(Cuda):
        def encode_kv(self, key, value, slot_mapping, pages, positions=None, copied=None):
            counts["encode"] += 1
            return super().encode_kv(key, value, slot_mapping, pages, positions, copied)

        def paged_attention(self, query, out, pages, batch, attend, fresh=None):
            counts["attend"] += 1
            counts["mapped"] += pages.key_map is not None
            if batch.copy_table is not None:
                counts["copies"] += int((batch.copy_table >= 0).sum())
            super().paged_attention(query, out, pages, batch, attend, fresh)

    def states(query, batch, attend, fresh):
        """Triton's part is the oracle's here; a test's library is asked."""
        asked = raw_states.of if attend.raw_library else emu.raw_states
        return asked(query, batch, attend, fresh)

    served, choose = Counted(emu.emulated(), raw_states=states), ops.choose

    def door(codec, cache):
        # What reads a text before there are pages has none to be served from.
        return choose(codec, cache) if cache.shape[0] == 1 else served

    monkeypatch.setattr(ops, "choose", door)
    monkeypatch.setattr(backend.FibQuantBackend, "forward_includes_kv_cache_update", False)
    monkeypatch.setattr(device_pool, "planner", lambda: emu.emulated().plan_copies)
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
    monkeypatch.setattr(layers, "num_copy_rows", lambda *args: NUM_ROWS)
    with monkeypatch.context() as as_on_a_gpu:
        as_on_a_gpu.setattr(device_pool, "serves", lambda device_type: True)
        with engine(model, preset, **settings) as llm:
            answers = generate(llm, PROMPTS, NUM_TOKENS)
            again = generate(llm, PROMPTS[:1], NUM_TOKENS)
            assert num_preemptions(llm) > 0
    assert calls["encode"] > 0 and calls["attend"] > 0
    assert calls["mapped"] == (0 if name == "layers" else calls["attend"])
    # Most steps are decodes of one or two requests, whose window is 24 tokens long.
    assert calls["copies"] > 10 * calls["attend"] if name == "quality" else not calls["copies"]
    assert again[0].num_cached > 0

    with monkeypatch.context() as as_usual:
        as_usual.setattr(ops, "choose", lambda codec, cache: ops.CPU)
        with engine(model, preset, **settings) as llm:
            expected = generate(llm, PROMPTS, NUM_TOKENS)
            expected_again = generate(llm, PROMPTS[:1], NUM_TOKENS)
    # Queries are read as float16, and so are means that turn, which a bias makes long. Once in a
    # while that makes another code of a key in a later layer, and then another token.
    differences = differences_of(answers + again, expected + expected_again)
    assert len(differences) > NUM_TOKENS
    assert statistics.median(differences) < (5e-2 if name == "bias" else 1e-2)


def differences_of(answers, expected) -> list[float]:
    """Of log-probabilities, up to each answer's first other token."""
    differences = []
    for got, wanted in zip(answers, expected, strict=True):
        alike = [a == b for a, b in zip(got.tokens, wanted.tokens, strict=True)]
        num_same = (alike + [False]).index(False)
        differences += [
            abs(a - b) for a, b in zip(got.logprobs[:num_same], wanted.logprobs, strict=False)
        ]
    return differences


def test_a_window_over_everything_is_stock_attention(model_folder, calls, monkeypatch):
    """One bit per coordinate says little: copies that were missing or wrong would show. Chunks,
    cached prefixes and preempted requests lose none."""
    model = make_model("llama", model_folder)
    monkeypatch.setattr(layers, "num_copy_rows", lambda *args: NUM_ROWS)
    monkeypatch.setattr(device_pool, "serves", lambda device_type: True)
    # Kernels for GPUs take copies in 16 bits alone, and these round eight times as finely.
    monkeypatch.setattr(layers, "copy_dtype", lambda model_dtype: torch.float16)
    options = {"mode": "quality", "recent_window": 64, "self_check": False}
    with engine(model, "fibquant_1bit", fibquant=options, **SETTINGS) as llm:
        answers = generate(llm, PROMPTS, NUM_TOKENS)
        answers += generate(llm, PROMPTS[:1], NUM_TOKENS)
        assert num_preemptions(llm) > 0
    assert answers[2].num_cached > 0
    assert calls["copies"] > 30 * calls["attend"]
    # Stock attention on CPUs has no blocks of 16 tokens.
    with engine(model, "auto", max_model_len=64, max_num_seqs=2) as llm:
        expected = generate(llm, PROMPTS, NUM_TOKENS) + generate(llm, PROMPTS[:1], NUM_TOKENS)
    differences = differences_of(answers, expected)
    assert len(differences) == 3 * NUM_TOKENS
    assert statistics.median(differences) < 2e-3 and max(differences) < 0.1


def test_first_tokens_are_kept(model_folder, calls):
    """Requests three times as long as what is kept of them, in a pool too small for all of it."""
    settings = dict(SETTINGS, max_model_len=160, num_gpu_blocks_override=8)
    options = {"retain": {"first": 4, "recent": 20}, "fidelity_gate": False, "self_check": False}
    model, prompts = make_model("llama", model_folder), [list(range(2, 80)), [*range(2, 34), 7, 5]]
    found = []
    for choose in (ops.choose, lambda codec, cache: ops.CPU):
        with pytest.MonkeyPatch.context() as as_chosen:
            as_chosen.setattr(ops, "choose", choose)
            with engine(model, "fibquant_3bit", fibquant=options, **settings) as llm:
                found.append(generate(llm, prompts, NUM_TOKENS))
        calls["attend"], num_calls = 0, calls["attend"]
        assert (num_calls > 0) == (len(found) == 1)
    differences = differences_of(*found)
    assert len(differences) > NUM_TOKENS
    assert statistics.median(differences) < 1e-2


def test_the_monitor_and_the_fidelity_gate(model_folder, calls, monkeypatch):
    """They change no bit, find samples that are read again, and raise no alarm."""
    model = make_model("llama", model_folder)
    monkeypatch.setattr(monitored, "waits", lambda device_type: False)
    monkeypatch.setattr(Ledger, "can_afford", lambda self, num_comparisons=1: True)
    options = {"prefill": "codes", "self_check": False, "calibrate": "none", "accept_loss": True}
    answers = {}
    for monitor in (False, True):
        findings, calls["attend"] = Findings(), 0
        with engine(
            model, "fibquant_4bit", fibquant={**options, "monitor": monitor}, **SETTINGS
        ) as llm:
            assert gate.outcome_of(llm.llm_engine.vllm_config).state != "skipped"
            answers[monitor] = generate(llm, PROMPTS, NUM_TOKENS)
            answers[monitor] += generate(llm, PROMPTS[:1], NUM_TOKENS)
        assert calls["attend"] > 0
    assert [a.bits for a in answers[True]] == [a.bits for a in answers[False]]
    assert findings.samples > 0 and findings.changed == 0
    assert findings.health in (UNKNOWN, HEALTHY)
