# SPDX-License-Identifier: Apache-2.0
"""`make peers`: engines that keep keys and values in fewer than 16 bits on CPUs, side by side.

    python -m benchmarks.peers --python .venv-peers/bin/python --out docs/results/peers.jsonl
    python -m benchmarks.peers --report-only

The same model (SmolLM2-135M-Instruct, or --model with another Llama) and the same texts in
llama.cpp, OpenVINO and vLLM, vLLM with its own caches and with ours; each engine's answers are
compared with those through its own widest cache. Every engine runs in a process of its own, the
peers in an environment of their own, and is left out with a sentence where it is not installed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.common import append, cpu_name, model_or_demo
from benchmarks.peers.engines import ENGINES

PACKAGES = {"llama.cpp": "llama_cpp", "OpenVINO": "openvino_genai"}
"""What each peer's environment must import."""


def python_of(engine: str, peers: Path) -> str | None:
    """The interpreter of an engine; None, with a sentence, if it is not installed there."""
    if engine not in PACKAGES:
        return sys.executable
    module = PACKAGES[engine]
    asked = [str(peers), "-c", f"import gguf, {module}"]
    if not peers.exists() or subprocess.run(asked, capture_output=True).returncode:
        print(f"{engine}: left out, {peers} cannot import {module}; run: make peers")
        return None
    return str(peers)


def model_folder(model: Path, peers: Path) -> Path:
    """A copy of the model with the peers' own files of it beside, below build/."""
    folder = Path("build/peers") / model.name
    if not folder.exists():
        shutil.copytree(model, folder)
    if not (folder / "model.gguf").exists() and peers.exists():
        made = [
            str(peers),
            "-m",
            "benchmarks.peers.gguf_model",
            str(folder),
            str(folder / "model.gguf"),
        ]
        if subprocess.run(made).returncode:
            (folder / "model.gguf").unlink(missing_ok=True)
    return folder


def work(python: str, engine: str, kind: str, folder: Path, *what: Any) -> dict[str, Any]:
    """What a worker returns; exits with the end of its output when it fails."""
    command = [python, "-m", "benchmarks.peers.worker", engine, kind, str(folder), *map(str, what)]
    run = subprocess.run(command, capture_output=True, text=True)
    for line in run.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))
    sys.exit(f"peers: {engine} {kind} failed:\n{run.stdout[-2000:]}\n{run.stderr[-3000:]}")


def quality(
    python: str, engine: str, kinds: list[str], folder: Path, texts: dict[str, list[int]]
) -> Iterator[dict[str, Any]]:
    """Every kind against the first of the engine's kinds, over all texts. What that says is kept
    beside the model: 400 MB for 2,048 tokens and 49,152 words."""
    import numpy as np
    import torch

    from vllm_fibquant.evaluation.measure import measure_text, quantile_of_worst

    widest = ENGINES[engine].KINDS[0]
    digest = hashlib.sha256(repr(texts).encode()).hexdigest()[:8]
    with tempfile.TemporaryDirectory(dir="build") as scratch:
        given, target = Path(scratch) / "texts.json", Path(scratch) / "logits.npy"
        given.write_text(json.dumps(list(texts.values())))
        for kind in kinds:
            kept = folder / f"{engine}-{digest}.npy"
            if kind == widest or not kept.exists():
                about = work(python, engine, widest, folder, "quality", given, target)
                shutil.move(target, kept)
            if kind != widest:
                about = work(python, engine, kind, folder, "quality", given, target)
            truth, logits = (
                torch.from_numpy(np.load(path, mmap_mode="c"))
                for path in (kept, kept if kind == widest else target)
            )
            results = [
                measure_text(lambda rows: rows, tokens, truth[i], logits[i], len(tokens) // 2)
                for i, tokens in enumerate(texts.values())
            ]
            increase = statistics.fmean(r["loss_increase"] for r in results)
            yield {
                "kind": kind, "against": widest, **about, "texts": list(texts),
                "perplexity": [float(f"{np.exp(r['loss']):.5g}") for r in results],
                "delta_ppl": float(np.expm1(increase)),
                "kl": statistics.fmean(r["kl"] for r in results),
                "kl_texts": [r["kl"] for r in results], "kl_999": quantile_of_worst(results),
                "same": statistics.fmean(r["same"] for r in results),
            }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers")
    parser.add_argument("--model", help="folder of a Llama model; the demo model when left out")
    parser.add_argument("--python", type=Path, default=Path(".venv-peers/bin/python"))
    parser.add_argument(
        "--what", nargs="+", choices=("quality", "speed"), default=["quality", "speed"]
    )
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--kinds", nargs="+", help="of one engine; all when left out")
    parser.add_argument("--text", nargs="+", default=["prose", "code"], help="prose, code or files")
    parser.add_argument("--tokens", type=int, default=2048, help="of each text")
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 8192])
    parser.add_argument("--steps", type=int, default=26)
    parser.add_argument("--out", type=Path, default=Path("docs/results/peers.jsonl"))
    parser.add_argument("--report-only", action="store_true")
    args = parser.parse_args()
    if not args.report_only:
        measure(args)
    from benchmarks.peers.report import write

    write(args.out, Path("docs/peers.md"), Path("docs/images/peers.png"))


def measure(args: argparse.Namespace) -> None:
    folder = model_folder(Path(model_or_demo(args.model)), args.python)
    pythons = {name: python_of(name, args.python) for name in args.engines}
    found = [(name, python) for name, python in pythons.items() if python]
    config = json.loads((folder / "config.json").read_text())
    common = {
        "model": folder.name, "cpu": cpu_name(), "head_dim": config["head_dim"],
        "vectors_per_token": 2 * config["num_hidden_layers"] * config["num_key_value_heads"],
    }  # fmt: skip
    if "quality" in args.what:
        from vllm_fibquant.evaluation.texts import Tokenizer, text_units

        units = text_units(Tokenizer(str(folder)), args.text, args.tokens, 1)
        texts = {unit.name: list(unit.tokens) for unit in units}
        for name, python in found:
            kinds = args.kinds or list(ENGINES[name].KINDS)
            for row in quality(python, name, kinds, folder, texts):
                append(args.out, bench="quality", engine=name, **common, **row)
                told = f"{row['delta_ppl']:8.2%} {row['kl']:.5f} {row['kl_999']:.4f}"
                print(f"{name:10} {row['kind']:34} {told}", flush=True)
    if "speed" in args.what:
        contexts = ",".join(map(str, sorted(args.contexts)))
        for name, python in found:
            for kind in args.kinds or ENGINES[name].KINDS:
                about = work(python, name, kind, folder, "speed", contexts, args.steps)
                told = f"{name:10} {kind:34}"
                for context, seconds in about.pop("seconds").items():
                    row = {"context": int(context), "seconds": seconds, **about}
                    row["tokens_per_second"] = 1 / statistics.median(seconds)
                    append(args.out, bench="speed", engine=name, kind=kind, **common, **row)
                    told += f" {row['tokens_per_second']:8.1f} tokens/s at {context}"
                print(told, flush=True)


if __name__ == "__main__":
    main()
