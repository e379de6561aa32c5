# SPDX-License-Identifier: Apache-2.0
"""The suite from end to end on a tiny random model: engine against simulation, and going on."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from tests.engine.models import VOCAB_SIZE, make_model
from vllm_fibquant.evaluation.texts import Sizes

pytestmark = pytest.mark.engine


SMOKE = Sizes(
    chunk=160, num_chunks=1, num_other=1, fidelity=96, calibration=256, far=80,
    passkeys=((1, 1),), passkey_length=64, greedy=1, prompt_length=32, answer_length=8,
    retrieval=(),
)  # fmt: skip


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A text in the words that the tiny models' tokenizer knows."""
    path = tmp_path_factory.mktemp("text") / "words.txt"
    draw = random.Random(0)
    path.write_text(" ".join(f"w{draw.randrange(2, VOCAB_SIZE)}" for _ in range(1200)))
    return path


def test_the_suite(tmp_path, words, monkeypatch):
    from vllm_fibquant.engine import layers
    from vllm_fibquant.evaluation import report, suite, texts
    from vllm_fibquant.evaluation.rivals import KVQuant
    from vllm_fibquant.evaluation.rows import Row, all_rows

    # The simulation does not round copies; on this model's sharp attention that would show.
    monkeypatch.setattr(layers, "copy_dtype", lambda model_dtype: model_dtype)
    monkeypatch.setattr(texts, "EVALUATION", words)
    monkeypatch.setattr(suite, "CALIBRATION", words)
    wanted = {"uncompressed, simulated", "2bit, exact, uncalibrated", "2bit, quality, uncalibrated",
              "2bit, exact, uncalibrated, simulated", "2bit, quality, uncalibrated, simulated",
              "KIVI 2 bits, residual 64", "2bit, quality"}  # fmt: skip
    sizes = SMOKE
    rows = [row for row in all_rows(sizes.step) if row.name in wanted]
    rows.append(Row("KVQuant", "rival", KVQuant(3), main=True))
    model, path = make_model("llama", tmp_path), tmp_path / "out" / "results.jsonl"

    given = {"rows": rows, "sources": ["prose"]}
    first = suite.Suite(model, sizes, path, **given)
    assert len(first.missing) == len(first.jobs) >= 2 * len(rows)
    first.prepare()
    first.run()
    numbers = {
        s.row.name: s.numbers for s in report.summarise_all(first.rows, first.shape, first.results)
    }
    assert numbers["uncompressed, simulated"]["kl"] == pytest.approx(0, abs=1e-6)
    for mode in ("exact", "quality"):
        engine = numbers[f"2bit, {mode}, uncalibrated"]
        simulated = numbers[f"2bit, {mode}, uncalibrated, simulated"]
        assert engine["kl"] > 1e-3, "two bits must show"
        assert engine["kl"] == pytest.approx(simulated["kl"], rel=0.01)
        assert engine["cosine"] == pytest.approx(simulated["cosine"], abs=0.1)
        assert engine["worst_cosine"] <= engine["cosine"] < 1
        assert engine["delta"] == pytest.approx(simulated["delta"], abs=2e-3)
    assert numbers["2bit, quality, uncalibrated"]["kl"] < numbers["2bit, exact, uncalibrated"]["kl"]

    lines = path.read_text().splitlines()
    assert len(lines) == len(first.jobs)
    path.write_text("\n".join(lines[:-3]) + "\n")
    again = suite.Suite(model, sizes, path, **given)
    lost = [json.loads(line) for line in lines[-3:]]
    assert {(job.row.name, job.unit.name) for job in again.missing} == {
        (line["row"], line["unit"]) for line in lost
    }
    again.prepare()
    again.run()
    again.prune()
    assert len(path.read_text().splitlines()) == len(first.jobs)
    text = report.markdown(again)
    assert "## Engine against simulation" in text and "| 2bit, quality |" in text

    monkeypatch.setattr(suite, "code_digest", lambda is_calibrated: "other code")
    assert len(suite.Suite(model, sizes, path, **given).missing) == len(first.jobs)
    assert not suite.Suite(model, sizes, path, **given, any_code=True).missing


def test_any_row_on_any_text(tmp_path, words, capsys):
    """`eval --row`: a line for each row and text, and the means; an uncompressed cache loses
    nothing."""
    from types import SimpleNamespace

    from vllm_fibquant.evaluation import trial

    rows = ["auto", 'fibquant_2bit {"mode": "exact", "calibrate": "none"}']
    given = SimpleNamespace(
        row=rows, text=[str(words)], tokens=96, chunks=2, dtype="float32", keys=0, haystack=None,
        json=tmp_path / "found.jsonl",
    )  # fmt: skip
    assert trial.run(Path(make_model("llama", tmp_path)), given) == 0
    found = [json.loads(line) for line in given.json.read_text().splitlines()]
    assert [result["row"] for result in found] == [row for row in rows for _ in range(2)]
    assert max(result["kl"] for result in found[:2]) < 1e-6 < 1e-3 < found[2]["kl"]
    lines = capsys.readouterr().out.splitlines()
    assert [line.startswith(rows[1]) for line in lines] == [False] * 3 + [True] * 2 + [False, True]
    assert "mean of 2" in lines[-1]

    given.keys, given.haystack, given.json = 20, tmp_path / "hay", tmp_path / "keys.jsonl"
    given.haystack.write_text(4 * (words.read_text() + " "))
    assert trial.run(tmp_path / "llama", given) == 0
    found = [json.loads(line) for line in given.json.read_text().splitlines()]
    right = [sum(sum(r["right"]) for r in found if r["row"] == row) for row in rows]
    lines = capsys.readouterr().out.splitlines()
    assert len(found) == 2 * 8
    assert [f"{n} of 20 keys" in line for n, line in zip(right, lines, strict=True)] == 2 * [True]
    assert f"only by {rows[0]}" in lines[1]


