# SPDX-License-Identifier: Apache-2.0
"""What is served when nothing is asked for: calibrated keys, wherever and whatever is started."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vllm_fibquant import ops
from vllm_fibquant.engine import layers, measure
from vllm_fibquant.engine.measure import Texts
from vllm_fibquant.engine.reading import attend_dense
from vllm_fibquant.keys.calibration import parse_calibration

from .harness import DEFAULTS, engine, generate, largest_difference, random_text, varied_prompts
from .models import VOCAB_SIZE, make_model


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("FIBQUANT_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def short_text(monkeypatch):
    """A few random tokens: the models here know no words."""
    monkeypatch.setattr(measure, "text_sequences", random_text)


def impls_of(llm) -> dict:
    return layers.our_layers(llm.llm_engine.vllm_config)


def calibrations(folder: Path) -> list:
    found = sorted((folder / "cache").glob("**/*.fqcal"))
    return [parse_calibration(path.read_bytes(), str(path)) for path in found]


def test_the_default_is_quality_and_measured(model_folder, tmp_path, short_text):
    with engine(make_model("llama", model_folder), "fibquant", fibquant=DEFAULTS) as llm:
        impls = impls_of(llm)
        (found,) = calibrations(tmp_path)
        for impl in impls.values():
            assert impl.options.prefill == "raw"
            assert impl.options.recent_window == 128
            assert impl.key_map.transform is not None
            assert impl.calibration == found.digest
        generate(llm, varied_prompts(2, VOCAB_SIZE), 4)


def test_higher_rates_have_means_by_default(model_folder, short_text):
    with engine(make_model("llama", model_folder), "fibquant_k5v3", fibquant=DEFAULTS) as llm:
        for impl in impls_of(llm).values():
            assert impl.key_map.transform is None and impl.key_map.mean.any()


def test_a_tokenizer_that_makes_nothing_of_the_text_is_told(model_folder, caplog):
    """The random models' tokenizer knows none of the words: served without, and said."""
    model = make_model("llama", model_folder)
    with caplog.at_level(logging.WARNING), engine(model, "fibquant", fibquant=DEFAULTS) as llm:
        assert all(impl.calibration == "none" for impl in impls_of(llm).values())
        generate(llm, varied_prompts(1, VOCAB_SIZE), 2)
    assert "the model's tokenizer must make at least" in caplog.text
    with pytest.raises(ValueError, match="tokenizer must make at least"), \
         engine(model, "fibquant", fibquant={"calibrate": "means"}):  # fmt: skip
        pass


def test_without_a_tokenizer_it_is_served_all_the_same(model_folder, tmp_path, caplog):
    folder = tmp_path / "bare"
    shutil.copytree(make_model("llama", model_folder), folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)
    with caplog.at_level(logging.WARNING), engine(str(folder), "fibquant", fibquant=DEFAULTS):
        pass
    assert "the model must have a tokenizer to be measured" in caplog.text


def test_a_folder_that_cannot_be_written_costs_nothing_but_the_file(
    model_folder, monkeypatch, caplog, short_text
):
    monkeypatch.setenv("FIBQUANT_CACHE_DIR", "/proc/1/nowhere")
    model = make_model("llama", model_folder)
    with caplog.at_level(logging.WARNING), engine(model, "fibquant", fibquant=DEFAULTS) as llm:
        assert all(impl.key_map.transform is not None for impl in impls_of(llm).values())
    assert "FibQuant keeps nothing for the next start" in caplog.text


