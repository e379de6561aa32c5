# SPDX-License-Identifier: Apache-2.0
"""Decode attention from codes beside vLLM's own CPU attention, in one run.

Each format holds the same contexts in its own pages with shuffled block tables. A repetition runs
every format once, in turn, over enough layers that the KV of uncompressed formats cannot stay in
the caches of the CPU, as in a model. Reported: median microseconds per layer, the ratio of medians
to vLLM's own attention in the model's dtype, and the bytes read per second.

    python -m benchmarks.bench_attention --out results.jsonl
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.common import add_one_thread, add_out, append, clock_of, cpu_name
from vllm_fibquant import ops
from vllm_fibquant.codec.codec import KVCodec
from vllm_fibquant.codec.config import PRESETS
from vllm_fibquant.codec.layout import preset_layout
from vllm_fibquant.keys.calibration import num_turning
from vllm_fibquant.keys.key_map import FirstMeans, KeyMap, TurningMean, Turns
from vllm_fibquant.keys.transform import make_transform, transform_problem
from vllm_fibquant.ops import Attend, Batch, Copies, Fresh, cpu_library
from vllm_fibquant.options import parse_options

BLOCK_SIZE = 128  # vLLM's default on CPUs
COLD_BYTES = 192 << 20  # several times the last-level cache of a desktop or a small server
SHAPES = ((64, 3, 3), (128, 8, 4), (128, 8, 1), (128, 8, 8))  # head_dim, num_kv_heads, group_size
PRESET_NAMES = (
    "fibquant_k5v3", "fibquant_4bit", "fibquant_3bit", "fibquant_2bit", "fibquant_1bit",
)  # fmt: skip
FP8_DTYPES = {"fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}


def block_tables(num_reqs: int, context: int) -> tuple[torch.Tensor, int]:
    blocks = -(-context // BLOCK_SIZE)
    order = torch.randperm(num_reqs * blocks, generator=torch.Generator().manual_seed(0))
    return order.to(torch.int32).view(num_reqs, blocks), num_reqs * blocks


class Case:
    """One shape, context and batch; `formats` maps a name to (bytes per layer, run one layer)."""

    def __init__(
        self, shape: tuple[int, int, int], context: int, num_reqs: int, dtype: torch.dtype
    ):
        self.head_dim, self.num_kv_heads, self.group_size = shape
        self.context, self.num_reqs, self.dtype = context, num_reqs, dtype
        self.block_table, self.num_blocks = block_tables(num_reqs, context)
        self.seq_lens = torch.full((num_reqs,), context, dtype=torch.int32)
        self.query_start_loc = torch.arange(num_reqs + 1, dtype=torch.int32)
        self.query = torch.randn(num_reqs, self.num_kv_heads * self.group_size, self.head_dim)
        self.query = self.query.to(dtype)
        self.out = torch.empty_like(self.query)
        self.scale = self.head_dim**-0.5
        plain_bytes = 4 * self.head_dim * context * num_reqs * self.num_kv_heads
        self.num_layers = max(2, min(30, -(-COLD_BYTES // plain_bytes)))
        self.formats: dict[str, tuple[int, Callable[[int], None]]] = {}

    def add_vllm(self, dtype: torch.dtype, cache_dtype: str = "auto") -> None:
        """vLLM's own attention with queries in `dtype`, and keys and values too unless in fp8."""
        from vllm import _custom_ops as vllm_ops
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

        isa = _get_attn_isa(dtype, BLOCK_SIZE, self.head_dim, cache_dtype)
        shape = (self.num_blocks, self.num_kv_heads, BLOCK_SIZE * 2, self.head_dim)
        stored = getattr(torch, FP8_DTYPES[cache_dtype]) if cache_dtype in FP8_DTYPES else dtype
        caches = [torch.randn(shape).to(stored) for _ in range(self.num_layers)]
        if cache_dtype in FP8_DTYPES:
            caches = [cache.view(torch.uint8) for cache in caches]
        query, out = self.query.to(dtype), self.out.to(dtype)
        metadata = vllm_ops.cpu_attn_get_scheduler_metadata(
            self.num_reqs, query.shape[1], self.num_kv_heads, self.head_dim, self.seq_lens, dtype,
            self.query_start_loc, True, -1, isa, True, kv_cache_dtype=cache_dtype,
        )  # fmt: skip

        def run(layer: int) -> None:
            key_cache, value_cache = caches[layer].chunk(2, dim=2)
            vllm_ops.cpu_attention_with_kv_cache(
                query, key_cache, value_cache, out, self.query_start_loc, self.seq_lens,
                self.scale, True, None, -1, self.block_table, 0.0, metadata, None,
                kv_cache_dtype=cache_dtype,
            )  # fmt: skip

        name = str(dtype).removeprefix("torch.") if cache_dtype == "auto" else cache_dtype
        self.formats["vllm_" + name] = (caches[0].nbytes, run)

    def add_preset(
        self, name: str, label: str | None = None, key_map: KeyMap | None = None,
        copied: tuple[Copies, torch.Tensor] | None = None, fresh: Fresh | None = None,
    ) -> None:  # fmt: skip
        """Codes of a preset, attended through a map of keys, with copies and their table, and with
        raw new tokens."""
        codec = KVCodec.from_preset(PRESETS[name], self.head_dim)
        layout = codec.layout
        shape = (self.num_blocks, self.num_kv_heads, BLOCK_SIZE, layout.record_bytes)
        caches = [torch.randint(0, 256, shape, dtype=torch.uint8) for _ in range(self.num_layers)]
        for cache in caches:  # any index is valid; norms must be numbers
            norms = cache[..., layout.key_norm_offset :].contiguous().view(torch.float16)
            norms.uniform_(4, 12)
            cache[..., layout.key_norm_offset :] = norms.view(torch.uint8)

        copies, table = copied or (None, None)
        batch = Batch(self.query_start_loc, self.seq_lens, self.block_table, table)
        layers = [
            (ops.pages_of(cache, codec, key_map), Attend(self.scale, copies=copies))
            for cache in caches
        ]

        def run(layer: int) -> None:
            pages, attend = layers[layer]
            ops.paged_attention(self.query, self.out, pages, batch, attend, fresh)

        self.formats[label or name] = (caches[0].nbytes, run)

    def measure(self, repetitions: int, clock: Callable[[], float]) -> dict[str, list[float]]:
        """Seconds per layer of every repetition, by format."""
        times: dict[str, list[float]] = {name: [] for name in self.formats}
        for repetition in range(repetitions + 1):
            for name, (_, run) in self.formats.items():
                begin = clock()
                for layer in range(self.num_layers):
                    run(layer)
                if repetition:  # the first one warms up
                    times[name].append((clock() - begin) / self.num_layers)
        return times


