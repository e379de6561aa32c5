# SPDX-License-Identifier: Apache-2.0
"""The fidelity gate in the engine: refuses what codes damage, and nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from vllm_fibquant.engine import calibrate, gate, measure, reading
from vllm_fibquant.engine.layers import our_layers
from vllm_fibquant.engine.report import worker_report
from vllm_fibquant.observe.counters import own_counters
from vllm_fibquant.observe.ledger import DAMAGED, Ledger

from .harness import engine, generate, random_text, varied_prompts
from .models import VOCAB_SIZE, make_model

PRESET = "fibquant_4bit"


@pytest.fixture(autouse=True)
def a_text_of_any_words(monkeypatch, tmp_path):
    """The models here know no words."""
    monkeypatch.setattr(measure, "text_sequences", random_text)
    monkeypatch.setattr(gate, "text_tokens", lambda config: prompt())
    monkeypatch.setenv("FIBQUANT_CACHE_DIR", str(tmp_path))


def prompt(length: int = 256) -> list[int]:
    """Of sixteen words, so that what follows one cannot be told without the ones before it."""
    generator = torch.Generator().manual_seed(5)
    return torch.randint(2, 18, (length,), generator=generator).tolist()


@pytest.fixture(scope="module")
def biased(model_folder) -> str:
    """A model that knows one text by heart, and whose keys are mostly one bias, in the pairs that
    turn least, as Qwen2's are."""
    from transformers import AutoModelForCausalLM

    path = model_folder / "biased"
    config = AutoModelForCausalLM.from_pretrained(make_model("llama", model_folder)).config
    config.attention_bias = True
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for layer in model.model.layers:
            attention = layer.self_attn
            for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
                getattr(attention, projection).bias.zero_().requires_grad_(False)
            attention.k_proj.bias.view(2, 64)[:, [30, 31, 62, 63]] = 200.0
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.Adam(weights, lr=3e-3)
    text = torch.tensor([prompt()])
    for _ in range(80):
        optimizer.zero_grad()
        model(text, labels=text).loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
    model.save_pretrained(path)
    return str(path)


def outcome(llm) -> dict:
    return worker_report(llm.llm_engine.vllm_config)["fidelity"]


@pytest.fixture
def biases_are_coded(monkeypatch):
    """Keys are coded as they are."""
    monkeypatch.setattr(calibrate, "_subtract_biases", lambda *args: None)


def test_codes_that_damage_a_model_are_refused(biased, biases_are_coded):
    with (
        pytest.raises(
            ValueError, match=r"expected KL must be at most .* worst layers: \d \(cosine"
        ) as caught,
        engine(biased, PRESET),
    ):
        pass
    for remedy in ('"calibrate": "auto"', '"mode": "quality"', '"layers"', '"accept_loss": true'):
        assert remedy in str(caught.value)


@pytest.mark.parametrize("kind", ["means", "none"], ids=["means", "the bias alone"])
def test_the_same_model_passes_without_its_mean(biased, kind):
    with engine(biased, PRESET, fibquant={"calibrate": kind}) as llm:
        found = outcome(llm)
    assert found["state"] == "passed"
    assert 0 < found["kl"] < 0.05
    assert found["worst_layer_cosine"] > 0.97


def test_the_monitor_calls_what_the_gate_refuses_damaged(biased, biases_are_coded, monkeypatch):
    monkeypatch.setattr(Ledger, "can_afford", lambda self, num_comparisons=1: True)
    options = {"accept_loss": True, "monitor": True}
    with engine(biased, PRESET, fibquant=options) as llm:
        generate(llm, [prompt(80 + number) for number in range(20)])
    assert int(own_counters()["monitor_health"]) == DAMAGED


@pytest.mark.parametrize("options", [{"accept_loss": True}, {"fidelity_gate": False}], ids=str)
def test_who_asks_for_it_is_served(biased, biases_are_coded, options):
    with engine(biased, PRESET, fibquant=options) as llm:
        found = outcome(llm)
        assert len(generate(llm, [prompt(40)])[0].tokens) == 8
    if "accept_loss" in options:
        assert found["state"] == "accepted"
        assert found["kl"] > found["refuse_kl"]
        assert found["worst_layer_cosine"] < 0.9
    else:
        assert found["state"] == "skipped"
        assert found["kl"] is None


