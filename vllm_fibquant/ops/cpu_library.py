# SPDX-License-Identifier: Apache-2.0
"""The CPU library, libfibquant_cpu.so, and the structs of a call as it reads them.

The library has a plain C ABI (csrc/cpu/params.h), so one build serves every Python and torch. It
shares torch's OpenMP runtime, and so its threads and their binding, because torch is imported
first. The structs are those of the headers it was built from.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import POINTER, Structure, c_char_p, c_int64, c_void_p

from vllm_fibquant.files import PACKAGE_DIR
from vllm_fibquant.ops.abi import FqPages, from_header, load_library
from vllm_fibquant.ops.cpu_tables import FqCodec

LIBRARY_PATH = PACKAGE_DIR / "lib" / "libfibquant_cpu.so"
MAX_HEAD_DIM = 512
HEAD_DIM_MULTIPLE = 16


@from_header
class FqEncode(Structure): ...


@from_header
class FqBatch(Structure): ...


@from_header
class FqCopyPool(Structure): ...


@from_header
class FqAttend(Structure): ...


@from_header
class FqEncodeLatents(Structure): ...


@from_header
class FqAttendLatents(Structure): ...


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded library.

    Raises:
        RuntimeError: it is missing, does not load, or was built from other sources.
    """
    advice = "build it with `pip install -e .` (or `python setup.py build_ext --inplace`)"
    lib = load_library("cpu.library", LIBRARY_PATH, "cpu", "fq_abi", advice)
    lib.fq_isa.restype = c_char_p
    lib.fq_select_isa.argtypes = [c_char_p]
    # What every layer calls has no argtypes: ctypes would check its three pointers, always made by
    # byref, for as long as the call itself takes.
    lib.fq_encode_kv.restype = lib.fq_encode_latents.restype = c_int64
    lib.fq_plan.argtypes = [POINTER(FqCodec), POINTER(FqPages), POINTER(FqAttend), c_void_p]
    lib.fq_plan.restype = c_int64
    lib.fq_plan_copies.argtypes = [POINTER(FqCopyPool), POINTER(FqBatch), *[c_void_p] * 4]
    lib.fq_plan_copies.restype = c_int64
    return lib


def isa() -> str:
    """The instruction set in use: ``portable``, ``avx2``, ``avx512`` or ``avx512-vnni``."""
    return library().fq_isa().decode()


def select_isa(name: str | None) -> None:
    """Choose an instruction set, for tests and benchmarks; None chooses the best.

    Raises:
        ValueError: this CPU does not have it.
    """
    if library().fq_select_isa(name.encode() if name else None):
        raise ValueError(f"select_isa: name must be one this CPU supports, got {name!r}")


def unsupported_head_dim(head_dim: int) -> str | None:
    """Why the kernels cannot take this head_dim, or None when they can."""
    if head_dim % HEAD_DIM_MULTIPLE or not 0 < head_dim <= MAX_HEAD_DIM:
        return (
            f"head_dim must be a multiple of {HEAD_DIM_MULTIPLE}, at most {MAX_HEAD_DIM}, "
            f"got {head_dim}"
        )
    return None
