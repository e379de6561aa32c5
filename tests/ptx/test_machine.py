# SPDX-License-Identifier: Apache-2.0
"""The interpreter itself: planted faults are seen, and every function of warp.h agrees with its
other half, that of the emulator."""

from __future__ import annotations

import ctypes
import re
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.emulated import ROOT
from tests.ptx import machine
from tests.ptx.device import compile_ptx, has_nvcc, regions_of, tensors_before
from tests.ptx.parse import Fault, Instruction, kernel_names, kernel_text, parse

HERE = Path(__file__).parent
needs_nvcc = pytest.mark.skipif(not has_nvcc(), reason="nvcc is not installed: no PTX to run")
FAULTS = {
    "no_cta_barrier": "a write and a read without a barrier",
    "only_a_warp_barrier": "a write and a read without a barrier",
    "no_warp_barrier": "a write and a read without a barrier",
    "shuffle_is_no_barrier": "a write and a read without a barrier",
    "written_while_read": "a read and a write without a barrier",
    "read_by_both_warps": "a read and a write without a barrier",
    "two_writers": "two threads write one place at once",
    "half_a_word": "two threads write one place at once",
    "unwritten": "read before anything is written",
    "beyond_shared": "is beyond 4096",
    "beyond_global": "is in no allocation",
    "misaligned": "is no multiple of 4",
    "misaligned_quad": "is no multiple of 16",
    "copy_not_waited_for": "has not been waited for",
    "copy_not_shared": "a write and a read without a barrier",
    "copy_not_committed": "has not been waited for",
    "copy_over_what_is_read": "a read and a write without a barrier",
    "copy_left_behind": "ends before its copies arrived",
    "half_a_warp": "deadlock",
    "half_a_cta": "deadlock",
}


def run(text: str, name: str, arrays: list[np.ndarray], *extra: int, grid=(1, 1, 1)) -> set[str]:
    """Runs a kernel of two warps whose argument is pointers to `arrays`, then numbers."""
    regions = [(x.ctypes.data, x.nbytes) for x in arrays]
    params = struct.pack(f"{len(arrays)}Q", *(at for at, _ in regions)) + struct.pack(
        f"{len(extra)}i", *extra
    )
    kernel = parse(kernel_text(text, name))
    return machine.run(kernel, grid, 64, 4096, params.ljust(kernel.param_bytes, b"\0"), regions)


def aligned(words: int) -> np.ndarray:
    buffer = np.zeros(words + 16, np.uint32)
    start = -buffer.ctypes.data // 4 % 16
    return buffer[start : start + words]


@needs_nvcc
@pytest.mark.parametrize("arch", ["80", "90"])
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_seen(name: str, arch: str) -> None:
    text = compile_ptx(HERE / "faults.cu", arch)
    run(text, name, [aligned(256)], 0)
    with pytest.raises(Fault, match=FAULTS[name]):
        run(text, name, [aligned(256)], 1)


@needs_nvcc
def test_every_planted_fault_has_a_test() -> None:
    assert set(kernel_names(compile_ptx(HERE / "faults.cu", "90"))) == set(FAULTS)


# ---- warp.h -------------------------------------------------------------------------------------


def cases() -> list[str]:
    return re.findall(r"\nCASE\((\w+)\)", (HERE / "wrappers.cu").read_text())


@pytest.fixture(scope="module")
def emulated(tmp_path_factory) -> ctypes.CDLL:
    if shutil.which("g++") is None:
        pytest.skip("the emulator needs g++")
    target = tmp_path_factory.mktemp("wrappers") / "wrappers.so"
    flags = ["-O1", "-std=c++17", "-fPIC", "-shared", "-w", "-I", str(ROOT / "csrc"), "-x", "c++"]
    subprocess.run(["g++", *flags, str(HERE / "wrappers.cu"), "-o", str(target)], check=True)
    return ctypes.CDLL(str(target))


