# SPDX-License-Identifier: Apache-2.0
"""nvcc compiles the CUDA kernels for every architecture, within stated budgets.

Without a GPU this is what can be known of the machine code: registers, spills and shared memory.
The gate compiles head_dim 128, whose budget of registers is the tightest, for all six
architectures, and head_dim 256, the largest kernels, for one. The slow tests compile every head_dim
for every architecture. docs/gpu.md shows the results of a run of all of them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import instructions, machine_code
from benchmarks.machine_code import ARCHS, HEAD_DIMS, SHARED_KIB
from tests import emulated as emu
from vllm_fibquant.codec.config import PRESETS
from vllm_fibquant.codec.layout import preset_layout

IN_THE_GATE = [*((128, arch) for arch in ARCHS), (256, "90a")]
MAX_REGISTERS = 255
NARROW_REGISTERS = 128
"""Of a decode kernel up to head_dim 128, of which 16 warps share a multiprocessor."""
NARROW = ("pair", "any", "product", "any_mapped")
NUM_KERNELS = 23
"""Of one head_dim."""
MIN_WARPS = 2
"""On a multiprocessor."""

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")


def check_budgets(rows: list[dict]) -> None:
    kernels = [row["kernel"] for row in rows]
    # The presets' eleven pairs, any other pair, and wide row blocks of any pair; of mapped keys two
    # codes of values, any pair, and wide row blocks.
    expected = ["pair"] * 11 + ["product"] * 2 + ["prepare", "first", "attend_copies", "merge"]
    for kind in ("", "_mapped"):
        expected += [f"any{kind}", f"wide{kind}", f"encode{kind}"]
    assert len(expected) == NUM_KERNELS and sorted(kernels) == sorted(expected)
    for row in rows:
        narrow = row["kernel"] in NARROW and row["head_dim"] <= 128
        assert row["registers"] <= (NARROW_REGISTERS if narrow else MAX_REGISTERS), row
        assert row["spills"] == 0 and row["stack"] == 0, row
        assert row["static_shared"] <= 1024, f"shared memory must be dynamic: {row}"


@needs_nvcc
@pytest.mark.long
def test_every_architecture_compiles_within_budgets() -> None:
    rows = machine_code.compile_all(IN_THE_GATE)
    assert len(rows) == NUM_KERNELS * len(IN_THE_GATE)
    for case in IN_THE_GATE:
        check_budgets([row for row in rows if (row["head_dim"], row["arch"]) == case])
    written = machine_code.read_rows()
    if machine_code.nvcc_version() == written[0]["nvcc"]:  # else other numbers are no mistake
        shown = machine_code.largest(written)
        for at, registers in machine_code.largest(rows).items():
            assert shown[at] == registers, f"{at}: python -m benchmarks.machine_code must run again"


@needs_nvcc
@pytest.mark.parametrize("arch", ["80", "120"])
def test_plans_of_copies_compile_within_budgets(arch: str, tmp_path) -> None:
    """They are of no head_dim, and in another file."""
    command = machine_code.compile_command(64, arch)
    command[-1] = command[-1].replace("kernels.cu", "library.cu")
    command += ["-Xptxas=-v", "-o", str(tmp_path / "library.cubin")]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert len(re.findall(r"Used (\d+) registers", told)) == 3
    assert not re.search(r"[1-9]\d* bytes (stack|spill)", told), told


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_head_dim_compiles_within_budgets(head_dim: int, arch: str) -> None:
    check_budgets(machine_code.compile_kernels(head_dim, arch))


@needs_nvcc
@pytest.mark.slow
def test_instructions_of_a_tile_are_those_that_are_written() -> None:
    if instructions.cuobjdump() is None:
        pytest.skip("Triton's NVIDIA backend brings cuobjdump")
    rows = instructions.measure()
    written = instructions.read_rows()
    if machine_code.nvcc_version() != machine_code.read_rows()[0]["nvcc"]:
        pytest.skip("another nvcc than the written numbers are of")
    assert rows == written, "python -m benchmarks.instructions must run again"


def test_the_shortest_way_with_what_it_needs_is_counted() -> None:
    """A loop from 0x20 to 0x90, whose copy and whose mask a way may leave out."""
    lines = ["MOV", "BRA 0x20", "HMMA a", "@P0 BRA 0x60", "LDGSTS a", "LDGSTS b", "HMMA b",
             "@P1 BRA 0x90", "FSEL", "@P2 BRA 0x20", "EXIT"]  # fmt: skip
    code = [(16 * i, line) for i, line in enumerate(lines)]
    assert instructions.count(code, {"HMMA": 2}) == 5
    assert instructions.count(code, {"HMMA": 2, "LDGSTS": 2}) == 7
    with pytest.raises(ValueError, match="must have a way"):
        instructions.count(code, {"HMMA": 3})


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("arch", ["90", "100"])
def test_the_builds_machine_code_is_that_of_the_accelerated_variant(arch: str, tmp_path) -> None:
    """setup.py builds for sm_90 and sm_100, which also serve later devices of their families."""
    backend = pytest.importorskip("triton.backends.nvidia", reason="has cuobjdump")
    tool = Path(backend.__file__).parent / "bin" / "cuobjdump"
    code = {}
    for variant in (arch, arch + "a"):
        target = tmp_path / f"{variant}.cubin"
        subprocess.run([*machine_code.compile_command(64, variant), "-o", target], check=True)
        dump = subprocess.run([tool, "-sass", target], capture_output=True, text=True, check=True)
        code[variant] = re.findall(r"Function : .*|/\*[0-9a-f]{4,} ?\*/.*|/\* 0x.*", dump.stdout)
    assert len(code[arch]) > 10000 and code[arch] == code[arch + "a"]


def test_the_build_is_for_every_architecture() -> None:
    text = (emu.ROOT / "setup.py").read_text()
    built = re.search(r'CUDA_ARCHS = "(.*)"', text)[1].split()
    assert built == [arch.rstrip("a") for arch in ARCHS]
    assert "code=compute_{oldest}" in text  # PTX for what has no machine code


@pytest.mark.parametrize("listed", ["80 86 89 90", "75 80 86 89 90 90a 100 120 121"])
def test_the_build_asks_nvcc_what_it_compiles_for(listed: str, tmp_path) -> None:
    fake, log = tmp_path / "nvcc", tmp_path / "log"
    answer = "".join(f"sm_{arch}\n" for arch in listed.split())
    fake.write_text(
        f"#!/bin/sh\nif [ \"$1\" = --list-gpu-code ]; then printf '{answer}'; exit 0; fi\n"
        f'echo "$@" >> {log}; exit 3\n'
    )
    fake.chmod(0o755)
    command = [sys.executable, "setup.py", "--quiet", "build_cuda"]
    environment = {k: v for k, v in os.environ.items() if k != "FIBQUANT_CUDA_ARCHS"}
    environment["CUDACXX"] = str(fake)
    shutil.copytree(emu.ROOT / "csrc", tmp_path / "csrc")
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(emu.ROOT / name, tmp_path / name)
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode != 0, "the stand-in compiles nothing"
    asked = set(re.findall(r"code=sm_(\w+)", log.read_text()))
    assert asked == set(listed.split()) & {"80", "86", "89", "90", "100", "120"}
    assert ("left out" in done.stdout) == ("100" not in listed)


@pytest.fixture(scope="module")
def emulated():
    if shutil.which("g++") is None:
        pytest.skip("the emulator needs g++")
    return emu.emulated()


@pytest.mark.parametrize("kib", SHARED_KIB.values(), ids=list(SHARED_KIB))
def test_shared_memory_fits_every_architecture(emulated, kib: tuple[int, int]) -> None:
    per_cta, per_sm = (x << 10 for x in kib)
    for preset in PRESETS.values():
        for head_dim in HEAD_DIMS:
            record_bytes = preset_layout(preset, head_dim).record_bytes
            for wide in (False, True):
                ctas, warps, used = emulated.occupancy(
                    head_dim, record_bytes, wide, per_cta, per_sm
                )
                case = f"{preset.name}, head_dim {head_dim}, wide {wide}"
                assert used <= per_cta and ctas * (used + 1024) <= per_sm, case
                # 99 KiB have room for one warp of wide row blocks of k5v4's 292-byte records.
                least = 1 if wide and record_bytes > 264 else MIN_WARPS
                assert ctas * warps >= least, case
    assert emulated.occupancy(160, 100, False, per_cta, per_sm) == (0, 0, 0)


def test_the_documents_tables_are_those_of_the_results(emulated) -> None:
    rows = machine_code.read_rows()
    assert len(rows) == NUM_KERNELS * len(ARCHS) * len(HEAD_DIMS)
    shown = machine_code.between(machine_code.DOCUMENT.read_text(), "machine code")
    assert shown == machine_code.section(rows, emulated)
    shown = machine_code.between(machine_code.DOCUMENT.read_text(), "bounds")
    assert shown == instructions.markdown(instructions.read_rows(), emulated)


def test_the_readmes_table_is_the_dispatch_table(emulated) -> None:
    shown = machine_code.between(machine_code.README.read_text(), "gpu")
    assert shown == machine_code.support_markdown(emulated), (
        "README.md must show what `python -m benchmarks.machine_code --table` writes"
    )