def test_a_bias_is_never_coded(model_folder):
    """Without any measurement: keys lose R_p b, read from the weights alone."""
    from transformers import AutoModelForCausalLM

    model = make_model("qwen2", model_folder)
    prompts = varied_prompts(6, VOCAB_SIZE, longest=120, shortest=60)
    with engine(model, "auto") as llm:
        expected = generate(llm, prompts, 1)
    with engine(model, "fibquant_4bit") as llm:
        got = generate(llm, prompts, 1)
        maps = [impl.key_map for impl in impls_of(llm).values()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vllm_fibquant.engine.key_bias.has_bias", lambda impl: False)
        with engine(model, "fibquant_4bit") as llm:
            coded = generate(llm, prompts, 1)
    assert largest_difference(expected, got)[2] < 0.3 * largest_difference(expected, coded)[2]

    stock = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    positions = torch.tensor([0, 1, 2, 3, 17, 100, 400])
    for layer, key_map in zip(stock.model.layers, maps, strict=True):
        bias = layer.self_attn.k_proj.bias.detach().view(2, 1, -1).expand(-1, len(positions), -1)
        cos, sin = stock.model.rotary_emb(bias, positions[None])
        half = bias.shape[-1] // 2
        turned = torch.cat((-bias[..., half:], bias[..., :half]), -1)
        keys = bias * cos + turned * sin  # [num_kv_heads, num_positions, head_dim]
        left = keys - key_map.mean_at(positions, torch.float32).transpose(0, 1)
        assert (left.norm(dim=-1) < 0.25 * keys.norm(dim=-1)).all()
        assert torch.allclose(key_map.first.key, keys[:, :4], atol=1e-3)
        assert not key_map.first.value.any()


def test_a_model_without_biases_has_no_map_when_none_is_asked_for(model_folder):
    with engine(make_model("llama", model_folder), "fibquant") as llm:
        assert all(impl.key_map is None for impl in impls_of(llm).values())


def statistics_of(folder: Path, number: int):
    (found,) = calibrations(folder)
    return found.layers[f"model.layers.{number}.self_attn.attn"]


@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        ("gemma2", {"kv_cache_dtype_skip_layers": ["0"]}),
        ("llama", {"enable_lora": True, "max_lora_rank": 8}),
    ],
    ids=["skipped", "lora"],
)
def test_measured_the_same_whatever_is_switched_on(
    model_folder, tmp_path, monkeypatch, short_text, shape, settings
):
    model = make_model(shape, model_folder)
    with engine(model, "fibquant", fibquant=DEFAULTS):
        pass
    expected = statistics_of(tmp_path, 1)
    other = tmp_path / "other"
    monkeypatch.setenv("FIBQUANT_CACHE_DIR", str(other / "cache"))
    with engine(model, "fibquant", fibquant=DEFAULTS, **settings) as llm:
        generate(llm, varied_prompts(2, VOCAB_SIZE), 2)
    got = statistics_of(other, 1)
    for a, b in zip(expected.tensors, got.tensors, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-3)


def test_a_file_that_lacks_layers_is_completed(model_folder, tmp_path, short_text):
    model = make_model("gemma2", model_folder)
    with engine(model, "fibquant", fibquant=DEFAULTS, kv_cache_dtype_skip_layers=["0"]):
        pass
    assert len(calibrations(tmp_path)[0].layers) == 1
    with engine(model, "fibquant", fibquant=DEFAULTS) as llm:
        assert all(impl.key_map is not None for impl in impls_of(llm).values())
    assert len(calibrations(tmp_path)[0].layers) == 2


def test_a_draft_model_has_its_own_calibration(model_folder, tmp_path, short_text):
    model, draft = make_model("llama", model_folder), make_model("llama-1layer", model_folder)
    speculation = {"model": draft, "num_speculative_tokens": 2, "method": "draft_model"}
    with engine(model, "fibquant", fibquant=DEFAULTS, speculative_config=speculation) as llm:
        found = {c.digest for c in calibrations(tmp_path)}
        assert {impl.calibration for impl in impls_of(llm).values()} == found
        assert len(found) == 2
        generate(llm, varied_prompts(2, VOCAB_SIZE), 8)


