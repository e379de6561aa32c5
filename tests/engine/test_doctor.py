# SPDX-License-Identifier: Apache-2.0
"""`vllm-fibquant doctor` says before anything is loaded what a start would say."""

from __future__ import annotations

import json

import pytest

from vllm_fibquant.cli import info
from vllm_fibquant.cli.main import main
from vllm_fibquant.engine import gate, last_fidelity, measure

from .harness import DEFAULTS, engine, random_text
from .models import make_config_only, make_model
from .test_refusals import ALIBI_MODEL


def test_a_model_that_is_served(model_folder, capsys):
    model = make_model("llama", model_folder)
    arguments = ["doctor", model, "--memory", "64MiB", "--context", "512"]
    assert main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["refused"] == [] and report["kernel"] == info.kernel()
    assert report["options"]["prefill"] in ("codes", "raw")
    rows = {row["kv_cache_dtype"]: row for row in report["capacity"]}
    assert list(rows) == ["bf16", "fp8", "fibquant"]
    assert rows["fibquant"]["num_users"] > 3 * rows["bf16"]["num_users"] > 0
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert info.kernel() in text and f"{rows['fibquant']['num_tokens']:,} tokens" in text


def test_the_loss_of_the_last_start_is_told(model_folder, tmp_path, monkeypatch, capsys):
    """Of this preset and these options; of others nothing is known."""
    monkeypatch.setenv("FIBQUANT_CACHE_DIR", str(tmp_path))
    model = make_model("llama", model_folder)
    asked = ["doctor", model, "--kv-cache-dtype", "fibquant_4bit", "--memory", "64MiB", "--json"]

    def found() -> tuple:
        assert main(asked) == 0
        report = json.loads(capsys.readouterr().out)
        return report["last_fidelity"], report["calibrated"]

    assert found() == (None, None)
    monkeypatch.setattr(gate, "text_tokens", lambda _: list(range(2, 130)))
    monkeypatch.setattr(measure, "text_sequences", random_text)
    with engine(model, "fibquant_4bit", fibquant=DEFAULTS, max_model_len=2048) as llm:
        measured = gate.outcome_of(llm.llm_engine.vllm_config).facts()
    assert measured["kl"] is not None
    told, calibrated = found()
    assert calibrated is True
    assert {name: told[name] for name in last_fidelity.KEPT} == {
        name: measured[name] for name in last_fidelity.KEPT
    }
    (file,) = tmp_path.glob("calibrations/*.fqcal")
    file.unlink()
    assert found()[1] is False
    asked.remove("--json")
    assert main(asked) == 0
    text = capsys.readouterr().out
    assert f"KL {measured['kl']:.4f}" in text
    assert "calibrate auto, for which no measurement of this model is kept" in text
    asked[3] = "fibquant_2bit"
    assert main([*asked, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["last_fidelity"] is None


def test_a_model_that_is_refused(model_folder, capsys):
    model = make_model("llama-d62", model_folder)
    assert main(["doctor", model, "--kv-cache-dtype", "fibquant_2bit"]) == 1
    text = capsys.readouterr().out
    assert "refused:\n  - " in text and "must divide head_dim" in text
    assert "pydantic" not in text


@pytest.mark.parametrize(
    ("shape", "told"), [("falcon", "which vLLM ignores"), ("bloom", "got ALiBi")]
)
def test_what_only_a_layer_knows_is_told_as_well(model_folder, shape, told, capsys):
    """A start refuses these when layers are built; their configurations show them before."""
    made = make_model(shape, model_folder) if shape == "falcon" else None
    model = made or make_config_only("alibi", ALIBI_MODEL, model_folder)
    assert main(["doctor", model, "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert len(report["refused"]) == 1 and told in report["refused"][0]
    assert report["capacity"] is None and "must be a model that is served" in report["no_capacity"]
