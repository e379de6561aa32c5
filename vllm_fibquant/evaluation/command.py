# SPDX-License-Identifier: Apache-2.0
"""`vllm-fibquant eval`: its arguments, and what it writes."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_fibquant.evaluation.suite import Suite


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", help="folder of a model; default: the demo model")
    parser.add_argument("--quick", action="store_true", help="few rows and short texts: minutes")
    parser.add_argument("--out", type=Path, default=Path("evaluation"), metavar="DIR",
                        help="results and tables; a stopped run goes on there")  # fmt: skip
    parser.add_argument("--images", type=Path, metavar="DIR", help="plots; default: as --out")
    parser.add_argument("--jobs", type=int, default=2, metavar="N",
                        help="processes that rows are shared among; default: 2")  # fmt: skip
    parser.add_argument("--threads", type=int, default=1,
                        help="of each process; default: 1")  # fmt: skip
    parser.add_argument("--row", action="append", metavar="PRESET [JSON]",
                        help="measure these alone, through the engine, and print them: a "
                        "--kv-cache-dtype, and the fibquant options it is to have; can be given "
                        "several times")  # fmt: skip
    parser.add_argument("--text", nargs="+", metavar="FILE",
                        help="read these texts instead of the project's own, which are called "
                        "prose and code")  # fmt: skip
    parser.add_argument("--tokens", type=int, default=2048, help="of a text of --row")
    parser.add_argument("--chunks", type=int, default=2, help="texts of each file of --row")
    parser.add_argument("--step", type=int, default=16, metavar="N",
                        help="tokens of a text read at once in mode quality; default: 16")  # fmt: skip
    parser.add_argument("--dtype", default="float32", help="of the model in --row")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append results of --row here")
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--report", action="store_true",
                        help="measure nothing: tables and plots of what is there")  # fmt: skip
    parser.add_argument("--any-code", action="store_true",
                        help="take results that other versions of the code measured")  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Measures and reports; returns the exit status."""
    import torch

    from vllm_fibquant.demo_model import ensure_demo_model
    from vllm_fibquant.evaluation.plots import draw_all
    from vllm_fibquant.evaluation.report import markdown, summarise_all
    from vllm_fibquant.evaluation.suite import Suite
    from vllm_fibquant.evaluation.texts import QUICK, Sizes

    for name in ("threads", "jobs"):
        if getattr(options, name) < 1:
            given = getattr(options, name)
            raise ValueError(f"--{name} must be at least 1, got {given}; leave it out")
    model = Path(options.model) if options.model else ensure_demo_model()
    if not (model / "config.json").is_file():
        raise ValueError(
            f"eval: model must be a folder with a config.json, got {str(model)!r}; "
            "download it first"
        )
    torch.set_num_threads(options.threads)
    if options.row:
        from vllm_fibquant.evaluation import trial

        options.model = model
        return trial.run(options)
    name = "evaluation-quick" if options.quick else "evaluation"
    suite = Suite(
        str(model),
        QUICK if options.quick else Sizes(),
        options.out / f"{name}.jsonl",
        quick=options.quick,
        any_code=options.any_code or options.report,
        continuations=None if options.part is None else json.load(sys.stdin),
    )
    if options.part is not None:
        suite.run(options.part, options.jobs)
        return 0
    if not options.report:
        _run_parts(suite, options.jobs)
        suite.read()
        if suite.missing:
            print(f"eval: {len(suite.missing)} results are missing, see above", file=sys.stderr)
            return 1
        suite.prune()
    text = markdown(suite)
    (options.out / f"{name}.md").write_text(f"# Evaluation\n\n{text}")
    print(text)
    for path in draw_all(summarise_all(suite), options.images or options.out, name):
        print(f"drew {path}", file=sys.stderr)
    return 0


def _run_parts(suite: Suite, jobs: int) -> None:
    """Measures in `jobs` processes; one that fails does not stop the others."""
    if jobs == 1 or not suite.missing:
        return suite.run()
    command = [sys.executable, "-m", "vllm_fibquant", *sys.argv[1:], "--part"]
    parts = [
        subprocess.Popen([*command, str(part)], stdin=subprocess.PIPE, text=True)
        for part in range(jobs)
    ]
    try:
        for process in parts:
            json.dump(suite.continuations, process.stdin)  # type: ignore[arg-type]
            process.stdin.close()  # type: ignore[union-attr]
        for process in parts:
            process.wait()
    finally:
        for process in parts:
            process.terminate()
