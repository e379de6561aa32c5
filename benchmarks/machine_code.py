# SPDX-License-Identifier: Apache-2.0
"""What nvcc says of the CUDA kernels on every architecture: registers and spills. Needs no GPU.

    python -m benchmarks.machine_code            compiles all, 6 minutes on two cores
    python -m benchmarks.machine_code --table    writes the tables again

The tables are those of docs/gpu.md ("Machine code") and the README's of what GPUs support. Results
go to docs/results/machine_code.jsonl. Shared memory depends on preset and device: the second table
of docs/gpu.md asks the launcher, in the emulated library.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results" / "machine_code.jsonl"
DOCUMENT = ROOT / "docs" / "gpu.md"
README = ROOT / "README.md"

ARCHS = ("80", "86", "89", "90a", "100a", "120")
HEAD_DIMS = (64, 80, 96, 112, 128, 192, 256)
SHARED_KIB = {"86, 89, 120": (99, 100), "80": (163, 164), "90a, 100a": (227, 228)}
"""Shared memory of a CTA and of a multiprocessor, by architectures."""
KERNELS = {
    "pair": "attend, a pair of its own (largest)",
    "any": "attend, any pair",
    "wide": "attend, wide row blocks",
    "product": "attend, transformed keys (largest)",
    "any_mapped": "attend, mapped keys, any pair",
    "wide_mapped": "attend, mapped keys, wide row blocks",
    "prepare": "prepare",
    "first": "attend, kept first tokens",
    "attend_copies": "attend, copies",
    "merge": "merge",
    "encode": "encode",
    "encode_mapped": "encode, mapped keys",
}
ANY_KIND, PRODUCT = 5, 6
"""kAnyKind and kProduct of csrc/cuda/supported.h, as in the kernels' template arguments."""

Row = dict[str, Any]


def nvcc_version() -> str:
    text = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"V([\d.]+)", text)
    return found[1] if found else "unknown"


def compile_command(head_dim: int, arch: str) -> list[str]:
    """What setup.py compiles kernels.cu with, for one architecture."""
    command = ["nvcc", "-O3", "-std=c++17", "-I", str(ROOT / "csrc"), f"-DFQ_HEAD_DIM={head_dim}"]
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}", "-cubin"]
    return [*command, str(ROOT / "csrc" / "cuda" / "kernels.cu")]


def compile_kernels(head_dim: int, arch: str) -> list[Row]:
    """Compiles the kernels of one head_dim; one row per kernel.

    Raises:
        RuntimeError: nvcc failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [*compile_command(head_dim, arch), "-Xptxas=-v", "-o", f"{folder}/kernels.cubin"]
        result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"compile_kernels: nvcc must succeed, got {result.stderr[-4000:]}")
    return [
        {"head_dim": head_dim, "arch": arch, **_report(part)}
        for part in result.stderr.split("Compiling entry function '")[1:]
    ]


def _report(part: str) -> Row:
    """One kernel's part of what ptxas prints."""

    def number(pattern: str) -> int:
        found = re.search(pattern, part)
        return int(found[1]) if found else 0

    name, arguments = re.match(r"_ZN2fq\d+([a-z_]+)I(\w+?)EEv", part).groups()  # type: ignore[union-attr]
    numbers = [int(n) for n in re.findall(r"Li(\d+)", arguments + "E")]
    kernel = name
    is_mapped = name in ("attend", "encode") and numbers[-1] == 1
    if name == "attend":
        _, key, _, tiles, _ = numbers
        kernel = "wide" if tiles > 1 else {ANY_KIND: "any", PRODUCT: "product"}.get(key, "pair")
    if name == "prepare" and numbers[-1] == 0:
        kernel = "first"
    if is_mapped and kernel != "product":
        kernel += "_mapped"
    return {
        "kernel": kernel,
        "registers": number(r"Used (\d+) registers"),
        "spills": number(r"(\d+) bytes spill stores"),
        "stack": number(r"(\d+) bytes stack frame"),
        "static_shared": number(r"(\d+) bytes smem"),
    }


def compile_all(cases: list[tuple[int, str]]) -> list[Row]:
    """The rows of (head_dim, arch) cases, compiled two at a time."""
    with ThreadPoolExecutor(2) as pool:
        return [
            row for rows in pool.map(lambda case: compile_kernels(*case), cases) for row in rows
        ]


def largest(rows: list[Row]) -> dict[tuple[str, int, str], int]:
    """Most registers by (kernel, head_dim, arch)."""
    found: dict[tuple[str, int, str], int] = {}
    for row in rows:
        at = row["kernel"], row["head_dim"], row["arch"]
        found[at] = max(found.get(at, 0), row["registers"])
    return found


def read_rows() -> list[Row]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()]