def test_long_retrieval_through_the_engine(tmp_path, words):
    """The uncompressed row finds what the plain model finds; a row of ours answers as many, and a
    dtype other than float32 is another result without simulated rows."""
    from dataclasses import replace

    from vllm_fibquant.evaluation import measure, suite
    from vllm_fibquant.evaluation.formats import Format
    from vllm_fibquant.evaluation.rows import all_rows
    from vllm_fibquant.evaluation.simulate import Simulator

    model, path = make_model("llama", tmp_path), tmp_path / "results.jsonl"
    sizes = replace(SMOKE, retrieval=(900,), num_retrieval=1)
    rows = [r for r in all_rows(sizes.step) if r.name in ("uncompressed", "2bit, quality", "q4_0")]
    given = {"rows": rows, "kinds": ["retrieval"], "haystack": words, "sources": ["prose"]}
    plan = suite.Suite(model, sizes, path, **given)
    assert [job.row.name for job in plan.jobs] == ["uncompressed", "2bit, quality"]
    plan.prepare()
    plan.run()
    simulator, unit = Simulator(model), plan.jobs[0].unit
    states = simulator.hidden(list(unit.tokens), Format())
    found = {row: result for (row, _), result in plan.results.items()}
    want = measure.measure_spans(simulator.logits, unit, states)
    assert {name: found["uncompressed"][name] for name in want} == want
    assert len(found["2bit, quality"]["right"]) == len(unit.spans) == 12
    other = suite.Suite(model, sizes, path, **given, dtype="bfloat16")
    assert len(other.missing) == 2 and all(row.engine for row in other.rows)


def test_texts_read_together_are_read_as_alone(tmp_path):
    """Of different lengths, two with one beginning, in mode quality: windows are each one's."""
    from vllm_fibquant.evaluation.engine import Engine
    from vllm_fibquant.evaluation.watch import AttentionWatch

    draw = random.Random(1)
    first, second, third = (
        [draw.randrange(2, VOCAB_SIZE) for _ in range(n)] for n in (150, 97, 131)
    )
    texts = [first, first[:40] + second, third]
    model = make_model("gemma2", tmp_path)
    options = {"calibrate": "none", "recent_window": 64}  # shorter than the texts
    read = []
    for together in (1, 3):
        engine = Engine(model, "fibquant_2bit", options, 16, 150, together)
        try:
            watch = AttentionWatch()
            states = engine.hidden(texts, watch)
            read.append((states, watch.summary(), engine.logits(states[0][-2:])))
        finally:
            engine.close()
    for alone, beside in zip(read[0][0], read[1][0], strict=True):
        torch.testing.assert_close(beside, alone, rtol=1e-3, atol=1e-3)
    assert [len(states) for states in read[0][0]] == [150, 137, 131]
    assert read[0][1] == pytest.approx(read[1][1], abs=1e-4)
    assert 0.5 < read[0][1]["worst_cosine"] < 0.9999, "two bits must show"
    assert read[0][2].shape == (2, VOCAB_SIZE)


def test_uncompressed_attention_is_exact(tmp_path):
    """Sliding windows and soft caps are the watch's too: nothing is lost where nothing is coded."""
    from vllm_fibquant.evaluation.engine import UNCOMPRESSED, Engine
    from vllm_fibquant.evaluation.watch import AttentionWatch

    draw = random.Random(2)
    text = [draw.randrange(2, VOCAB_SIZE) for _ in range(150)]
    engine = Engine(make_model("gemma2", tmp_path), UNCOMPRESSED, {}, 64, 150)
    try:
        watch = AttentionWatch()
        engine.hidden([text], watch)
    finally:
        engine.close()
    assert watch.summary()["worst_cosine"] == pytest.approx(1, abs=1e-5)


def test_a_step_that_is_no_text_is_refused():
    from vllm_fibquant.evaluation.engine import _Reading

    reading = _Reading([[5, 6, 7]])
    positions = torch.arange(3)
    with pytest.raises(RuntimeError, match="every step must go on with a text"):
        reading.begin(torch.tensor([5, 9, 7]), positions)
    reading = _Reading([[5, 6, 7]])
    reading.begin(torch.tensor([5, 6]), positions[:2])
    reading.end(torch.zeros(2, 4))
    with pytest.raises(RuntimeError, match="must be of 3 tokens, got 2"):
        reading.result()
