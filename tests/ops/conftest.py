# SPDX-License-Identifier: Apache-2.0
"""What tests of the CUDA kernels share."""

from __future__ import annotations

import shutil

import pytest
import torch

from tests import emulated
from vllm_fibquant.ops import cuda


@pytest.fixture(scope="module")
def library() -> cuda.Library:
    """The CUDA library on a GPU where it runs, else in the emulator."""
    if torch.cuda.is_available() and cuda.is_built():
        return cuda.library()
    if shutil.which("g++") is None:
        pytest.skip("the emulator needs g++")
    return emulated.emulated()
