# SPDX-License-Identifier: Apache-2.0
"""What mode quality and calibration cost in decode attention, beside the same codes without.

As bench_attention: formats in turn, over enough layers that codes do not stay in the caches. A
repair's ratio is the median of those within a turn, whose parts a busy machine slows alike.

    python -m benchmarks.bench_repairs --one-thread --out docs/results/repairs.jsonl
"""

from __future__ import annotations

import argparse
import statistics

import torch
from tqdm import tqdm

from benchmarks.bench_attention import PLAIN, SHAPES, Case, options_of
from benchmarks.common import add_one_thread, add_out, append, clock_of
from vllm_fibquant import ops


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 8192])
    parser.add_argument("--presets", nargs="+",
                        default=["fibquant_k5v3", "fibquant_3bit", "fibquant_2bit"])  # fmt: skip
    parser.add_argument("--repetitions", type=int, default=15)
    add_one_thread(parser)
    add_out(parser)
    args = parser.parse_args()
    clock = clock_of(args)
    cases = [(s, c, p) for s in SHAPES[:2] for p in args.presets for c in args.contexts]
    print(f"kernel {ops.kernel_name()}, {torch.get_num_threads()} threads, float32")
    print("| head_dim, KV heads x queries | preset | context | with | us / layer | time |")
    print("|---|---|---:|---|---:|---:|")
    for shape, context, preset in tqdm(cases, disable=None, leave=False):
        case = Case(shape, context, 1, torch.float32)
        for label, options in options_of(case, preset).items():
            case.add_preset(preset, label, **options)
        times = case.measure(args.repetitions, clock)
        medians = {name: statistics.median(t) for name, t in times.items()}
        for name, median in medians.items():
            pairs = zip(times[name], times[PLAIN], strict=True)
            ratio = statistics.median(mine / plain for mine, plain in pairs)
            tqdm.write(f"| {shape[0]}, {shape[1]} x {shape[2]} | {preset} | {context} | {name} "
                       f"| {median * 1e6:.0f} | {ratio:.2f}x |")  # fmt: skip
            append(
                args.out, bench="repairs", shape=shape, context=context, preset=preset,
                repair=name, seconds=times[name], median=median, ratio=ratio,
                kernel=ops.kernel_name(), threads=torch.get_num_threads(),
                clock="cpu" if args.one_thread else "wall", torch=torch.__version__,
            )  # fmt: skip


if __name__ == "__main__":
    main()