PLAIN, AS_SERVED = "codes alone", "as served"


def options_of(case: Case, preset: str) -> dict[str, dict[str, Any]]:
    """Options of `Case.add_preset` by the name of the repair."""
    heads, dim = case.num_kv_heads, case.head_dim
    quality = parse_options(preset, {"fibquant": {"mode": "quality"}})
    rows = quality.num_copies * case.num_reqs
    key, value = torch.randn(2, rows, heads, dim).to(case.dtype)
    table = torch.arange(rows, dtype=torch.int32).view(case.num_reqs, -1)
    new = Fresh(key[: case.num_reqs], value[: case.num_reqs])
    kept = (x.bfloat16() for x in (key, value))  # as in service
    copied = Copies(*kept, quality.num_copied_first), table
    pairs = torch.arange(dim, dtype=torch.int32).view(2, -1).T.contiguous()
    frequency = 1e4 ** (-torch.arange(dim // 2).double() / (dim // 2))
    turns = Turns(pairs, frequency, 1.0, case.context)
    mean = torch.randn(heads, dim)
    turning = TurningMean.strongest(torch.randn(heads, dim), turns, num_turning(turns))
    first = FirstMeans(*torch.randn(2, heads, quality.first_tokens, dim))
    found: dict[str, dict[str, Any]] = {
        PLAIN: {},
        "copies": {"copied": copied, "fresh": new},
        "means": {"key_map": KeyMap(mean, first.num_first, None, turning, first)},
    }
    if transform_problem(PRESETS[preset].key, dim) is None:
        basis = torch.randn(heads, dim, dim)
        index_bytes = preset_layout(PRESETS[preset], dim).key_index_bytes
        transform = make_transform(basis @ basis.mT, basis.mT @ basis, index_bytes)
        both = KeyMap(mean, first.num_first, transform, turning, first)
        found["means and transform"] = {"key_map": both}
        found[AS_SERVED] = {"key_map": both, **found["copies"]}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096, 16384, 65536])
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    parser.add_argument("--presets", nargs="+", default=PRESET_NAMES)
    parser.add_argument("--served", nargs="*", default=["fibquant_3bit"],
                        help="presets also run with transform, means and copies")  # fmt: skip
    parser.add_argument("--shapes", nargs="+", default=[",".join(map(str, s)) for s in SHAPES],
                        help="head_dim,num_kv_heads,group_size")  # fmt: skip
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32", "float16"])
    parser.add_argument("--instruction-set", help="avx2, say; default: this CPU's best")
    parser.add_argument("--repetitions", type=int, default=9)
    add_one_thread(parser)
    add_out(parser)
    args = parser.parse_args()

    cpu_library.select_isa(args.instruction_set)
    dtype = getattr(torch, args.dtype)
    clock = clock_of(args)
    baseline = "vllm_" + args.dtype
    cases = [(s, b, c) for s in args.shapes for b in args.batches for c in args.contexts]
    print(f"kernel {ops.kernel_name()} on {cpu_name()}, {torch.get_num_threads()} threads, "
          f"model {args.dtype}")  # fmt: skip
    print("| d, kv heads, group | batch | context | format | us / layer | GB/s | vs vLLM |")
    print("|---|---|---|---|---|---|---|")
    for shape_text, batch, context in tqdm(cases, disable=None, leave=False):
        shape = tuple(int(x) for x in shape_text.split(","))
        case = Case(shape, context, batch, dtype)  # type: ignore[arg-type]
        for vllm_dtype in {dtype, torch.bfloat16, torch.float32}:
            case.add_vllm(vllm_dtype)
        for cache_dtype in FP8_DTYPES:
            if torch.cpu._is_avx512_supported():  # vLLM refuses it without
                case.add_vllm(dtype, cache_dtype)
        for preset in args.presets:
            case.add_preset(preset)
        for preset in args.served:
            options = options_of(case, preset)[AS_SERVED]
            case.add_preset(preset, f"{preset} {AS_SERVED}", **options)
        times = case.measure(args.repetitions, clock)
        medians = {name: statistics.median(t) for name, t in times.items()}
        for name, median in sorted(medians.items()):
            ratio = medians[baseline] / median
            gigabytes = case.formats[name][0] / median / 1e9
            tqdm.write(f"| {shape_text} | {batch} | {context} | {name} | {median * 1e6:.0f} | "
                       f"{gigabytes:.2f} | {ratio:.2f}x |")  # fmt: skip
            append(
                args.out,
                bench="attention", shape=shape, batch=batch, context=context, format=name,
                model_dtype=args.dtype, layers=case.num_layers, seconds=times[name],
                median=median, vs_vllm=ratio, bytes=case.formats[name][0],
                kernel=ops.kernel_name(), threads=torch.get_num_threads(),
                clock="cpu" if args.one_thread else "wall",
                instruction_set=cpu_library.isa(), cpu=cpu_name(), torch=torch.__version__,
            )  # fmt: skip


if __name__ == "__main__":
    main()
