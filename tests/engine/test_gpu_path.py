# SPDX-License-Identifier: Apache-2.0
"""Runs tests/engine/gpu_cases.py in a process of its own, with Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")


@pytest.mark.slow
def test_engines_answer_as_with_the_cpu_kernels() -> None:
    root = Path(__file__).parent.parent.parent
    environment = dict(os.environ, OMP_NUM_THREADS="1", TRITON_INTERPRET="1")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "tests/engine/gpu_cases.py"]
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
