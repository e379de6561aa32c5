# SPDX-License-Identifier: Apache-2.0
"""Calibration in the engine: measured once, read ever after, and as exact as without."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vllm_fibquant.engine import layers
from vllm_fibquant.engine import measure as measuring
from vllm_fibquant.keys.calibration import KeyStatistics, pack_calibration, parse_calibration
from vllm_fibquant.keys.key_map import Turns

from .harness import engine, generate, in_batches, largest_difference, random_text, varied_prompts
from .models import VOCAB_SIZE, make_model
from .test_exactness import assert_exact, run_everything
from .test_refusals import refusal_of


@pytest.fixture(autouse=True)
def short_text(monkeypatch):
    """A few random tokens: the models here know no words."""
    monkeypatch.setattr(measuring, "text_sequences", random_text)


def measure(model: str, path: Path) -> None:
    with engine(model, "fibquant_2bit", fibquant=calibrated(path)):
        pass


def calibrated(path: Path, calibrate: str = "means", **options) -> dict:
    return {"calibrate": calibrate, "calibration": str(path), **options}


def exaggerate(path: Path) -> None:
    """Gives every head a long mean, as real models have: whatever it is, answers are exact."""
    found = parse_calibration(path.read_bytes(), str(path))
    generator = torch.Generator().manual_seed(0)

    def longer(mean: torch.Tensor) -> torch.Tensor:
        return mean + torch.randn(mean.shape, generator=generator) * (mean != 0)

    layers = {
        name: KeyStatistics(
            longer(s.key_mean),
            longer(s.turning_mean),
            s.key_covariance,
            s.query_moment,
            longer(s.first_key),
            longer(s.first_value),
        )  # fmt: skip
        for name, s in found.layers.items()
    }
    assert all(s.turning_mean.any() for s in layers.values())
    path.write_bytes(pack_calibration(found.model, found.num_tokens, layers))


@pytest.mark.parametrize("shape", ["llama", pytest.param("gemma2", marks=pytest.mark.slow)])
def test_what_is_measured_is_what_the_model_computes(model_folder, tmp_path, monkeypatch, shape):
    """Measured through the layers, against the same model in transformers."""
    monkeypatch.setattr(measuring, "distances", lambda number: (0,))
    from transformers import AutoModelForCausalLM, DynamicCache

    path = make_model(shape, model_folder)
    measure(path, tmp_path / "a.fqcal")
    found = parse_calibration((tmp_path / "a.fqcal").read_bytes(), "file")
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    )
    keys: dict[int, list[torch.Tensor]] = {}
    first: dict[int, list[torch.Tensor]] = {}
    texts = random_text(None)
    with torch.inference_mode():
        for tokens in texts.sequences + texts.starts:
            cache = DynamicCache()
            model(torch.tensor([tokens]), past_key_values=cache)
            for number, layer in enumerate(cache.layers):
                if len(tokens) > 4:
                    keys.setdefault(number, []).append(layer.keys[0])
                pair = torch.stack((layer.keys[0, :, :4], layer.values[0, :, :4]))
                first.setdefault(number, []).append(pair)
    frequency = model.config.rope_parameters["rope_theta"] ** -(torch.arange(32).double() / 32)
    turns = Turns(torch.arange(64).view(2, -1).T, frequency, 1.0, 1024)
    # Before the rotary embedding, slow pairs of coordinates in steps.
    at = torch.cat([torch.arange(4, x.shape[1]) for x in keys[0]])
    assert len(found.layers) == len(keys)
    for number, statistics in enumerate(found.layers.values()):
        first_means = torch.stack(first[number]).mean(0)
        assert torch.allclose(statistics.first_key, first_means[0], atol=1e-5)
        assert torch.allclose(statistics.first_value, first_means[1], atol=1e-5)
        seen = torch.cat([x[:, 4:] for x in keys[number]], 1).transpose(0, 1)
        unturned = turns.turn(seen, at, back=True, stepped=True)
        c, chosen = statistics.turning_mean, statistics.turning_mean != 0
        assert chosen.float().mean() == 0.5
        assert torch.allclose(c, unturned.mean(0) * chosen, atol=1e-4)
        expected = (seen - turns.turn(c, at, stepped=True)).transpose(0, 1)
        assert found.num_tokens == expected.shape[1]
        assert torch.allclose(statistics.key_mean, expected.mean(1), atol=1e-4)
        centred = (expected - expected.mean(1, keepdim=True)).double()
        covariance = (centred.transpose(1, 2) @ centred / centred.shape[1]).float()
        assert torch.allclose(statistics.key_covariance, covariance, atol=1e-4)


def test_measured_once_and_then_read(model_folder, tmp_path, monkeypatch):
    model, path = make_model("llama", model_folder), tmp_path / "folder" / "a.fqcal"
    prompts = varied_prompts(6, VOCAB_SIZE)
    with engine(model, "fibquant_2bit", fibquant=calibrated(path)) as llm:
        first = in_batches(llm, prompts)
    written = path.read_bytes()
    monkeypatch.setattr(measuring, "text_sequences", None)  # measuring again would fail
    with engine(model, "fibquant_2bit", fibquant=calibrated(path)) as llm:
        again = in_batches(llm, prompts)
    with engine(model, "fibquant_2bit") as llm:
        without = in_batches(llm, prompts)
    assert path.read_bytes() == written
    assert [a.bits for a in first] == [a.bits for a in again]
    assert [a.bits for a in first] != [a.bits for a in without]


def test_kept_in_the_cache_when_no_path_is_given(model_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("FIBQUANT_CACHE_DIR", str(tmp_path))
    model = make_model("llama", model_folder)
    with engine(model, "fibquant_2bit", fibquant={"calibrate": "means"}):
        pass
    (path,) = tmp_path.glob("calibrations/*.fqcal")
    assert path.stem == parse_calibration(path.read_bytes(), "file").model + "-3"


def test_without_a_place_to_keep_it_the_measurement_serves_all_the_same(
    model_folder, tmp_path, monkeypatch
):
    (tmp_path / "file").touch()  # no folder can be made below a file, by nobody
    monkeypatch.setenv("FIBQUANT_CACHE_DIR", str(tmp_path / "file" / "cache"))
    model, kept = make_model("llama", model_folder), tmp_path / "a.fqcal"
    prompts = varied_prompts(6, VOCAB_SIZE)
    with engine(model, "fibquant_2bit", fibquant={"calibrate": "means"}) as llm:
        answers = in_batches(llm, prompts)
    with engine(model, "fibquant_2bit", fibquant=calibrated(kept)) as llm:
        expected = in_batches(llm, prompts)
    assert [a.bits for a in answers] == [a.bits for a in expected]


def test_a_path_that_cannot_be_written_is_refused_before_measuring(
    model_folder, tmp_path, monkeypatch
):
    (tmp_path / "file").touch()
    monkeypatch.setattr(measuring, "text_sequences", None)  # measuring would fail
    path = tmp_path / "file" / "a.fqcal"
    with (
        pytest.raises(ValueError, match="calibration must be a file or a path that can be written"),
        engine(make_model("llama", model_folder), "fibquant_2bit", fibquant=calibrated(path)),
    ):
        pass


def test_another_models_file_is_refused(model_folder, tmp_path):
    path = tmp_path / "a.fqcal"
    measure(make_model("llama", model_folder), path)
    other = make_model("gemma2", model_folder)
    with (
        pytest.raises(ValueError, match=r"calibration: .*a\.fqcal must .* it is of another model|"
                      "must be of model"),
        engine(other, "fibquant_2bit", fibquant=calibrated(path)),
    ):  # fmt: skip
        pass


@pytest.mark.parametrize(
    ("shape", "kind"),
    [("gemma2", "transform"), pytest.param("llama", "means", marks=pytest.mark.slow)],
)
def test_nothing_matters(model_folder, tmp_path, shape, kind):
    """As without a calibration, an answer is the same bit for bit under every schedule."""
    model, path = make_model(shape, model_folder), tmp_path / "a.fqcal"
    measure(model, path)
    exaggerate(path)
    prompts = varied_prompts(24, VOCAB_SIZE, seed=8)
    options = calibrated(path, kind)
    assert_exact(run_everything(model, "fibquant_2bit", prompts, 2, fibquant=options))


def test_a_window_over_everything_is_stock_attention(model_folder, tmp_path, monkeypatch):
    """Copies and new tokens are in the model's basis, whatever the codes' keys are made into."""
    monkeypatch.setattr(layers, "copy_dtype", lambda model_dtype: model_dtype)
    model, path = make_model("llama", model_folder), tmp_path / "a.fqcal"
    measure(model, path)
    exaggerate(path)
    prompts = varied_prompts(8, VOCAB_SIZE, longest=100)
    with engine(model, "auto") as llm:
        expected = generate(llm, prompts, 16)
    quality = calibrated(path, mode="quality", recent_window=256)
    with engine(model, "fibquant_1bit", fibquant=quality) as llm:
        answers = generate(llm, prompts, 16)
    assert largest_difference(expected, answers)[2] < 1e-3
    assert largest_difference(expected, answers)[0] == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kv_offloading_size": 1.0}, "calibration must be an existing file"),
        ({"kv_offloading_size": 1.0, "calibrate": "transform"}, 'it must be "means" with KV'),
        ({"kv_cache_dtype": "fibquant_k5v3", "calibrate": "transform"}, "at most 4 bits per"),
    ],
    ids=str,
)
def test_refusals(model_folder, settings, message):
    settings = dict(settings)
    calibrate = settings.pop("calibrate", "means")
    told = refusal_of(
        make_model("llama", model_folder),
        additional_config={"fibquant": {"calibrate": calibrate}},
        **settings,
    )
    assert message in told


@pytest.mark.slow
def test_the_command_measures_and_serving_reads(tmp_path):
    """In a process of its own, with a real tokenizer: the file is what a start looks for."""
    from vllm_fibquant.demo_model import ensure_demo_model

    model, path = str(ensure_demo_model()), tmp_path / "a.fqcal"
    command = [sys.executable, "-m", "vllm_fibquant", "calibrate", model, "--output", str(path)]
    first = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert first.returncode == 0, first.stderr[-2000:]
    assert str(path) in first.stdout
    found = parse_calibration(path.read_bytes(), "file")
    assert found.num_tokens == measuring.NUM_SEQUENCES * (1024 - found.num_first)
    again = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert again.returncode == 1
    assert "which exists" in again.stderr
