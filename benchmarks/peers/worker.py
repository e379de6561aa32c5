# SPDX-License-Identifier: Apache-2.0
"""One engine with one kind of cache, in a process of its own; prints one line of JSON.

python -m benchmarks.peers.worker ENGINE KIND FOLDER quality TEXTS.json LOGITS.npy
python -m benchmarks.peers.worker ENGINE KIND FOLDER speed CONTEXTS STEPS
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.engines import BATCH, ENGINES, STEP, Vllm, random_tokens


def quality(engine: Any, texts: list[list[int]], target: Path) -> None:
    """Writes the logits of all texts, float32 `[texts, tokens, vocabulary]`."""
    logits = None
    for number, tokens in enumerate(texts):
        if isinstance(engine, Vllm):
            rows = engine.read_all(tokens)
        else:
            engine.forget()
            pieces = [tokens[i : i + STEP] for i in range(0, len(tokens), STEP)]
            rows = np.concatenate([engine.read(piece) for piece in pieces])
        if logits is None:
            shape = (len(texts), *rows.shape)
            logits = np.lib.format.open_memmap(str(target), "w+", np.float32, shape)
        logits[number] = rows


def speed(engine: Any, contexts: list[int], count: int) -> dict[int, list[float]]:
    """Seconds of each decode step of one request, greedy, after contexts of random tokens."""
    if isinstance(engine, Vllm):
        return {context: engine.steps(context, count) for context in contexts}
    found, tokens, done = {}, random_tokens(max(contexts)), 0
    for context in sorted(contexts):
        while done < context:
            piece = tokens[done : min(done + BATCH, context)]
            row = engine.read(piece, last_only=True)
            done += len(piece)
        seconds = []
        for _ in range(count):
            begin = time.perf_counter()
            row = engine.read([int(row[-1].argmax())], last_only=True)
            seconds.append(time.perf_counter() - begin)
        found[context] = seconds[2:]
        done += count
    return found


def main() -> None:
    name, kind, folder, what, *rest = sys.argv[1:]
    threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
    if what == "quality":
        texts = json.loads(Path(rest[0]).read_text())
        engine = ENGINES[name](Path(folder), kind, len(texts[0]) + STEP, threads, True)
        quality(engine, texts, Path(rest[1]))
        result: dict[str, Any] = {}
    else:
        contexts, count = [int(n) for n in rest[0].split(",")], int(rest[1])
        room = (max(contexts) + 2 * count + 255) // 256 * 256
        engine = ENGINES[name](Path(folder), kind, room, threads, False)
        result = {"seconds": speed(engine, contexts, count), "threads": threads}
    print("RESULT " + json.dumps(result | engine.about()), flush=True)
    os._exit(0)  # engines' own threads are not waited for


if __name__ == "__main__":
    main()
