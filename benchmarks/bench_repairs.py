# SPDX-License-Identifier: Apache-2.0
"""What mode quality and calibration cost in decode attention, beside the same codes without.

As bench_attention: formats in turn, over enough layers that codes do not stay in the caches. A
repair's ratio is the median of those within a turn, whose parts a busy machine slows alike.

    python -m benchmarks.bench_repairs --one-thread --out docs/results/repairs.jsonl
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.bench_attention import SHAPES, Case
from benchmarks.common import add_one_thread, add_out, append, clock_of
from vllm_fibquant import ops
from vllm_fibquant.codec.config import PRESETS
from vllm_fibquant.codec.layout import preset_layout
from vllm_fibquant.keys.calibration import num_turning
from vllm_fibquant.keys.key_map import FirstMeans, KeyMap, TurningMean, Turns
from vllm_fibquant.keys.transform import make_transform, transform_problem
from vllm_fibquant.ops.reference import TokenCopies
from vllm_fibquant.options import parse_options

PLAIN = "codes alone"


def options_of(case: Case, preset: str) -> dict[str, dict[str, Any]]:
    """Options of paged attention by the name of the repair."""
    heads, dim = case.num_kv_heads, case.head_dim
    quality = parse_options(preset, {"fibquant": {"mode": "quality"}})
    rows = quality.num_copies * case.num_reqs
    key, value = torch.randn(2, rows, heads, dim).to(case.dtype)
    table = torch.arange(rows, dtype=torch.int32).view(case.num_reqs, -1)
    new = {"raw_key": key[: case.num_reqs], "raw_value": value[: case.num_reqs]}
    kept = (x.bfloat16() for x in (key, value))  # as in service
    copies = TokenCopies(*kept, table, quality.num_copied_first)
    pairs = torch.arange(dim, dtype=torch.int32).view(2, -1).T.contiguous()
    frequency = 1e4 ** (-torch.arange(dim // 2).double() / (dim // 2))
    turns = Turns(pairs, frequency, 1.0, case.context)
    mean = torch.randn(heads, dim)
    turning = TurningMean.strongest(torch.randn(heads, dim), turns, num_turning(turns))
    first = FirstMeans(*torch.randn(2, heads, quality.first_tokens, dim))
    found: dict[str, dict[str, Any]] = {
        PLAIN: {},
        "copies": {"copies": copies, **new},
        "means": {"key_map": KeyMap(mean, first.num_first, None, turning, first)},
    }
    if transform_problem(PRESETS[preset].key, dim) is None:
        basis = torch.randn(heads, dim, dim)
        index_bytes = preset_layout(PRESETS[preset], dim).key_index_bytes
        transform = make_transform(basis @ basis.mT, basis.mT @ basis, index_bytes)
        both = KeyMap(mean, first.num_first, transform, turning, first)
        found["means and transform"] = {"key_map": both}
    return found


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