def both(emulated, arch: str, case: str, change=str):
    """Outputs and counts by the emulator and from PTX, [threads, words]."""
    threads, grid = 64 * 6, (2, 1, 3)
    given = aligned(threads * 12)
    given[:] = np.random.default_rng(1).integers(0, 1 << 32, threads * 12, np.uint32)
    outs, counts = [aligned(threads * 4) for _ in range(2)], [aligned(1) for _ in range(2)]
    pointers = (ctypes.c_void_p(x.ctypes.data) for x in (given, outs[0], counts[0]))
    assert emulated.run_wrapper(cases().index(case), *pointers) == 0
    text = compile_ptx(HERE / "wrappers.cu", arch)
    name = next(n for n in kernel_names(text) if f"{len(case)}{case}E" in n)
    run(change(text), name, [given, outs[1], counts[1]], grid=grid)
    return [x.reshape(threads, 4) for x in outs], counts


def check(emulated, arch: str, case: str, change=str) -> None:
    (expected, got), counts = both(emulated, arch, case, change)
    assert expected.any()
    assert counts[0] == counts[1]
    if case == "Floats":
        np.testing.assert_allclose(got.view(np.float32), expected.view(np.float32), rtol=1e-6)
    else:
        np.testing.assert_array_equal(got, expected)


@needs_nvcc
@pytest.mark.parametrize("arch", ["80", "90", "120"])
@pytest.mark.parametrize("case", cases())
def test_both_halves_of_warp_h_agree(emulated, case: str, arch: str) -> None:
    check(emulated, arch, case)


def test_every_function_of_warp_h_is_run() -> None:
    text = (ROOT / "csrc" / "cuda" / "warp.h").read_text()
    names = set(re.findall(r"FQ_DEVICE [\w*]+ (\w+)\(", text))
    assert {"mma", "transpose", "copy_async", "wait_copies", "load_floats"} <= names
    calls = set(re.findall(r"(\w+)(?:<[\w ]+>)?\(", (HERE / "wrappers.cu").read_text()))
    assert names <= calls, f"wrappers.cu must call {names - calls}"


@needs_nvcc
@pytest.mark.parametrize(
    ("case", "old", "new"),
    [
        ("Mma", r"(mma\.sync\S+ \{[^}]*\}, \{)(%r\d+), (%r\d+)", r"\1\3, \2"),
        ("Mma", r"(mma\.sync.*\}, \{)(%r\d+), (%r\d+)(\}, \{%f)", r"\1\3, \2\4"),
        ("Halves", r"(cvt\.rn\.f16x2\.f32 %r\d+), (%f\d+), (%f\d+)", r"\1, \3, \2"),
        ("Bytes", r"(shf\.r\.wrap\.b32\s+%r\d+), (%r\d+), (%r\d+)", r"\1, \3, \2"),
        ("Bytes", r"(prmt\.b32\s+%r\d+), (%r\d+), (%r\d+)", r"\1, \3, \2"),
        ("Transpose", r"movmatrix\S+ (%r\d+)", r"mov.b32 \1"),
        ("Copies", r"wait_group 1", "wait_group 2"),
        ("Copies", r"cp\.async\.commit_group;", ""),
        ("Floats", r"ex2\.approx\.ftz\.f32", "rcp.approx.ftz.f32"),
        ("Shuffle", r"(shfl\.sync\.bfly\.b32\s+\S+), (%[rf]\d+), %r\d+,", r"\1, \2, 3,"),
    ],
)
def test_a_change_of_inline_ptx_is_noticed(emulated, case: str, old: str, new: str) -> None:
    def change(text: str) -> str:
        changed, count = re.subn(old, new, text)
        assert count, f"PTX must hold {old}"
        return changed

    with pytest.raises((AssertionError, Fault)):
        check(emulated, "90", case, change)


# ---- what is not known is refused ---------------------------------------------------------------

EMPTY = """
.visible .entry empty(
	.param .align 8 .b8 empty_param_0[8]
)
{
	.reg .b32 	%r<3>;
	.reg .b64 	%rd<3>;
	BODY
	ret;
}
"""


