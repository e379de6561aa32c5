# SPDX-License-Identifier: Apache-2.0
"""Coarse-to-fine search of large codebooks beside the exhaustive one: recall, error and time.

Reported per number of lists: the share of subvectors that get the exhaustive search's codeword, the
added MSE, and the time of encode-and-store per vector. A codebook that is not there is built with
few samples and steps, into the user's cache; the row says what its own MSE is.

    python -m benchmarks.bench_list --one-thread --out results.jsonl
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace

import numpy as np
import torch

from benchmarks.common import add_one_thread, add_out, append, clock_of
from vllm_fibquant import files, ops
from vllm_fibquant.codec.codebook import (
    Codebook,
    cache_name,
    load_codebook,
)
from vllm_fibquant.codec.codebook_build import BuildOptions, build_codebook
from vllm_fibquant.codec.codec import KVCodec, VectorCodec
from vllm_fibquant.codec.config import CodeSpec
from vllm_fibquant.codec.rotation import make_rotation
from vllm_fibquant.codec.search import codeword_lists, nearest_listed_rows, nearest_rows
from vllm_fibquant.codec.source_law import sample_source

HEAD_DIM = 64
LARGE = (
    CodeSpec(4, 1024), CodeSpec(4, 4096), CodeSpec(8, 4096), CodeSpec(8, 65536), CodeSpec(16, 4096),
)  # fmt: skip
SHIPPED = (
    CodeSpec(4, 256), CodeSpec(8, 256), CodeSpec(2, 256, storage="float16"),
    CodeSpec(4, 4096, folded=True),
)  # fmt: skip
NUM_LISTS = (1, 2, 4, 8, 16)


def book_of(spec: CodeSpec) -> Codebook:
    """The codebook of a code, built cheaply where there is none."""
    try:
        return load_codebook(spec, HEAD_DIM)
    except ValueError:
        steps = 4 if spec.num_rows > 4096 else 10
        options = BuildOptions(restarts=1, samples=1 << 18, iterations=steps)
        _, content = build_codebook(spec, HEAD_DIM, options)
        files.keep(cache_name(spec, HEAD_DIM), content)
        return load_codebook(spec, HEAD_DIM)


def quality(spec: CodeSpec, book: Codebook, lists: list[int], count: int) -> list[dict]:
    """Recall and MSE of each number of lists on fresh samples; 0 is the exhaustive search.

    Beyond 16 lists the oracle takes long: fewer samples.
    """
    drawn = sample_source(HEAD_DIM, spec.subvec_dim, count, np.random.default_rng(9))
    samples = torch.from_numpy(np.abs(drawn) if spec.folded else drawn)
    rows = []
    for n in lists:
        y = samples[: count * 16 // max(n, 16)]
        exact = nearest_rows(y, book.rows)
        index = nearest_listed_rows(y, book.rows, codeword_lists(book), n) if n else exact
        sq, least = ((y - book.rows[i]).square().sum(-1).mean().item() for i in (index, exact))
        recall = (index == exact).float().mean().item()
        mse = sq * HEAD_DIM / spec.subvec_dim
        rows.append(dict(num_lists=n, recall=recall, mse=mse, added_mse=sq / least - 1))
    return rows


def times_of(
    spec: CodeSpec, book: Codebook, lists: list[int], tokens: int, repetitions: int, clock
) -> list[list[float]]:
    """Seconds per vector of encode-and-store, by number of lists, in turn."""
    rotation = make_rotation(HEAD_DIM)
    sides = [VectorCodec(replace(spec, num_lists=n), HEAD_DIM, book, rotation) for n in lists]
    key, value = torch.randn(2, tokens, 1, HEAD_DIM)
    slots = torch.arange(tokens)
    times: list[list[float]] = [[] for _ in lists]
    codecs = [KVCodec(side, side) for side in sides]
    caches = [torch.zeros(1, 1, tokens, c.layout.record_bytes, dtype=torch.uint8) for c in codecs]
    layers = [ops.pages_of(cache, codec) for cache, codec in zip(caches, codecs, strict=True)]
    for repetition in range(repetitions + 1):
        for pages, seconds in zip(layers, times, strict=True):
            begin = clock()
            ops.encode_kv(key, value, slots, pages)
            if repetition:
                seconds.append((clock() - begin) / (2 * tokens))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--samples", type=int, default=1 << 14)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--codes", nargs="+", help="names such as k8n4096; default: all")
    add_one_thread(parser)
    add_out(parser)
    args = parser.parse_args()
    clock = clock_of(args)

    print(f"kernel {ops.kernel_name()}, {torch.get_num_threads()} threads, d={HEAD_DIM}")
    print("| code | lists | recall | added MSE | us / vector | vs exhaustive |")
    print("|---|---|---|---|---|---|")
    for spec in (*LARGE, *SHIPPED):
        if args.codes and spec.name not in args.codes:
            continue
        book = book_of(spec)
        begin = time.thread_time()
        listed = int(codeword_lists(book).members.sum())
        lists_seconds = time.thread_time() - begin
        lists = [0, *(n for n in NUM_LISTS if n < spec.num_cells), spec.num_cells]
        seconds = times_of(spec, book, lists, args.tokens, args.repetitions, clock)
        exhaustive = statistics.median(seconds[0])
        results = quality(spec, book, lists, args.samples)
        for row, sample in zip(results, seconds, strict=True):
            median = statistics.median(sample)
            name = row["num_lists"] or "exhaustive"
            if row["num_lists"] == spec.num_cells:
                name = f"all {spec.num_cells}"
            is_default = row["num_lists"] == spec.lists_searched
            print(
                f"| {spec.name} | {name}{' (default)' if is_default else ''} | {row['recall']:.4f} "
                f"| {row['added_mse']:+.3%} | {median * 1e6:.2f} | {exhaustive / median:.2f}x |",
                flush=True,
            )
            append(
                args.out, **row, bench="list", code=spec.name, head_dim=HEAD_DIM,
                num_cells=spec.num_cells, default=is_default, seconds_per_vector=sample,
                median=median, vs_exhaustive=exhaustive / median, lists_seconds=lists_seconds,
                listed=listed, kernel=ops.kernel_name(), threads=torch.get_num_threads(),
                book_samples=book.provenance["samples"],
                book_iterations=book.provenance["iterations"],
            )  # fmt: skip


if __name__ == "__main__":
    main()
