# SPDX-License-Identifier: Apache-2.0
"""One engine with one kind of cache, in a process of its own; prints JSON: one line of quality, one
of each context's speed as soon as it is known.

python -m benchmarks.peers.worker ENGINE KIND FOLDER quality TEXTS.json LOGITS.npy
python -m benchmarks.peers.worker ENGINE KIND FOLDER speed CONTEXTS STEPS
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.engines import ENGINES, STEP, LeftOut, Vllm, random_tokens


def quality(engine: Any, texts: list[list[int]], target: Path) -> None:
    """Writes the logits of all texts, float32 `[texts, tokens, vocabulary]`."""
    with target.open("wb") as file:
        for tokens in texts:
            for rows in pieces(engine, tokens):
                if file.tell() == 0:
                    shape = (len(texts), len(tokens), rows.shape[1])
                    about = {"descr": "<f4", "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(file, about)
                file.write(np.ascontiguousarray(rows, np.float32))


def pieces(engine: Any, tokens: list[int]) -> Iterator[np.ndarray]:
    """Logits of a text, float32 `[some tokens, vocabulary]`, in order: of 2,048 tokens and a large
    vocabulary all are 2 GB."""
    if isinstance(engine, Vllm):
        yield from engine.read_all(tokens)
        return
    engine.forget()
    for i in range(0, len(tokens), STEP):
        yield engine.read(tokens[i : i + STEP])


def steps(engine: Any, tokens: list[int], count: int) -> list[float]:
    """Seconds of each decode step of one request, greedy, after those tokens."""
    if isinstance(engine, Vllm):
        return engine.steps(tokens, count)
    engine.hold(tokens)
    seconds, token = [], tokens[0]
    for _ in range(count):
        begin = time.perf_counter()
        token = int(engine.read([token], last_only=True)[-1].argmax())
        seconds.append(time.perf_counter() - begin)
    return seconds[2:]


def main() -> None:
    name, kind, given, what, *rest = sys.argv[1:]
    folder, threads = Path(given), int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
    if what == "quality":
        texts = json.loads(Path(rest[0]).read_text())
        engine = ENGINES[name](folder, kind, len(texts[0]) + STEP, threads, True)
        quality(engine, texts, Path(rest[1]))
        tell(engine.about())
    else:
        contexts, count = sorted(int(n) for n in rest[0].split(",")), int(rest[1])
        room = (max(contexts) + 2 * count + 255) // 256 * 256
        engine = ENGINES[name](folder, kind, room, threads, False)
        tokens = random_tokens(max(contexts), folder)
        for context in contexts:
            try:
                found: dict[str, Any] = {"seconds": steps(engine, tokens[:context], count)}
            except LeftOut as reason:
                found = {"left_out": str(reason)}
            tell({"context": context, "threads": threads} | found | engine.about())
    os._exit(0)  # engines' own threads are not waited for


def tell(result: dict[str, Any]) -> None:
    print("RESULT " + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
