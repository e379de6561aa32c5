# SPDX-License-Identifier: Apache-2.0
"""The peers' tables: sizes as their formats say, weights in llama.cpp's order, runs that go on."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.peers import __main__ as peers
from benchmarks.peers import gguf_model, plot, report, shapes
from benchmarks.peers import worker as peers_worker
from benchmarks.peers.engines import random_tokens
from vllm_fibquant.evaluation.labels import label_collisions


@pytest.mark.parametrize(
    ("kind", "bits"),
    [
        ("q8_0", 8.5),
        ("u8", 9.0),
        ("turbo3", 3.5),
        ('fibquant_2bit {"mode": "exact"}', 2.25),
        ("fibquant_2bit", 2.25 + 16 * 132 / 8192),  # the newest 128 and first 4 in 16 bits as well
    ],
)
def test_everything_that_is_stored_is_counted(kind, bits):
    assert report.bits_of(kind, 64) == bits


def test_layers_that_hold_a_window_hold_the_same_copies():
    """One layer of two holds 512 tokens of 8,192, of which 132 are in 16 bits as well."""
    windows, copied = [512, None], 16 * (132 + 132) / (512 + 8192)
    assert report.bits_of("fibquant_2bit", 64, windows) == pytest.approx(2.25 + copied)
    assert report.bits_of("q8_0", 64, windows) == 8.5
    row = ROW | {"bench": "quality", "against": "q4_0", "windows": windows}
    assert f" {6480 * (512 + 8192) // (2 * 8192):,} | 0 |" in report.table([row], "m")


ROW = {"engine": "llama.cpp", "kind": "q4_0", "model": "m", "head_dim": 64, "cpu": "a",
       "vectors_per_token": 180}  # fmt: skip
SPEED = {"bench": "speed", "context": 1024, "tokens_per_second": 12.34, "threads": 2,
         "seconds": [1.0, 1.0, 1.0, 1.0], "version": "v1", "run": "today"}  # fmt: skip


def test_the_table_has_the_newest_result_of_each_cache():
    quality = {"bench": "quality", "against": "f16", "delta_ppl": 0.1, "kl": 0.05, "kl_999": 1.5}
    rows = [ROW | quality | {"kl": 9.0}, ROW | quality, ROW | SPEED]
    lines = report.table(rows, "m").splitlines()
    assert lines[2] == "| llama.cpp | `q4_0` | 4.50 | 6,480 | +10.0% | 0.0500 | 1.50 | 12.3 |"
    assert len(lines) == 3


def test_random_models_have_a_table_of_their_own_and_gaps_are_explained():
    shape = ROW | SPEED | {"model": "random-8x4x64"}
    gone = shape | {"context": 32768, "left_out": "too slow", "tokens_per_second": None}
    unsteady = shape | {"context": 8192, "seconds": [1.0, 1.0, 2.0, 2.0], "tokens_per_second": 3}
    rows = [ROW | SPEED, shape, gone | {"engine": "OpenVINO", "kind": "u4"}, unsteady]
    assert len(report.table(rows, "m").splitlines()) == 3
    lines = report.shapes_table(rows).splitlines()
    assert lines[0].endswith("8 x 4 x 64, 8,192 tokens | 8 x 4 x 64, 32,768 tokens |")
    assert lines[2:] == [
        "| llama.cpp | `q4_0` | 12.3 | 3.0 |  |",
        "| OpenVINO | `u4` |  |  | – |",
    ]
    assert report.about_speed(rows).splitlines() == [
        "Speeds of run today, a, 2 threads; v1.",
        "",
        "The middle half of the steps lay further than 15% from the median in 1 of 4 cells: "
        "llama.cpp `q4_0` on random-8x4x64 at 8,192.",
        "",
        "Left out (–): OpenVINO `u4` on random-8x4x64 at 32,768: too slow.",
    ]


def test_labels_of_a_plot_do_not_overlap(tmp_path):
    points = [plot.Point("llama.cpp", 4.5, 10 + i / 100, f"label{i}") for i in range(8)]
    (axis,) = plot.draw([plot.Panel("speed", points)], tmp_path / "a.png").axes
    assert label_collisions(axis) == []


def worker(monkeypatch, text: str, run=subprocess.Popen) -> None:
    """The worker is a script: its lines, and then as long as it takes."""
    monkeypatch.setattr(
        peers.subprocess, "Popen", lambda command, **to: run([sys.executable, "-c", text], **to)
    )


def measured(tmp_path, **options):
    (tmp_path / "config.json").write_text(
        '{"head_dim": 64, "num_hidden_layers": 1, "num_key_value_heads": 1}'
    )
    args = argparse.Namespace(
        out=tmp_path / "out.jsonl", run="one", kinds=["q4_0"], steps=4, limit=60
    )
    vars(args).update(options)
    peers.measure_speed(args, tmp_path, [16, 32], [("llama.cpp", sys.executable)])
    return [json.loads(line) for line in args.out.read_text().splitlines()]


RESULT = 'import time; print(\'RESULT {"context": 16, "seconds": [1, 2, 3]}\', flush=True); '


def test_what_exceeds_the_limit_is_left_out_and_a_stopped_run_goes_on(tmp_path, monkeypatch):
    worker(monkeypatch, RESULT + "time.sleep(60)")
    first, second = measured(tmp_path, limit=2)
    assert first["context"] == 16 and first["tokens_per_second"] == 0.5
    assert second["context"] == 32 and "within the 2 seconds" in second["left_out"]
    assert len(measured(tmp_path)) == 2  # nothing is left to measure under this name
    (tmp_path / "out.jsonl").write_text(json.dumps(second) + "\n")
    worker(monkeypatch, RESULT)
    assert [row["context"] for row in measured(tmp_path)] == [32, 16]


def test_a_cache_that_fails_is_left_out_with_its_error(tmp_path, monkeypatch):
    worker(monkeypatch, RESULT + "raise ValueError('no such cache')")
    first, second = measured(tmp_path)
    assert first["tokens_per_second"] == 0.5
    assert second["left_out"] == "it failed: ValueError: no such cache"


def test_a_random_model_has_the_shape_of_its_name(tmp_path):
    folder = shapes.make("random-8x4x64", tmp_path, 512)
    weights = dict(gguf_model.weights_of(folder))
    assert weights["model.layers.1.self_attn.q_proj.weight"].shape == (8 * 4 * 64, shapes.HIDDEN)
    assert weights["model.layers.0.self_attn.k_proj.weight"].shape == (8 * 64, shapes.HIDDEN)
    words = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    assert sorted(words.values()) == list(range(shapes.NUM_WORDS))
    assert max(random_tokens(1000, folder)) < shapes.NUM_WORDS


class Counting:
    """An engine whose logits say which token they are of, and where it stood."""

    def forget(self):
        self.length = 0

    def read(self, tokens):
        self.length += len(tokens)
        return np.array([[token, self.length] for token in tokens], np.float32)


def test_logits_are_written_a_piece_at_a_time(tmp_path):
    texts = [list(range(40)), list(range(100, 140))]
    peers_worker.quality(Counting(), texts, tmp_path / "logits.npy")
    logits = np.load(tmp_path / "logits.npy")
    assert logits.dtype == np.float32 and logits.shape == (2, 40, 2)
    assert logits[:, :, 0].tolist() == texts
    assert logits[1, :, 1].tolist() == [16] * 16 + [32] * 16 + [40] * 8


def test_a_peer_that_is_not_installed_is_left_out_with_a_sentence(capsys):
    assert peers.python_of("OpenVINO", Path("/nowhere/bin/python")) is None
    assert capsys.readouterr().out == (
        "OpenVINO: left out, /nowhere/bin/python cannot import openvino_genai; run: make peers\n"
    )
    assert peers.python_of("vLLM", Path("/nowhere/bin/python")) is not None


def test_every_model_of_words_has_a_part_of_its_own(tmp_path):
    page = tmp_path / "page.md"
    marks = [f"<!-- {name}: begin --><!-- {name}: end -->" for name in ("peers", "models", "speed")]
    page.write_text("\n".join(marks))
    widest = {"bench": "quality", "kind": "f16", "against": "f16", "version": "v1", "kl": 0.0}
    quality = {"bench": "quality", "against": "f16", "delta_ppl": 0.1, "kl": 0.05, "kl_999": 1.5,
               "version": "v1", "texts": ["text:2048:0"]}  # fmt: skip
    gone = {"bench": "quality", "engine": "OpenVINO", "kind": "u8", "left_out": "it failed: no"}
    rows = [ROW | quality, ROW | SPEED]
    rows += [row | {"model": "other"} for row in (ROW | widest | {"kl_vllm": 6.2e-6}, ROW | quality,
                                                  ROW | gone)]  # fmt: skip
    results = tmp_path / "rows.jsonl"
    results.write_text("\n".join(map(json.dumps, rows)))
    front = tmp_path / "front.md"
    front.write_text("a\n<!-- peers: begin -->old<!-- peers: end -->\nb")
    report.write(results, page, tmp_path, front)
    assert front.read_text().startswith(
        "a\n<!-- peers: begin -->\n| cache | bits a value | other |"
    )
    assert "\n| llama.cpp, `q4_0` | 4.5 | +10.0%, 0.0500 | +10.0%, 0.0500 |\n" in front.read_text()
    assert "\n| OpenVINO, `u8` | – | – | – |\n" in front.read_text()  # it failed
    first, rest = page.read_text().split("<!-- models: begin -->")
    assert "tokens/s" in first and "f16" not in first
    assert rest.split("<!-- models: end -->")[0].strip().splitlines() == [
        "### other",
        "",
        "| engine | cache | bits a value | bytes a token | ΔPPL | KL | "
        "KL of one position in a thousand |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
        "| llama.cpp | `f16` | 16.00 | 23,040 | 0 | 0 | 0 |",
        "| llama.cpp | `q4_0` | 4.50 | 6,480 | +10.0% | 0.0500 | 1.50 |",
        "| OpenVINO | `u8` | 9.00 | 12,960 | – | – | – |",
        "",
        "KL from vLLM's `auto`: of llama.cpp's `f16` 6e-06.",
        "",
        "Read: text:2048:0.",
        "",
        "v1.",
        "",
        "Left out (–): OpenVINO `u8` on other: it failed: no.",
        "",
        "![divergence against bits](images/peers-other.png)",
    ]
    assert (tmp_path / "peers-other.png").exists()


def test_the_documents_quote_what_was_measured():
    root = Path(__file__).parent.parent
    lines = (root / "docs" / "results" / "peers.jsonl").read_text().splitlines()
    rows = list(map(json.loads, lines))
    assert report.headline(rows) in (root / "README.md").read_text()
    page = (root / "docs" / "peers.md").read_text()
    assert all(report.table(rows, model) in page for model in report.text_models(rows))
