# SPDX-License-Identifier: Apache-2.0
"""`make peers`: engines that keep keys and values in fewer than 16 bits on CPUs, side by side.

    python -m benchmarks.peers --python .venv-peers/bin/python --out docs/results/peers.jsonl
    python -m benchmarks.peers --what speed --run 2026-11-29
    python -m benchmarks.peers --report-only

The same model (SmolLM2-135M-Instruct, or --model with another Llama, a Qwen2 or a Gemma 3) and the
same texts in llama.cpp, OpenVINO and vLLM, vLLM with its own caches and with ours; each engine's
answers are compared with those through its own widest cache, and these with vLLM's. Speed is
measured on that model and on the random ones of shapes.py. Every engine runs in a process of its
own, the peers in an environment of their own, and is left out with a sentence where it is not
installed. Each result is written at once: what a run of the same name has is not measured again.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.common import append, cpu_name, model_or_demo
from benchmarks.peers.engines import ENGINES
from benchmarks.peers.report import key_of, write
from benchmarks.peers.shapes import SHAPES, make

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
    """The model's files with the peers' own files of it beside, below build/."""
    folder = Path("build/peers") / model.name
    if not folder.exists():
        shutil.copytree(model.resolve(), folder, copy_function=os.symlink)
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


def work(
    python: str, engine: str, kind: str, folder: Path, *what: Any, limit: float | None = None
) -> Iterator[dict[str, Any]]:
    """What a worker returns, as it comes, for at most `limit` seconds.

    Raises:
        RuntimeError: It failed: the end of its output.
    """
    command = [python, "-m", "benchmarks.peers.worker", engine, kind, str(folder), *map(str, what)]
    with tempfile.TemporaryFile("w+") as told:
        run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=told, text=True)
        late = threading.Event()
        clock = threading.Timer(limit or 1e6, lambda: (late.set(), run.kill()))
        clock.daemon = True
        clock.start()
        assert run.stdout is not None
        for line in run.stdout:
            if line.startswith("RESULT "):
                yield json.loads(line.removeprefix("RESULT "))
        failed = run.wait()
        clock.cancel()
        if failed and not late.is_set():
            told.seek(0)
            raise RuntimeError(f"{engine} {kind} failed, status {failed}:\n{told.read()[-3000:]}")


def quality(
    python: str, engine: str, kind: str, folder: Path, texts: dict[str, list[int]]
) -> dict[str, Any]:
    """A kind of cache against the engine's widest, the first of its kinds, over all texts; of the
    widest also the divergence from vLLM's. What the widest says is kept beside the model: 1.2 GB
    for 3 x 2,048 tokens and 49,152 words.

    Raises:
        RuntimeError: The engine failed: the end of its output.
    """
    widest = ENGINES[engine].KINDS[0]
    digest = hashlib.sha256(repr(texts).encode()).hexdigest()[:8]
    kept, ours = (folder / f"{name}-{digest}.npy" for name in (engine, "vLLM"))
    with tempfile.TemporaryDirectory(dir="build") as scratch:
        given, target = Path(scratch) / "texts.json", Path(scratch) / "logits.npy"
        given.write_text(json.dumps(list(texts.values())))
        if kind == widest or not kept.exists():
            (about,) = work(python, engine, widest, folder, "quality", given, target)
            shutil.move(target, kept)
        if kind != widest:
            (about,) = work(python, engine, kind, folder, "quality", given, target)
        compared = compare(kept, kept if kind == widest else target, texts)
        if kind == widest and engine != "vLLM" and ours.exists():
            compared["kl_vllm"] = compare(ours, kept, texts)["kl"]
    return {"kind": kind, "against": widest, **about, **compared}


def compare(true: Path, read: Path, texts: dict[str, list[int]]) -> dict[str, Any]:
    """The logits of all texts in one file against those in another."""
    import numpy as np
    import torch

    from vllm_fibquant.evaluation.measure import measure_text, quantile_of_worst

    truth, logits = (torch.from_numpy(np.load(path, mmap_mode="c")) for path in (true, read))
    results = [
        measure_text(lambda rows: rows, tokens, truth[i], logits[i], len(tokens) // 2)
        for i, tokens in enumerate(texts.values())
    ]
    increase = statistics.fmean(r["loss_increase"] for r in results)
    return {
        "texts": list(texts),
        "perplexity": [float(f"{np.exp(r['loss']):.5g}") for r in results],
        "delta_ppl": float(np.expm1(increase)),
        "kl": statistics.fmean(r["kl"] for r in results),
        "kl_texts": [r["kl"] for r in results], "kl_999": quantile_of_worst(results),
        "same": statistics.fmean(r["same"] for r in results),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers")
    parser.add_argument(
        "--model", help="folder of a Llama, Qwen2 or Gemma 3; the demo model when left out"
    )
    parser.add_argument("--python", type=Path, default=Path(".venv-peers/bin/python"))
    parser.add_argument(
        "--what", nargs="+", choices=("quality", "speed"), default=["quality", "speed"]
    )
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--kinds", nargs="+", help="of one engine; all when left out")
    parser.add_argument("--text", nargs="+", default=["prose", "code"], help="prose, code or files")
    parser.add_argument("--tokens", type=int, default=2048, help="of each text")
    parser.add_argument("--contexts", type=int, nargs="+", help="of speed; the model's own else")
    parser.add_argument(
        "--shapes",
        nargs="*",
        choices=SHAPES,
        default=list(SHAPES),
        help="random models whose speed is measured besides the model's",
    )
    parser.add_argument("--limit", type=float, default=300, help="seconds of a cache's speed")
    parser.add_argument("--run", default=datetime.date.today().isoformat(),
                        help="the run's name: what it has is not measured again")  # fmt: skip
    parser.add_argument("--steps", type=int, default=26)
    parser.add_argument("--out", type=Path, default=Path("docs/results/peers.jsonl"))
    parser.add_argument("--report-only", action="store_true")
    args = parser.parse_args()
    if not args.report_only:
        measure(args)
    write(args.out, Path("docs/peers.md"), Path("docs/images"), Path("README.md"))


def facts_of(folder: Path) -> dict[str, Any]:
    """What every result of a model says about it."""
    config = json.loads((folder / "config.json").read_text())
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    kinds = config.get("layer_types") or ["full_attention"] * config["num_hidden_layers"]
    return {
        "model": folder.name, "cpu": cpu_name(), "head_dim": head_dim,
        "vectors_per_token": 2 * config["num_hidden_layers"] * config["num_key_value_heads"],
        "windows": [config["sliding_window"] if k == "sliding_attention" else None for k in kinds],
    }  # fmt: skip


def already(args: argparse.Namespace) -> set[tuple[Any, ...]]:
    """What a run of this name has written: its results go on where it was stopped."""
    if not args.out.exists():
        return set()
    rows = [json.loads(line) for line in args.out.read_text().splitlines()]
    return {key_of(row) for row in rows if row.get("run") == args.run}


def measure(args: argparse.Namespace) -> None:
    pythons = {name: python_of(name, args.python) for name in args.engines}
    found = [(name, python) for name, python in pythons.items() if python]
    folder = model_folder(Path(model_or_demo(args.model)), args.python)
    if "quality" in args.what:
        measure_quality(args, folder, found)
    if "speed" in args.what:
        measure_speed(args, folder, args.contexts or [1024, 8192], found)
        for name in args.shapes:
            contexts = args.contexts or SHAPES[name].contexts
            made = make(name, Path("build/shapes"), max(SHAPES[name].contexts) + 256)
            measure_speed(args, model_folder(made, args.python), contexts, found)


def measure_quality(args: argparse.Namespace, folder: Path, engines: list[tuple[str, str]]) -> None:
    from vllm_fibquant.evaluation.texts import Tokenizer, text_units

    units = text_units(Tokenizer(str(folder)), args.text, args.tokens, 1)
    texts, common = {unit.name: list(unit.tokens) for unit in units}, facts_of(folder)
    # vLLM first: the others' widest caches are compared with its.
    for name, python in sorted(engines, key=lambda engine: engine[0] != "vLLM"):
        for kind in args.kinds or ENGINES[name].KINDS:
            base = {"bench": "quality", "run": args.run, "engine": name, "kind": kind, **common}
            if key_of(base) in already(args):
                continue
            try:
                row = quality(python, name, kind, folder, texts)
                told = f"{row['delta_ppl']:8.2%} {row['kl']:.5f} {row['kl_999']:.4f}"
            except RuntimeError as failure:
                told = "it failed: " + str(failure).strip().splitlines()[-1]
                row = {"left_out": told}
            append(args.out, **base | row)
            print(f"{name:10} {kind:34} {told}", flush=True)


def measure_speed(
    args: argparse.Namespace, folder: Path, contexts: list[int], engines: list[tuple[str, str]]
) -> None:
    common = facts_of(folder)
    for name, python in engines:
        # f32 is what the others are compared with.
        for kind in args.kinds or [kind for kind in ENGINES[name].KINDS if kind != "f32"]:
            base = {"bench": "speed", "run": args.run, "engine": name, "kind": kind, **common}
            has = already(args)
            todo = [n for n in contexts if key_of(base | {"context": n}) not in has]
            if not todo:
                continue
            why = f"it did not come within the {args.limit:.0f} seconds of a cache"
            asked = ",".join(map(str, todo)), args.steps
            try:
                for row in work(python, name, kind, folder, "speed", *asked, limit=args.limit):
                    if "seconds" in row:
                        row["tokens_per_second"] = 1 / statistics.median(row["seconds"])
                    append(args.out, **base, **row)
                    todo.remove(row["context"])
                    told = row.get("left_out") or f"{row['tokens_per_second']:8.1f} tokens/s"
                    print(
                        f"{folder.name} {name} {kind} after {row['context']:,}: {told}", flush=True
                    )
            except RuntimeError as failure:
                print(failure, file=sys.stderr)
                why = "it failed: " + str(failure).strip().splitlines()[-1]
            for context in todo:
                append(args.out, **base, context=context, left_out=why)
                print(f"{folder.name} {name} {kind} after {context:,}: {why}", flush=True)


if __name__ == "__main__":
    main()
