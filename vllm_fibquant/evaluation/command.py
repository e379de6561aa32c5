# SPDX-License-Identifier: Apache-2.0
"""`vllm-fibquant eval`: its arguments, and what it writes."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_fibquant.evaluation.suite import Suite

SMALL_BYTES = 1 << 30
"""Weights up to which rows are measured in two processes: they are held in float32 in each."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", help="folder of a model; default: the demo model")
    parser.add_argument("--quick", action="store_true", help="few rows and short texts: minutes")
    parser.add_argument("--rows", choices=("all", "core", "main"), default="all",
                        help="main: presets alone; core: with what they are compared with on every "
                        "model; all: variants and checks too")  # fmt: skip
    parser.add_argument("--row", action="append", metavar="'PRESET JSON'",
                        help="measure this alone, through the engine, and print it: a "
                        "--kv-cache-dtype and the fibquant options it is to have, if any, in one "
                        "pair of quotes; can be given several times")  # fmt: skip
    parser.add_argument("--text", nargs="+", metavar="FILE", default=["prose", "code"],
                        help="read these texts; prose and code are the project's own, and the "
                        "default")  # fmt: skip
    parser.add_argument("--tokens", type=int, metavar="N", help="of a text; default: 2048")
    parser.add_argument("--chunks", type=int, metavar="N", help="texts of a file; default: 2")
    parser.add_argument("--kinds", nargs="+", metavar="KIND",
                        help="measure these alone: fidelity, text, passkey, greedy, "
                        "retrieval")  # fmt: skip
    parser.add_argument("--haystack", type=Path, metavar="FILE",
                        help="text, SQuAD or HotpotQA file that long retrieval hides keys in; "
                        "with --keys, a text file")  # fmt: skip
    parser.add_argument("--keys", type=int, default=0, metavar="N",
                        help="with --row: ask for about so many pass keys instead of reading "
                        "texts")  # fmt: skip
    parser.add_argument("--lengths", type=int, nargs="+", metavar="N",
                        help="tokens of long retrieval's texts; default: 4096 8192")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("evaluation"), metavar="DIR",
                        help="results and tables, in a folder for each model; a stopped run goes "
                        "on there")  # fmt: skip
    parser.add_argument("--images", type=Path, metavar="DIR", help="plots; default: as --out")
    parser.add_argument("--jobs", type=int, metavar="N",
                        help="processes that rows are shared among; default: 2 for models below "
                        "1 GiB, else 1")  # fmt: skip
    parser.add_argument("--threads", type=int, metavar="N",
                        help="of each process; default: an equal share of the CPUs")  # fmt: skip
    parser.add_argument("--report", action="store_true",
                        help="measure nothing: tables and plots of the models that there are "
                        "results for")  # fmt: skip
    parser.add_argument("--any-code", action="store_true",
                        help="take results that other versions of the code measured")  # fmt: skip
    parser.add_argument("--dtype", default="float32", help="of the model in the engine; another "
                        "than float32 leaves simulated rows out")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="append results of --row here")
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)