@pytest.mark.parametrize(("window", "chunk"), [(0, 0), (7, 0), (0, 7)])
@pytest.mark.parametrize("soft_cap", [0.0, 3.0])
def test_dense_attention_is_the_oracles(window, chunk, soft_cap):
    from vllm_fibquant.codec.codec import KVCodec
    from vllm_fibquant.codec.config import get_preset

    torch.manual_seed(0)
    codec = KVCodec.from_preset(get_preset("fibquant"), 64)
    query, key, value = torch.randn(20, 6, 64), torch.randn(20, 2, 64), torch.randn(20, 2, 64)
    sinks = torch.randn(6)
    out = torch.empty_like(query)
    cache = torch.zeros(2, 2, 16, codec.layout.record_bytes, dtype=torch.uint8)
    batch = ops.Batch(*(torch.tensor(x).int() for x in ([0, 20], [20], [[0, 1]])))
    attend = ops.Attend(0.125, window, soft_cap, sinks, chunk=chunk)
    pages = ops.Pages(cache, codec, None, ops.REFERENCE)
    ops.reference.paged_attention(query, out, pages, batch, attend, ops.Fresh(key, value))
    how = 0.125, window, soft_cap, sinks, chunk
    got = attend_dense(query, key, value, 20, *how)
    assert torch.allclose(got, out, atol=1e-5)
    # Two sequences one after the other, as keys are measured on a GPU.
    backwards = [x.flip(0) for x in (query, key, value)]
    twice = [torch.cat(both) for both in zip((query, key, value), backwards, strict=True)]
    other = attend_dense(*backwards, 20, *how)
    assert torch.allclose(attend_dense(*twice, 20, *how), torch.cat((got, other)), atol=1e-6)


def test_reading_ends_in_time(model_folder, tmp_path, monkeypatch, short_text):
    monkeypatch.setattr(measure, "MAX_SECONDS", 0.0)
    with engine(make_model("llama", model_folder), "fibquant", fibquant=DEFAULTS):
        pass
    (found,) = calibrations(tmp_path)
    texts: Texts = random_text(None)
    assert found.num_tokens == len(texts.sequences[0]) - found.num_first


def test_time_that_other_processes_had_counts_a_third(monkeypatch):
    now = {"thread_time": 5.0, "perf_counter": 100.0}
    clocks = {name: lambda name=name: now[name] for name in now}
    monkeypatch.setattr(measure, "time", SimpleNamespace(**clocks))
    clock = measure._Clock()
    now.update(thread_time=15.0, perf_counter=112.0)
    assert clock.seconds() == 10.0
    now.update(perf_counter=160.0)
    assert clock.seconds() == 20.0


class Words:
    """A tokenizer of one token a word, with a token before every text."""

    bos_token_id, unk_token_id = 7, None

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        self.known = getattr(self, "known", {})
        return [self.known.setdefault(word, 100 + len(self.known)) for word in text.split()]


def test_prose_and_code_are_read_in_turn(monkeypatch, tmp_path):
    for name, count in (("prose", 5000), ("code", 2100)):
        (tmp_path / name).write_text(" ".join(f"{name}{i}" for i in range(count)))
    words = Words()
    monkeypatch.setattr(measure, "TEXTS", (tmp_path / "prose", tmp_path / "code"))
    monkeypatch.setattr(measure, "tokenizer_of", lambda config: words)
    config = SimpleNamespace(hf_text_config=SimpleNamespace(max_position_embeddings=1024))
    texts = measure.text_sequences(config)
    name_of = {token: name for name, token in words.known.items()}
    read = [(tokens[0], name_of[tokens[1]], len(tokens)) for tokens in texts.sequences]
    assert read == [(7, f"{name}{i}", 1024) for i in (0, 1023) for name in ("prose", "code")]
    assert {tokens[0] for tokens in texts.starts} == {7}
    assert {len(tokens) for tokens in texts.starts} == {4}
    assert all(name_of[token].startswith("prose") for t in texts.starts for token in t[1:])
    # Where there is no code to fill a text, prose goes on.
    (tmp_path / "code").write_text("little")
    texts = measure.text_sequences(config)
    assert [name_of[t[1]] for t in texts.sequences] == [f"prose{1023 * i}" for i in range(4)]
