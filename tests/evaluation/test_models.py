# SPDX-License-Identifier: Apache-2.0
"""Tables over several models, and labels of plots."""

from __future__ import annotations

import json

import pytest

from vllm_fibquant.evaluation import models
from vllm_fibquant.evaluation.labels import label_collisions, place_labels


def line(row, unit, increase, kl, **more):
    far = {f"far_{n}": x for n, x in (("num", 9), ("loss_increase", 0), ("kl", kl), ("same", 1))}
    return {"row": row, "unit": unit, "kind": "text", "num": 100, "loss": 3.0, "kl": kl,
            "loss_increase": increase, "same": 0.9, "worst": [10 * kl], **far, **more}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """Two models; the second has no row of mode exact."""
    for name, head_dim, factor in (("small", 64, 1), ("large", 128, 2)):
        home = tmp_path / name
        home.mkdir()
        shape = {"num_layers": 2, "num_kv_heads": 1, "head_dim": head_dim, "num_positions": 4096}
        (home / "model.json").write_text(json.dumps(shape))
        rows = ["3bit, quality", "q4_0"] + ["3bit, exact"] * (name == "small")
        lines = [
            line(row, unit, 0.01 * factor, 0.002 * factor, cosine=0.99, worst_cosine=0.98)
            for row in rows
            for unit in ("prose", "code")
        ]
        lines.append({"row": "3bit, quality", "unit": "retrieval:x:4096:1", "kind": "retrieval",
                      "right": [True, False]})  # fmt: skip
        (home / "evaluation.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return tmp_path


def test_the_worst_model_stands_beside_the_mean(folder):
    found = models.read_models(folder)
    assert [m.name for m in found] == ["large", "small"]
    rows = {row.row.name: row for row in models.across(found)}
    assert [rows[n].num_models for n in ("3bit, quality", "q4_0", "3bit, exact")] == [2, 2, 1]
    block = models.readme_block(found, ("3bit, quality", "q4_0", "3bit, exact"))
    lines = block.splitlines()
    assert len(lines) == 5
    assert lines[2] == (
        "| `fibquant_3bit` (the default) | 3.64–3.77 | 2 | **2.0%** | 1.5% | **0.0040** | 0.0030 "
        "| 0.040 | 90.0% |"
    )
    text = models.markdown(found)
    assert "1/2 in 4,096" in text and "0.9900, 0.9800" in text


def test_what_was_measured_again_counts_once(folder):
    path = folder / "small" / "evaluation.jsonl"
    again = json.dumps(line("3bit, quality", "prose", 0.01, 0.1)) + "\n"
    path.write_text(path.read_text() + again)
    summary = models.read_models(folder)[1].summaries["3bit, quality"]
    assert summary.num_texts == 2
    assert summary.get("kl") == pytest.approx((0.1 + 0.002) / 2)


def test_the_frontier_is_drawn(folder):
    path = models.draw(models.read_models(folder), folder / "images")
    assert path.stat().st_size > 10_000


def test_labels_lie_beside_each_other():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4))
    points = [(0.5 + 0.01 * i, 0.5 + 0.005 * i, f"label {i}", "black") for i in range(9)]
    axis.plot([p[0] for p in points], [p[1] for p in points], "o")
    axis.set_xlim(0, 1)
    axis.set_ylim(0, 1)
    place_labels(axis, points, 8)
    assert len([text for text in axis.texts if text.get_text()]) == 9
    assert label_collisions(axis) == []
    axis.annotate("label 0", points[0][:2])  # on a mark: what the check is for
    assert label_collisions(axis)
    plt.close(figure)
