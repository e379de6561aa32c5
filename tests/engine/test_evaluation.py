# SPDX-License-Identifier: Apache-2.0
"""The suite from end to end on a tiny random model: engine against simulation, and going on."""

from __future__ import annotations

import json
import random

import pytest

from tests.engine.models import VOCAB_SIZE, make_model

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A text in the words that the tiny models' tokenizer knows."""
    path = tmp_path_factory.mktemp("text") / "words.txt"
    draw = random.Random(0)
    path.write_text(" ".join(f"w{draw.randrange(2, VOCAB_SIZE)}" for _ in range(1200)))
    return path


def test_the_suite(tmp_path, words, monkeypatch):
    from vllm_fibquant.engine import attention
    from vllm_fibquant.evaluation import report, suite, texts
    from vllm_fibquant.evaluation.rivals import KVQuant
    from vllm_fibquant.evaluation.rows import Row, all_rows

    # The simulation does not round copies; on this model's sharp attention that would show.
    monkeypatch.setattr(attention, "copy_dtype", lambda model_dtype: model_dtype)
    monkeypatch.setattr(texts, "EVALUATION", words)
    monkeypatch.setattr(suite, "CALIBRATION", words)
    wanted = {"float32 through vLLM", "2bit, exact", "2bit, quality", "2bit, exact, simulated",
              "2bit, quality, simulated", "KIVI 2 bits, residual 32"}  # fmt: skip
    sizes = texts.SMOKE
    rows = [row for row in all_rows(sizes.step) if row.name in wanted]
    rows.append(Row("KVQuant", "rival", KVQuant(3), main=True))
    model, path = make_model("llama", tmp_path), tmp_path / "out" / "results.jsonl"

    first = suite.Suite(model, sizes, path, rows=rows)
    assert len(first.missing) == len(first.jobs) > 3 * len(rows)
    first.run()
    numbers = {s.row.name: s.numbers for s in report.summarise_all(first)}
    assert numbers["float32 through vLLM"]["kl"] == pytest.approx(0, abs=1e-6)
    for mode in ("exact", "quality"):
        engine, simulated = numbers[f"2bit, {mode}"], numbers[f"2bit, {mode}, simulated"]
        assert engine["kl"] > 1e-3, "two bits must show"
        assert engine["kl"] == pytest.approx(simulated["kl"], rel=0.01)
        assert engine["delta"] == pytest.approx(simulated["delta"], abs=2e-3)
    assert numbers["2bit, quality"]["kl"] < numbers["2bit, exact"]["kl"]

    lines = path.read_text().splitlines()
    assert len(lines) == len(first.jobs)
    path.write_text("\n".join(lines[:-3]) + "\n")
    again = suite.Suite(model, sizes, path, rows=rows)
    lost = [json.loads(line) for line in lines[-3:]]
    assert {(job.row.name, job.unit.name) for job in again.missing} == {
        (line["row"], line["unit"]) for line in lost
    }
    again.run()
    again.prune()
    assert len(path.read_text().splitlines()) == len(first.jobs)
    text = report.markdown(again)
    assert "## Engine against simulation" in text and "| 2bit, quality |" in text

    monkeypatch.setattr(suite, "code_digest", lambda is_calibrated: "other code")
    assert len(suite.Suite(model, sizes, path, rows=rows).missing) == len(first.jobs)
    assert not suite.Suite(model, sizes, path, rows=rows, any_code=True).missing
