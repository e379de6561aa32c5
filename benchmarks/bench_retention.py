# SPDX-License-Identifier: Apache-2.0
"""Perplexity along a text many times longer than what a request may keep, and its blocks.

The text is the reference documentation that ships with Python. Beside our cache with a bound:
without one, the newest tokens alone (no first ones), and two truths of vLLM's own cache: the whole
text, and, for every 64 tokens of it, a fresh prompt of the first tokens and the newest alone, at
positions of their own, as StreamingLLM's own comparison with recomputation does. Only tokens that
all of them score are counted: those beyond what is kept.

    python -m benchmarks.bench_retention --out retention.jsonl
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks.common import add_out, append, model_or_demo, run_apart

STRIDE = 64  # tokens scored by one fresh prompt
NUM_SEGMENTS = 4
FIRST = 4


def formats(preset: str, kept: int) -> list[tuple[str, str, dict[str, Any]]]:
    """(label, --kv-cache-dtype, fibquant options) of all that is measured."""
    return [
        ("auto, everything", "auto", {}),
        (f"auto, recomputed from {kept}", "auto", {}),
        (f"{preset}, everything", preset, {}),
        (f"{preset}, {FIRST} + {kept - FIRST}", preset,
         {"retain": {"first": FIRST, "recent": kept - FIRST}}),
        (f"{preset}, 0 + {kept}", preset, {"retain": {"first": 0, "recent": kept}}),
    ]  # fmt: skip


def score(args: argparse.Namespace) -> None:
    """Scores one format in this process; prints one JSON line."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
    from pydoc_data import topics

    from vllm import LLM, SamplingParams

    label, dtype, options = json.loads(args.score)
    llm = LLM(
        args.model, dtype="float32", enforce_eager=True, kv_cache_dtype=dtype, block_size=32,
        max_model_len=args.length + args.generate + 8, max_num_batched_tokens=256, max_num_seqs=1,
        kv_cache_memory_bytes=1 << 30, enable_prefix_caching=False, seed=0,
        hf_overrides={"max_position_embeddings": max(8192, args.length + args.generate + 8)},
        additional_config={"fibquant": {"mode": "exact", "calibrate": "none", **options}},
    )  # fmt: skip
    text = "\n".join(topics.topics[name] for name in sorted(topics.topics))
    tokens = llm.get_tokenizer().encode(text[: 8 * args.length])[: args.length]
    assert len(tokens) == args.length, "the text is too short"
    pool = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    take, most = pool.get_new_blocks, 0

    def counted(num_blocks: int) -> list[Any]:
        nonlocal most
        blocks = take(num_blocks)
        most = max(most, pool.num_gpu_blocks - 1 - pool.get_num_free_blocks())
        return blocks

    pool.get_new_blocks = counted

    def logprobs(prompt: list[int], num_tokens: int = 1) -> list[float]:
        params = SamplingParams(
            max_tokens=num_tokens, prompt_logprobs=0, detokenize=False, ignore_eos=True
        )
        (output,) = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
        steps = output.prompt_logprobs[1:]
        return [s[t].logprob for s, t in zip(steps, prompt[1:], strict=True)]

    scored: dict[int, float] = {}
    if "recomputed" in label:
        for begin in range(args.kept, args.length, STRIDE * args.every):
            newest = tokens[begin - args.kept + FIRST + STRIDE : begin + STRIDE]
            for i, value in enumerate(logprobs(tokens[:FIRST] + newest)[-STRIDE:]):
                scored[begin + i] = value
    else:
        scored = dict(enumerate(logprobs(tokens, args.generate + 1), start=1))
    print("RESULT " + json.dumps({"scored": scored, "blocks": most}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="folder of a model; the demo model when left out")
    parser.add_argument("--preset", default="fibquant_4bit")
    parser.add_argument("--length", type=int, default=5120, help="tokens of the text")
    parser.add_argument("--kept", type=int, default=512, help="tokens a request may keep")
    parser.add_argument("--generate", type=int, default=0, help="tokens to generate after the text")
    parser.add_argument("--every", type=int, default=2, help="recompute every so many-th stride")
    parser.add_argument("--bounded", action="store_true", help="no cache of the whole text")
    add_out(parser)
    parser.add_argument("--score", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.model = model_or_demo(args.model)
    if args.score:
        score(args)
        return

    results: list[tuple[str, dict[int, float], int]] = []
    for label, dtype, options in formats(args.preset, args.kept):
        if args.bounded and "everything" in label:
            continue
        arguments = [*sys.argv[1:], "--model", args.model]
        arguments += ["--score", json.dumps([label, dtype, options])]
        result = run_apart("bench_retention", arguments, label)
        scored = {int(position): value for position, value in result["scored"].items()}
        results.append((label, scored, result["blocks"]))

    common = set.intersection(*(set(scored) for _, scored, _ in results))
    length = (args.length - args.kept) / NUM_SEGMENTS
    bounds = [round(args.kept + i * length) for i in range(NUM_SEGMENTS + 1)]
    names = [f"{a} to {b - 1}" for a, b in zip(bounds, bounds[1:], strict=False)]
    print(f"| cache | {' | '.join(names)} | all | blocks |\n|---|{'---|' * (NUM_SEGMENTS + 2)}")
    for label, scored, blocks in results:
        segments = [
            [scored[p] for p in common if a <= p < b]
            for a, b in [*zip(bounds, bounds[1:], strict=False), (bounds[0], bounds[-1])]
        ]
        perplexities = [math.exp(-statistics.fmean(segment)) for segment in segments]
        shown = " | ".join(f"{value:.2f}" for value in perplexities)
        print(f"| {label} | {shown} | {blocks} |", flush=True)
        append(
            args.out, bench="retention", model=Path(args.model).name, cache=label,
            length=args.length, kept=args.kept, generated=args.generate, segments=names,
            perplexities=perplexities, blocks=blocks, tokens=len(segments[-1]),
        )  # fmt: skip


if __name__ == "__main__":
    main()
