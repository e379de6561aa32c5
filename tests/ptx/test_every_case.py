# SPDX-License-Identifier: Apache-2.0
"""All of the emulator's tests, on the PTX of several architectures."""

from __future__ import annotations

import shutil

import pytest

from tests import emulated as emu
from tests.ops import test_cuda_copies
from tests.ops.test_cuda_emulated import *  # noqa: F403
from tests.ptx import device
from tests.ptx.machine import Machine
from tests.ptx.memory import Global, Shared, Where
from tests.ptx.parse import kernel_text, parse

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not device.has_nvcc(), reason="nvcc is not installed: no PTX to run"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="the launchers need g++"),
]


# Some have the names of others: each gets one of its own.
for _name, _case in vars(test_cuda_copies).items():
    if _name.startswith("test_"):
        globals()[_name.replace("test_", "test_copies_", 1)] = _case


@pytest.fixture(params=["80", "90", "120"])
def library(request):
    """The emulated library, whose launches run as PTX."""
    # Of a block that is outside the cache nothing is copied: its tile is attended as it lies, and
    # then its scores become NaN. The other case maps keys of 1 bit (tests/ptx/test_mapped.py says
    # what of their queries is read and not used).
    names = ("block_outside", "leave_no_trace_of_codes")
    unwritten = any(name in request.node.name for name in names)
    with device.running(emu.emulated(), request.param, allow_unwritten=unwritten):
        yield emu.emulated()


@pytest.mark.parametrize("arch", ["80", "90", "100", "120"])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 112, 128, 192, 256])
def test_every_instruction_of_every_kernel_is_known(head_dim: int, arch: str) -> None:
    """Also those of kernels and branches that no case runs."""
    source = emu.ROOT / "csrc" / "cuda" / "kernels.cu"
    text = device.compile_ptx(source, arch, f"-DFQ_HEAD_DIM={head_dim}")
    names = device.kernel_names(text)
    assert len(names) >= 14
    check_every_instruction(text)


@pytest.mark.parametrize("arch", ["80", "90", "100", "120"])
def test_every_instruction_of_a_plan_is_known(arch: str) -> None:
    text = device.compile_ptx(emu.ROOT / "csrc" / "cuda" / "library.cu", arch)
    assert len(device.kernel_names(text)) == 3
    check_every_instruction(text)


def check_every_instruction(text: str) -> None:
    for name in device.kernel_names(text):
        kernel, where = parse(kernel_text(text, name)), Where(32, [(0, 0, 0)])
        machine = Machine(kernel, (1, 1, 1), where, Shared(where, 16, False), Global([]), b"")
        for instruction in kernel.body:
            if instruction.op[0] not in ("bra", "ret"):
                machine.lowering.lower(instruction)