@pytest.mark.parametrize(
    ("shape", "preset", "options"),
    [
        ("llama", "fibquant_k5v3", {}),
        ("gemma2", "fibquant_3bit", {"mode": "quality"}),
        ("gpt-oss", "fibquant_k5v3", {"mode": "quality"}),
        ("gemma3", "fibquant_k5v3", {"prefill": "raw"}),
        ("llama", "fibquant_k5v3", {"retain": {"recent": 64}}),
        pytest.param("mistral", "fibquant_k5v3", {}, marks=pytest.mark.slow),
    ],
)
def test_random_models_are_not_judged(model_folder, shape, preset, options):
    with engine(make_model(shape, model_folder), preset, fibquant=options) as llm:
        found = outcome(llm)
    print(f"\n{shape}, {preset}: {found}")
    assert found["state"] == "unmeasured"
    assert "predicts nothing" in found["reason"]
    assert found["num_tokens"] == 127
    assert all(0.6 < cosine < 1 for cosine in found["layer_cosines"].values())


def test_measuring_leaves_no_trace(model_folder):
    """Answers are those of an engine that has not measured, to the bit."""
    model, prompts = make_model("llama", model_folder), varied_prompts(4, VOCAB_SIZE)
    answers = []
    for options in ({}, {"fidelity_gate": False}):
        with engine(model, "fibquant_2bit", fibquant={**options, "accept_loss": True}) as llm:
            answers.append([answer.bits for answer in generate(llm, prompts)])
    assert answers[0] == answers[1]


def test_what_the_gate_reads_is_what_is_served(model_folder):
    """The KL of one token, measured by the gate and between two engines' answers."""
    model, text = make_model("llama", model_folder), prompt()
    found = {}
    for dtype in ("auto", PRESET):
        with engine(model, dtype, max_logprobs=VOCAB_SIZE) as llm:
            from vllm import SamplingParams

            params = SamplingParams(max_tokens=1, logprobs=VOCAB_SIZE, detokenize=False)
            (answer,) = llm.generate([{"prompt_token_ids": text[:-1]}], params, use_tqdm=False)
            logprobs = answer.outputs[0].logprobs[0]
            found[dtype] = torch.tensor([logprobs[i].logprob for i in range(VOCAB_SIZE)])
            if dtype == PRESET:
                measured = one_token_kl(llm, text)
    p, q = found["auto"].double(), found[PRESET].double()
    served = float((p.exp() * (p - q)).sum())
    assert served > 1e-5
    assert measured == pytest.approx(served, rel=0.02)


def one_token_kl(llm, text: list[int]) -> float:
    """Of the token after the last but one."""
    config = llm.llm_engine.vllm_config

    def measured(model) -> float:
        found = gate._measure(model, config, our_layers(config), text, len(text) - 2)
        assert found.next_tokens.num_tokens == 1
        return found.next_tokens.kl_sum

    return llm.apply_model(measured)[0]


def test_a_tokenizer_that_makes_nothing_of_the_text(model_folder, monkeypatch, caplog):
    monkeypatch.undo()  # its own tokenizer has words of its own
    with engine(make_model("llama", model_folder), "fibquant_1bit") as llm:
        found = outcome(llm)
    assert found["state"] == "unmeasured"
    assert "1 different ones, of an English text of" in found["reason"]


def test_a_model_that_cannot_be_read_like_this_is_served(biased, biases_are_coded, monkeypatch):
    def fail(*args):
        raise TypeError("forward() missing 1 required argument: 'pixels'")

    monkeypatch.setattr(reading, "read", fail)
    with engine(biased, PRESET) as llm:
        found = outcome(llm)
        assert len(generate(llm, [prompt(40)])[0].tokens) == 8
    assert found["state"] == "unmeasured"
    assert "'pixels'" in found["reason"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "is_refused"),
    [({"calibrate": "none"}, True), ({"mode": "quality", "calibrate": "auto"}, False)],
    ids=["nothing measured", "measured"],
)
def test_qwen(monkeypatch, request, tmp_path, options, is_refused):
    """The best-known case: key biases of several hundred."""
    folder = os.environ.get("FIBQUANT_TEST_MODELS")
    path = Path(folder or "") / "Qwen2.5-Coder-1.5B-Instruct"
    if not folder or not path.is_dir():
        pytest.skip("FIBQUANT_TEST_MODELS names no folder that holds Qwen2.5-Coder-1.5B-Instruct")
    monkeypatch.undo()
    monkeypatch.setenv("FIBQUANT_CACHE_DIR", str(tmp_path))
    if is_refused:
        request.getfixturevalue("biases_are_coded")
    settings = {"dtype": "bfloat16", "kv_cache_memory_bytes": 256 << 20}
    if is_refused:
        with (
            pytest.raises(ValueError, match="expected KL must be at most"),
            engine(str(path), "fibquant", fibquant=options, **settings),
        ):
            pass
        return
    with engine(str(path), "fibquant", fibquant=options, **settings) as llm:
        found = outcome(llm)
    print(f"\n{found}")
    assert found["state"] in ("passed", "warned")
    assert found["seconds"] < 60
