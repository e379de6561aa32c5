# SPDX-License-Identifier: Apache-2.0
"""All of the emulator's tests, on the PTX of several architectures."""

from __future__ import annotations

import shutil

import pytest

from tests import emulated as emu
from tests.ops.test_cuda_emulated import *  # noqa: F403
from tests.ptx import device

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not device.has_nvcc(), reason="nvcc is not installed: no PTX to run"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="the launchers need g++"),
]


@pytest.fixture(params=["80", "90", "120"])
def library(request):
    """The emulated library, whose launches run as PTX."""
    # Of a block that is outside the cache nothing is copied: its tile is attended as it lies, and
    # then its scores become NaN.
    unwritten = "block_outside" in request.node.name
    with device.running(emu.emulated(), request.param, allow_unwritten=unwritten):
        yield emu.emulated()