def run(options: argparse.Namespace) -> int:
    """Measures and reports; returns the exit status."""
    import torch

    from vllm_fibquant.evaluation.plots import draw_all
    from vllm_fibquant.evaluation.report import markdown, summarise_all

    for name in ("threads", "jobs", "tokens", "chunks"):
        given = getattr(options, name)
        if given is not None and given < 1:
            raise ValueError(f"--{name} must be at least 1, got {given}; leave it out")
    if options.report and options.model is None:
        return _report_models(options)
    model = _model_folder(options.model)
    jobs = options.jobs or (2 if _weight_bytes(model) < SMALL_BYTES and not options.row else 1)
    torch.set_num_threads(options.threads or max(1, len(os.sched_getaffinity(0)) // jobs))
    if options.row:
        from vllm_fibquant.evaluation import trial

        return trial.run(model, options)
    with tempfile.TemporaryDirectory() as scratch:
        suite = _suite(model, options, options.folder or Path(scratch))
        if options.part is not None:
            suite.run(options.part, jobs)
            return 0
        if not options.report:
            suite.keep_shape()
            suite.prepare()
            _run_parts(suite, jobs)
            suite.read()
            suite.prune()
    text = markdown(suite)
    suite.path.with_suffix(".md").write_text(f"# {model.name}\n\n{text}")
    print(text)
    images = (options.images or options.out) / model.name
    for path in draw_all(
        summarise_all(suite.rows, suite.shape, suite.results), images, suite.path.stem
    ):
        print(f"drew {path}", file=sys.stderr)
    if suite.missing and not options.report:
        print(f"eval: {len(suite.missing)} results are missing, see above", file=sys.stderr)
        return 1
    return 0 if options.quick else _report_models(options)


def _suite(model: Path, options: argparse.Namespace, folder: Path) -> Suite:
    from dataclasses import replace

    from vllm_fibquant.evaluation.rows import all_rows
    from vllm_fibquant.evaluation.suite import ALL_KINDS, Suite
    from vllm_fibquant.evaluation.texts import EVALUATION, QUICK, Sizes

    sizes = QUICK if options.quick else Sizes()
    sizes = replace(
        sizes, chunk=options.tokens or sizes.chunk, num_chunks=options.chunks or sizes.num_chunks
    )
    sizes = replace(sizes, far=min(sizes.far, sizes.chunk // 2))
    if options.lengths:
        sizes = replace(sizes, retrieval=tuple(options.lengths))
    unknown = set(options.kinds or ()) - set(ALL_KINDS)
    if unknown:
        raise ValueError(f"--kinds must be of {', '.join(ALL_KINDS)}, got {unknown}; leave it out")
    rows = [
        row
        for row in all_rows(sizes.step)
        if options.rows == "all" or row.main or (row.core and options.rows == "core")
    ]
    name = "evaluation-quick" if options.quick else "evaluation"
    return Suite(
        str(model), sizes, options.out / model.name / f"{name}.jsonl", rows=rows,
        quick=options.quick, any_code=options.any_code or options.report, sources=options.text,
        kinds=options.kinds or ALL_KINDS, haystack=options.haystack or EVALUATION, folder=folder,
        dtype=options.dtype,
    )  # fmt: skip


def _report_models(options: argparse.Namespace) -> int:
    """Tables and plots over all models with results in --out."""
    from vllm_fibquant.evaluation import models

    found = models.read_models(options.out)
    if not found:
        raise ValueError(f"--report: --out must have results, got {options.out}; measure a model")
    (options.out / "evaluation.md").write_text(f"# Evaluation\n\n{models.markdown(found)}")
    path = models.draw(found, options.images or options.out)
    print(f"wrote {options.out / 'evaluation.md'}, drew {path}", file=sys.stderr)
    return 0


def _model_folder(given: str | None) -> Path:
    from vllm_fibquant.demo_model import ensure_demo_model

    model = Path(given) if given else ensure_demo_model()
    if not (model / "config.json").is_file():
        raise ValueError(
            f"eval: model must be a folder with a config.json, got {str(model)!r}; "
            "download it first"
        )
    # Results are filed under the folder's name, which `.` and `..` do not say.
    return model if model.name not in ("", "..") else model.resolve()


def _weight_bytes(model: Path) -> int:
    return sum(path.stat().st_size for path in model.glob("*.safetensors"))


def _run_parts(suite: Suite, jobs: int) -> None:
    """Measures in `jobs` processes; one that fails does not stop the others."""
    if jobs == 1 or not suite.missing:
        return suite.run()
    command = [sys.executable, "-m", "vllm_fibquant", *sys.argv[1:]]
    command += ["--folder", str(suite.folder), "--jobs", str(jobs), "--part"]
    parts = [subprocess.Popen([*command, str(part)]) for part in range(jobs)]
    try:
        for process in parts:
            process.wait()
    finally:
        for process in parts:
            process.terminate()
