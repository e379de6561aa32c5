# SPDX-License-Identifier: Apache-2.0
"""The fidelity monitor in the engine: it changes nothing, raises no false alarm, and notices."""

from __future__ import annotations

import pytest
import torch

from vllm_fibquant.codec.codec import KVCodec
from vllm_fibquant.engine import calibrate
from vllm_fibquant.observe.counters import own_counters
from vllm_fibquant.observe.ledger import DAMAGED, HEALTHY, UNKNOWN, Ledger
from vllm_fibquant.ops import cpu_tables

from .harness import engine, in_batches, num_preemptions, varied_prompts
from .models import VOCAB_SIZE, make_model

PRESET = "fibquant_4bit"
ON = {"monitor": {"budget": 0.1}}


class Findings:
    """What this process's counters gained since now."""

    def __init__(self):
        self._before = self._read()

    @staticmethod
    def _read():
        counters = own_counters()
        found = {name: counters[f"monitor_{name}"] for name in ("rereads", "changed")}
        found["samples"] = sum(d.count for d in counters.rows("cosine_by_layer").values())
        return found

    def __getattr__(self, name):
        return self._read()[name] - self._before[name]

    @property
    def health(self):
        return int(own_counters()["monitor_health"])


@pytest.fixture
def every_step_compares(monkeypatch):
    """Steps of a tiny model earn little, and how much depends on the machine."""
    monkeypatch.setattr(Ledger, "can_afford", lambda self, num_comparisons=1: True)


@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        ("llama", {"enable_prefix_caching": True, "max_num_batched_tokens": 64}),
        # Groups of layers share blocks, and few of them: what was sampled is soon overwritten.
        ("gemma2", {"enable_prefix_caching": True, "num_gpu_blocks_override": 40}),
        ("llama4", {"max_num_batched_tokens": 2048}),
    ],
    ids=["prefix cache and chunks", "sliding windows and preemption", "chunked local attention"],
)
def test_answers_are_the_same_to_the_bit_and_nothing_is_alarmed(
    model_folder, every_step_compares, shape, settings
):
    """A random model's single comparisons are far apart (cosines of .56 to .99, mean .95): of all
    steps there are enough for the mean of the newest."""
    model = make_model(shape, model_folder)
    prompts = varied_prompts(24, VOCAB_SIZE)
    answers = {}
    for name, options in (("off", {}), ("on", ON)):
        findings = Findings()
        with engine(model, PRESET, fibquant=options, **settings) as llm:
            answers[name] = in_batches(llm, prompts, 24) + in_batches(llm, prompts, 24)
            if "num_gpu_blocks_override" in settings:
                assert num_preemptions(llm) > 0
    assert [a.bits for a in answers["on"]] == [a.bits for a in answers["off"]]
    print(f"\n{findings.samples} samples, {findings.rereads:.0f} read again")
    assert findings.samples > 3
    assert findings.changed == 0
    assert findings.health in (UNKNOWN, HEALTHY)


def test_drill_damage(model_folder, every_step_compares):
    """A table of the kernel is overwritten while the engine serves."""
    model = make_model("llama", model_folder)
    prompts = varied_prompts(16, VOCAB_SIZE, shortest=64)
    findings = Findings()
    with engine(model, PRESET, fibquant=ON, enable_prefix_caching=True) as llm:
        in_batches(llm, prompts, 24)
        assert findings.rereads > 10
        assert findings.changed == 0
        assert findings.health in (UNKNOWN, HEALTHY)
        codec = KVCodec.from_preset(PRESET, 64)
        shape = codec.value.codebook.rows.shape
        table = next(t for t in cpu_tables.codec_struct(codec).tables if t.shape == shape)
        kept = table.clone()
        try:
            with torch.inference_mode():  # a table made by an engine may be written in no other
                table[:, 0] = 0
            in_batches(llm, prompts, 24)  # reads what the cache holds of the same prompts
        finally:
            with torch.inference_mode():
                table.copy_(kept)
    assert findings.changed > 0
    assert findings.health == DAMAGED


def test_drill_keys_that_break_the_code(model_folder, tmp_path, every_step_compares, monkeypatch):
    """One channel of all keys is huge and the same: exact attention hardly feels it."""
    from transformers import AutoModelForCausalLM

    path = make_model("llama", model_folder)
    model = AutoModelForCausalLM.from_pretrained(path, torch_dtype=torch.float32)
    config = model.config
    config.attention_bias = True
    broken = type(model)(config).to(torch.float32)
    broken.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        for layer in broken.model.layers:
            attention = layer.self_attn
            for projection in (
                attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj,
            ):  # fmt: skip
                projection.bias.zero_()
            # The last pair of a head turns least with the position; Qwen2.5's biases reach 354.
            attention.k_proj.bias.view(2, 64)[:, 63] = 400.0
    broken.save_pretrained(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(calibrate, "_subtract_biases", lambda *args: None)
        with engine(str(tmp_path), PRESET, fibquant=ON) as llm:
            findings = Findings()
            in_batches(llm, varied_prompts(16, VOCAB_SIZE, shortest=64), 16)
    assert findings.changed == 0
    assert findings.health == DAMAGED
    with engine(str(tmp_path), PRESET, fibquant=ON) as llm:
        in_batches(llm, varied_prompts(16, VOCAB_SIZE, shortest=64), 16)
    assert findings.health == HEALTHY, "what a bias adds is not coded"
