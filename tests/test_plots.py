# SPDX-License-Identifier: Apache-2.0
"""The labels of every plot in the documents, drawn from the results that are recorded: none lies
on another, on a mark, on the legend or outside."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

matplotlib = pytest.importorskip("matplotlib", reason="draws")

from benchmarks import plot as benchmark_plots  # noqa: E402
from benchmarks.peers import plot as peers  # noqa: E402
from benchmarks.peers import report  # noqa: E402
from vllm_fibquant.evaluation import models, plots  # noqa: E402
from vllm_fibquant.evaluation.labels import label_collisions  # noqa: E402

RESULTS = Path(__file__).parents[1] / "docs/results"


def rows(name):
    return [json.loads(line) for line in (RESULTS / name).read_text().splitlines()]


def recorded():
    return {
        m.name: [s for s in m.summaries.values() if s.num_texts]
        for m in models.read_models(RESULTS)
    }


FIGURES = {
    "peers": lambda path: [
        peers.draw(report.quality_panel(rows("peers.jsonl"), model), path)
        for model in report.text_models(rows("peers.jsonl"))
    ],
    "peers-shapes": lambda path: [peers.draw(report.shape_panels(rows("peers.jsonl")), path)],
    "list": lambda path: [benchmark_plots.search_lists(rows("list.jsonl"))],
    "frontier": lambda path: [plots.models_frontier(recorded())],
    "frontiers of models": lambda path: [plots.frontier(s) for s in recorded().values()],
}


@pytest.mark.parametrize("name", FIGURES)
def test_labels_lie_apart(name, tmp_path):
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    for figure in FIGURES[name](tmp_path / "a.png"):
        labels = [text.get_text() for axis in figure.axes for text in axis.texts]
        assert len(labels) > 5
        assert [label_collisions(axis) for axis in figure.axes] == [[]] * len(figure.axes)
        plt.close(figure)
