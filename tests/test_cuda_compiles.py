# SPDX-License-Identifier: Apache-2.0
"""nvcc compiles the CUDA kernels for every architecture, within stated budgets.

Without a GPU this is what can be known of the machine code: registers, spills and shared memory.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ARCHS = ("80", "86", "89", "90a", "100a", "120")
HEAD_DIMS = (64, 96, 128, 192, 256)
MAX_REGISTERS = 255
NARROW_REGISTERS = 128
"""Of a decode kernel up to head_dim 128: two CTAs of 256 threads share a multiprocessor."""

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")


def compile_kernels(head_dim: int, arch: str, folder: Path) -> dict[tuple, dict[str, int]]:
    """{(kernel, *template arguments): {registers, spills, stack, shared}} of one object."""
    target = folder / f"kernels_{head_dim}_{arch}.o"
    command = ["nvcc", "-O3", "-std=c++17", "-I", str(ROOT / "csrc"), f"-DFQ_HEAD_DIM={head_dim}"]
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}", "-Xptxas=-v", "-c"]
    result = subprocess.run(
        [*command, str(ROOT / "csrc" / "cuda" / "kernels.cu"), "-o", str(target)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-4000:]
    found = {}
    for part in result.stderr.split("Compiling entry function '")[1:]:
        name, arguments = re.match(r"_ZN2fq\d+([a-z]+)I(\w+?)EEv", part).groups()
        numbers = tuple(int(n) for n in re.findall(r"Li(\d+)", arguments + "E"))
        shared = re.search(r"(\d+) bytes smem", part)
        found[(name, *numbers)] = {
            "registers": int(re.search(r"Used (\d+) registers", part)[1]),
            "spills": int(re.search(r"(\d+) bytes spill stores", part)[1]),
            "stack": int(re.search(r"(\d+) bytes stack frame", part)[1]),
            "shared": int(shared[1]) if shared else 0,
        }
    return found


@pytest.mark.parametrize(
    ("head_dim", "arch"),
    [
        pytest.param(d, a, marks=() if (d, a) == (128, "90a") else pytest.mark.slow)
        for a in ARCHS
        for d in HEAD_DIMS
    ],
)
def test_kernels_compile_within_budgets(head_dim: int, arch: str, tmp_path: Path) -> None:
    kernels = compile_kernels(head_dim, arch, tmp_path)
    attend = {key: used for key, used in kernels.items() if key[0] == "attend"}
    # The presets' ten pairs, any other pair, and wide row blocks of any pair.
    assert len(attend) == 12 and {key[0] for key in kernels} == {"attend", "merge", "encode"}
    for key, used in kernels.items():
        tiles = key[-1]
        narrow = key[0] == "attend" and tiles == 1 and head_dim <= 128
        limit = NARROW_REGISTERS if narrow else MAX_REGISTERS
        assert used["registers"] <= limit, f"{key}: {used}"
        assert used["spills"] == 0 and used["stack"] == 0, f"{key}: {used}"
        assert used["shared"] <= 1024, f"{key}: shared memory must be dynamic, {used}"
