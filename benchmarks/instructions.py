# SPDX-License-Identifier: Apache-2.0
"""Instructions of a tile of 16 tokens in decode attention, counted in machine code. Needs no GPU.

    python -m benchmarks.instructions            compiles head_dim 128 for sm_90a, counts, writes
    python -m benchmarks.instructions --table    writes the table again

The table is that of docs/gpu.md ("Bounds predicted from arithmetic"). A tile is one round of the
loop that has all tensor core products: counted is the shortest way through it that starts the copy
of a whole tile, so without what happens rarely (masks, new references, soft caps).
"""

from __future__ import annotations

import argparse
import heapq
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.machine_code import DOCUMENT, ROOT, between, compile_command

RESULTS = ROOT / "docs" / "results" / "instructions.jsonl"
HEAD_DIM, ARCH = 128, "90a"
SHOWN = ("fibquant_4bit", "fibquant_k5v3", "fibquant_3bit", "fibquant_2bit", "fibquant_1bit")
PER_CYCLE = 4
"""Instructions that a multiprocessor issues at best."""
MEMORY_BYTES, PRODUCT_CYCLES = 18.6, 1.6
"""Of a multiprocessor of an H200: bytes of memory a cycle, cycles of a tensor core product."""
COPY_BYTES = 32 * 16
"""What one instruction of a warp copies."""
PRODUCT_STEPS = (4, 4)
"""Of transformed keys of 3 bits: steps with codewords of 2 and of 4 coordinates."""

Code = list[tuple[int, str]]
Counts = tuple[int, ...]


def cuobjdump() -> Path | None:
    """The disassembler that Triton brings, or None."""
    try:
        import triton.backends.nvidia as backend
    except ImportError:
        return None
    tool = Path(backend.__file__).parent / "bin" / "cuobjdump"
    return tool if tool.exists() else None


def disassemble(head_dim: int, arch: str) -> dict[str, Code]:
    """The instructions of every kernel of one head_dim, as (address, text), by mangled name."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = f"{folder}/kernels.cubin"
        subprocess.run([*compile_command(head_dim, arch), "-o", cubin], check=True)
        command = [str(cuobjdump()), "-sass", cubin]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found: dict[str, Code] = {}
    for part in text.split("Function : ")[1:]:
        lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", part, re.M)
        found[part.split()[0]] = [(int(at, 16), line.strip()) for at, line in lines]
    return found


def kernel_of(kernels: dict[str, Code], name: str, *arguments: int) -> Code:
    """The kernel of a template's name and arguments."""
    mangled = f"{len(name)}{name}I" + "".join(f"Li{n}E" for n in arguments) + "E"
    return next(code for kernel, code in kernels.items() if mangled in kernel)


def _branch(text: str) -> int | None:
    """Where an instruction may jump to. BRA.DIV is for warps whose lanes have parted: never."""
    found = re.search(r"\bBRA(?!\.DIV)\S*\s.*?(0x[0-9a-f]+)$", text)
    return int(found[1], 16) if found else None


def count(code: Code, needed: dict[str, int]) -> int:
    """Instructions of the shortest way through the loop over tiles.

    Args:
        needed: how many instructions of a name the way must have at least; "HMMA" is among them.
    """
    text = dict(code)
    after = {at: behind for (at, _), (behind, _) in zip(code, code[1:], strict=False)}
    loops = [(to, at) for at, line in code if (to := _branch(line)) is not None and to <= at]
    # The loop over tiles is the shortest that holds products and copies.
    inside = {
        (head, latch): " ".join(line for at, line in code if head <= at <= latch)
        for head, latch in loops
    }
    whole = [x for x, body in inside.items() if "LDGSTS" in body and "HMMA" in body]
    head, latch = min(whole, key=lambda x: x[1] - x[0])
    names, goal = list(needed), tuple(needed.values())
    ways: list[tuple[int, int, Counts]] = [(0, head, (0,) * len(names))]
    seen: set[tuple[int, Counts]] = set()
    while ways:
        length, at, had = heapq.heappop(ways)
        if (at, had) in seen:
            continue
        seen.add((at, had))
        line = text[at]
        had = tuple(
            min(goal[i], n + bool(re.search(rf"\b{names[i]}\b", line))) for i, n in enumerate(had)
        )
        if at == latch and had == goal:
            return length + 1
        to, guarded = _branch(line), line.startswith("@") or re.search(r"BRA\S* !?U?P\d", line)
        follow = [to] if to is not None else []
        if (to is None or guarded) and not re.match(r"EXIT|RET", line):
            follow.append(after.get(at))
        for place in follow:
            if place is not None and head <= place <= latch and place != head:
                heapq.heappush(ways, (length + 1, place, had))
    raise ValueError(f"count: the loop must have a way with {needed}, got none")