@pytest.mark.parametrize(
    "line",
    [
        "add.sat.s32 %r1, %r1, %r2;",
        "shfl.sync.up.b32 %r1, %r2, 1, 0, -1;",
        "shfl.sync.bfly.b32 %r1, %r2, 1, 7, -1;",
        "shfl.sync.bfly.b32 %r1, %r2, 1, 31, 1;",
        "bar.warp.sync 3;",
        "ld.local.u32 %r1, [%rd1];",
        "ld.global.v2.u32 %r1, [%rd1];",
        "cvt.rni.s32.f32 %r1, %r2;",
        "add.s64 %rd1, %r1, %r2;",
        "mov.u32 %r1, %clock;",
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%r1}, {%r1}, {%r1}, {%r1};",
    ],
)
def test_what_is_not_known_is_refused(line: str) -> None:
    with pytest.raises(Fault):
        run(EMPTY.replace("BODY", line), "empty", [aligned(2)])


def test_loops_and_branches_meet_again() -> None:
    """Threads that take other ways, and loop for other times, come to a collective together."""
    body = """
	.reg .pred %p<3>;
	mov.u32 %r0, %tid.x;
	and.b32 %r1, %r0, 7;
	mov.u32 %r2, 0;
$L_loop:
	setp.eq.u32 %p0, %r1, 0;
	@%p0 bra $L_end;
	add.u32 %r2, %r2, %r1;
	sub.u32 %r1, %r1, 1;
	bra $L_loop;
$L_end:
	shfl.sync.bfly.b32 %r2, %r2, 7, 31, -1;
	ld.param.u64 %rd0, [empty_param_0];
	mul.wide.u32 %rd1, %r0, 4;
	add.u64 %rd1, %rd0, %rd1;
	setp.lt.u32 %p1, %r0, 40;
	@!%p1 st.global.u32 [%rd1], %r2;
"""
    out = aligned(64)
    out[:] = 99
    text = EMPTY.replace("BODY", body).replace("%r<3>", "%r<9>")
    run(text, "empty", [out])
    n = (np.arange(64) ^ 7) % 8
    expected = np.where(np.arange(64) < 40, 99, n * (n + 1) // 2)
    np.testing.assert_array_equal(out, expected)
    assert Instruction(1, "x", None, ("x",), ()).line == 1


def test_division_and_shifts_follow_ptx() -> None:
    from tests.ptx.arithmetic import FUNCTIONS, comparison

    a, b = np.array([-7, 7, -7, 7], np.int32), np.array([2, -2, -2, 0], np.int32)
    assert FUNCTIONS["div"][2](a, b).tolist() == [-3, -3, 3, -1]
    assert FUNCTIONS["rem"][2](a[:3], b[:3]).tolist() == [-1, 1, -1]
    u, shift = np.array([0x80000001] * 3, np.uint32), np.array([1, 31, 40], np.uint32)
    assert FUNCTIONS["shl"][2](u, shift).tolist() == [2, 1 << 31, 0]
    assert FUNCTIONS["shr"][2](u, shift).tolist() == [0x40000000, 1, 0]
    assert FUNCTIONS["shr"][2](u.view(np.int32), shift).tolist() == [-(1 << 30), -1, -1]
    permute = FUNCTIONS["prmt"][2]
    assert permute(np.uint32(0x44332280), np.uint32(0x88776655), np.uint32(0x8740)) == 0xFF885580
    insert = FUNCTIONS["bfi"][2]
    assert insert(np.uint32(0xAB), np.uint32(0xFFFFFFFF), np.uint32(4), np.uint32(8)) == 0xFFFFFABF
    nan = np.float32(np.nan)
    assert not comparison("lt", True)(nan, np.float32(1)) and comparison("ltu", True)(nan, nan)
    assert not comparison("ne", True)(nan, nan) and comparison("neu", True)(nan, nan)
    flushed = FUNCTIONS["ex2.approx.ftz"][2]
    assert flushed(np.array([-127.5, -1.0], np.float32)).tolist() == [0.0, 0.5]


def test_a_launch_finds_the_tensors_that_live() -> None:
    """Those from before `tensors_before` as well, and none that is gone."""
    before = torch.zeros(4)
    with tensors_before():
        new = torch.zeros(4)
        args = np.array([before.data_ptr(), new.data_ptr() + 8], np.uint64).tobytes()
        assert regions_of(args) == sorted((x.data_ptr(), 16) for x in (before, new))
        del before, new
        assert regions_of(args) == []