def markdown(rows: list[Row]) -> str:
    """Registers by kernel and architecture, as the document shows them."""
    registers = largest(rows)
    archs = " | ".join(f"sm_{arch}" for arch in ARCHS)
    lines = [f"| kernel | head_dim | {archs} |", "|---|---:|" + "---:|" * len(ARCHS)]
    for kernel, text in KERNELS.items():
        for dim in HEAD_DIMS:
            cells = " | ".join(str(registers[kernel, dim, arch]) for arch in ARCHS)
            lines.append(f"| {text} | {dim} | {cells} |")
    spilled = sum(row["spills"] + row["stack"] for row in rows)
    versions = ", ".join(sorted({row["nvcc"] for row in rows}))
    lines += [
        "",
        f"Registers, by nvcc {versions}. Bytes spilled or on a stack, all kernels: {spilled}.",
    ]
    return "\n".join(lines)


def shared_markdown(library: Any) -> str:
    """CTAs, warps and shared memory of decode attention at head_dim 128, by preset."""
    from vllm_fibquant.codec.config import DEFAULT_PRESET, PRESETS
    from vllm_fibquant.codec.layout import preset_layout

    sizes: dict[int, list[str]] = {}
    for name, preset in PRESETS.items():
        if name != "fibquant" or DEFAULT_PRESET == "fibquant":
            sizes.setdefault(preset_layout(preset, 128).record_bytes, []).append(f"`{name}`")
    heads = " | ".join(f"sm_{archs} ({kib[0]} KiB)" for archs, kib in SHARED_KIB.items())
    lines = [f"| presets | record bytes | {heads} |", "|---|---:|" + "---|" * len(SHARED_KIB)]
    for record_bytes, names in sorted(sizes.items(), reverse=True):
        cells = []
        for per_cta, per_sm in SHARED_KIB.values():
            ctas, warps, size = library.occupancy(
                128, record_bytes, False, per_cta << 10, per_sm << 10
            )
            cells.append(f"{ctas} x {warps} warps, {size / 1024:.0f} KiB")
        lines.append(f"| {', '.join(names)} | {record_bytes} | {' | '.join(cells)} |")
    return "\n".join(lines)


def support_markdown(library: Any) -> str:
    """What the GPU kernels support, for the README, from the library's dispatch table and the one
    table of features."""
    from vllm_fibquant.codec.config import PRESETS
    from vllm_fibquant.ops import gpu

    support = library.support
    served = [
        name
        for name, preset in PRESETS.items()
        if all(
            (code.subvec_dim, code.index_bits, code.folded) in support.codes
            for code in (preset.key, preset.value)
        )
    ]
    presets = "all" if len(served) == len(PRESETS) else ", ".join(f"`{name}`" for name in served)
    built = ", ".join("sm_" + arch.rstrip("a") for arch in ARCHS)
    rows = [
        ("GPU kernels", "CUDA C++ (`make cuda`)", "Triton, for the rest"),
        ("---", "---", "---"),
        ("head dims", ", ".join(map(str, support.wide_columns)),
         f"{gpu.MIN_HEAD_DIM} to {gpu.MAX_HEAD_DIM}"),
        ("presets", presets, "all"),
        ("codes", ", ".join(f"`{name}`" for name in support.codes.values()), "any"),
        ("block sizes", "multiples of 16", "any"),
        ("query heads per KV head", *[f"up to {gpu.TRITON.max_group_size}"] * 2),
        ("architectures", f"{built}, PTX of sm_80",
         "what Triton compiles for"),
        ("features", *(_features(name, True) for name in ("cuda", "triton"))),
        ("not on a GPU yet", *(_features(name, False) for name in ("cuda", "triton"))),
    ]  # fmt: skip
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _features(implementation: str, has_it: bool) -> str:
    """What an implementation has, or has not, of what may be asked of kernels."""
    from vllm_fibquant.ops.features import FEATURES

    rows = [row for row in FEATURES.values() if (implementation in row.had_by) == has_it]
    return ", ".join(row.what for row in rows) or "nothing"


def section(rows: list[Row], library: Any) -> str:
    return f"{markdown(rows)}\n\n{shared_markdown(library)}\n"


def between(text: str, name: str, new: str | None = None) -> str:
    """What stands between the marks of a generated part; with `new`, the text that has that."""
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    before, rest = text.split(begin)
    old, after = rest.split(end)
    return old if new is None else before + begin + new + end + after


def main() -> None:
    from tests.emulated import emulated

    parser = argparse.ArgumentParser(prog="python -m benchmarks.machine_code")
    parser.add_argument("--table", action="store_true", help="from the results there are")
    args = parser.parse_args()
    if not args.table:
        version = nvcc_version()
        rows = compile_all([(dim, arch) for dim in reversed(HEAD_DIMS) for arch in ARCHS])
        lines = [json.dumps({**row, "nvcc": version}) + "\n" for row in rows]
        RESULTS.write_text("".join(lines))
    library = emulated()
    generated = section(read_rows(), library)
    DOCUMENT.write_text(between(DOCUMENT.read_text(), "machine code", generated))
    README.write_text(between(README.read_text(), "gpu", support_markdown(library)))


if __name__ == "__main__":
    main()