def measure() -> list[dict[str, Any]]:
    """A row for each preset that is shown, and one for 3 bits with transformed keys."""
    from vllm_fibquant.codec.codec import KVCodec
    from vllm_fibquant.codec.config import PRESETS

    kernels = disassemble(HEAD_DIM, ARCH)
    kinds = _kinds()
    steps = HEAD_DIM // 16
    rows: list[dict[str, Any]] = []
    for name in SHOWN:
        codec = KVCodec.from_preset(PRESETS[name], HEAD_DIM)
        copies = -(-16 * codec.layout.record_bytes // COPY_BYTES)
        key, value = (kinds[code.spec.name] for code in (codec.key, codec.value))
        needed = {"LDGSTS": copies, "HMMA": 2 * steps}
        code = kernel_of(kernels, "attend", HEAD_DIM, key, value, 1, 0)
        rows.append({"preset": name, "keys": "plain", "tile": count(code, needed)})
        if name == "fibquant_3bit":
            twos, fours = PRODUCT_STEPS
            needed |= {r"LDS\.U16": 2 * twos, r"LDS\.U8": 2 * fours}
            code = kernel_of(kernels, "attend", HEAD_DIM, len(kinds) + 1, value, 1, 1)
            rows.append({"preset": name, "keys": "transformed", "tile": count(code, needed)})
    return rows


def _kinds() -> dict[str, int]:
    """The number of each code, in the order of csrc/cuda/supported.h."""
    text = (ROOT / "csrc" / "cuda" / "supported.h").read_text()
    table = text.split("#define FQ_CODES(X)")[1].split("//")[0]
    return {name: number for number, name in enumerate(re.findall(r'"(\w+)"', table))}


def read_rows() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()]


def markdown(rows: list[dict[str, Any]], library: Any) -> str:
    """Cycles per token and KV head of one multiprocessor, by what takes them."""
    from tests.ops.test_cuda_banks import per_token
    from vllm_fibquant.codec.codec import KVCodec
    from vllm_fibquant.codec.config import PRESETS

    heads = ("preset", "record bytes", "memory", "shared memory", "tensor",
             "instructions of a tile", "instructions", "bound by", "of memory's rate")  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * 6 + "---|---:|"]
    for row in rows:
        if row["keys"] != "plain":
            continue
        codec = KVCodec.from_preset(PRESETS[row["preset"]], HEAD_DIM)
        size = codec.layout.record_bytes
        cycles = {
            "memory": size / MEMORY_BYTES,
            "shared memory": sum(per_token(library, codec).values()),
            "tensor cores": PRODUCT_CYCLES,
            "instructions": row["tile"] / 16 / PER_CYCLE,
        }
        slowest = max(cycles, key=cycles.__getitem__)
        shown = [f"{x:.1f}" for x in cycles.values()]
        shown.insert(3, str(row["tile"]))
        rate = f"{100 * cycles['memory'] / cycles[slowest]:.0f} %"
        lines.append(f"| `{row['preset']}` | {size} | {' | '.join(shown)} | {slowest} | {rate} |")
    (mapped,) = (row["tile"] for row in rows if row["keys"] == "transformed")
    told = f"`fibquant_3bit` with transformed keys: {mapped} instructions of a tile, "
    told += f"{mapped / 16 / PER_CYCLE:.1f} cycles a token, without a mean that turns."
    lines += ["", told]
    return "\n".join(lines) + "\n"


def main() -> None:
    from tests.emulated import emulated

    parser = argparse.ArgumentParser(prog="python -m benchmarks.instructions")
    parser.add_argument("--table", action="store_true", help="from the results there are")
    if not parser.parse_args().table:
        RESULTS.write_text("".join(json.dumps(row) + "\n" for row in measure()))
    table = markdown(read_rows(), emulated())
    DOCUMENT.write_text(between(DOCUMENT.read_text(), "bounds", table))


if __name__ == "__main__":
    main()
