# SPDX-License-Identifier: Apache-2.0
"""Decode steps and prefill of the real engine, with vLLM's own cache and with ours.

Each format runs in a process of its own, formats in turn, `--rounds` times; reported are medians
over all steps of all rounds. Every request of a batch has a context of its own, or with `--shared`
all have the same: one read from memory then serves them all. Contexts are prefilled before and
taken from the prefix cache. Prefill is timed on a prompt that nothing is cached of.

    python -m benchmarks.bench_engine --out results.jsonl
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from typing import Any

from tqdm import tqdm

from benchmarks.common import add_out, append, model_or_demo, run_apart
from vllm_fibquant import ops

PREFILL_TOKENS = 1024
BLOCK_SIZE = 128
FORMATS = ("auto", "fibquant_k5v3", "fibquant_4bit", "fibquant_2bit")


def measure(args: argparse.Namespace) -> None:
    """Measures one format in this process; prints one JSON line."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
    import torch
    from vllm import LLM, SamplingParams

    llm = LLM(
        args.model, dtype=args.dtype, enforce_eager=True, kv_cache_dtype=args.measure,
        max_model_len=8192, max_num_batched_tokens=1024, max_num_seqs=max(args.batches),
        kv_cache_memory_bytes=4 << 30, enable_prefix_caching=True, skip_tokenizer_init=True,
    )  # fmt: skip
    engine = llm.llm_engine
    generator = torch.Generator().manual_seed(0)

    def random_tokens(count: int) -> list[int]:
        return torch.randint(100, 40_000, (count,), generator=generator).tolist()

    def add(name: str, prompt: list[int], num_tokens: int) -> None:
        params = SamplingParams(
            temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False
        )
        engine.add_request(name, {"prompt_token_ids": prompt}, params)

    def run() -> list[float]:
        """Seconds of every step until nothing is left to do."""
        steps = []
        while engine.has_unfinished_requests():
            begin = time.perf_counter()
            engine.step()
            steps.append(time.perf_counter() - begin)
        return steps

    add("warm-up", random_tokens(64), 4)
    run()
    result: dict[str, Any] = {"prefill": [], "decode": []}
    for repetition in range(2):
        add(f"prefill-{repetition}", random_tokens(PREFILL_TOKENS), 1)
        result["prefill"].append(sum(run()) / PREFILL_TOKENS)
    for context in args.contexts:
        contexts = [random_tokens(context) for _ in range(1 if args.shared else max(args.batches))]
        for number, prompt in enumerate(contexts):
            add(f"{context}-fill-{number}", prompt, 1)
            run()
        for batch in args.batches:
            for number in range(batch):
                tail = random_tokens(context % BLOCK_SIZE or 8)
                prompt = contexts[number % len(contexts)][: context - len(tail)] + tail
                add(f"{context}-{batch}-{number}", prompt, args.steps)
            steps = run()[-(args.steps - 4) :]  # the first ones prefill what is not shared
            result["decode"].append({"context": context, "batch": batch, "seconds": steps})
    print("RESULT " + json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="folder of a model; the demo model when left out")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 1024, 4096, 8000])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--shared", action="store_true", help="one context for a whole batch")
    add_out(parser)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.model = model_or_demo(args.model)
    if args.measure:
        measure(args)
        return

    prefill: dict[str, list[float]] = {}
    decode: dict[tuple[int, int, str], list[float]] = {}
    runs = [(number, name) for number in range(args.rounds) for name in args.formats]
    for _, name in tqdm(runs, disable=None, leave=False):
        arguments = ["--measure", name, "--model", args.model, "--dtype", args.dtype]
        arguments += ["--steps", str(args.steps), "--contexts", *map(str, args.contexts)]
        arguments += ["--batches", *map(str, args.batches), *["--shared"] * args.shared]
        result = run_apart("bench_engine", arguments, name)
        prefill.setdefault(name, []).extend(result["prefill"])
        for row in result["decode"]:
            decode.setdefault((row["context"], row["batch"], name), []).extend(row["seconds"])

    baseline, kernel = args.formats[0], ops.kernel_name()
    print(f"| context | batch | format | ms / decode step | vs {baseline} |\n|---|---|---|---|---|")
    for (context, batch, name), seconds in sorted(decode.items()):
        median = statistics.median(seconds)
        ratio = statistics.median(decode[context, batch, baseline]) / median
        print(f"| {context} | {batch} | {name} | {median * 1e3:.1f} | {ratio:.2f}x |")
        append(args.out, bench="decode_step", context=context, batch=batch, format=name,
              seconds=seconds, median=median, ratio=ratio, model_dtype=args.dtype,
              shared=args.shared, kernel=kernel)  # fmt: skip
    print(f"\n| format | us / prefilled token | vs {baseline} |\n|---|---|---|")
    for name, seconds in prefill.items():
        median = statistics.median(seconds)
        ratio = statistics.median(prefill[baseline]) / median
        print(f"| {name} | {median * 1e6:.0f} | {ratio:.2f}x |")
        append(args.out, bench="prefill", tokens=PREFILL_TOKENS, format=name, seconds=seconds,
              median=median, ratio=ratio, model_dtype=args.dtype, kernel=kernel)  # fmt: skip


if __name__ == "__main__":
    main()
