# SPDX-License-Identifier: Apache-2.0
"""The CPU library, libfibquant_cpu.so, and the structs of a call as it reads them.

The library has a plain C ABI (csrc/cpu/params.h), so one build serves every Python and torch. It
shares torch's OpenMP runtime, and so its threads and their binding, because torch is imported
first. When it is loaded, names, offsets and sizes of all fields are compared with its own.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import (
    POINTER,
    Structure,
    byref,
    c_char_p,
    c_float,
    c_int32,
    c_int64,
    c_void_p,
)

from vllm_fibquant.codec.codec import KVCodec
from vllm_fibquant.files import PACKAGE_DIR
from vllm_fibquant.ops.abi import FqPages, load_library
from vllm_fibquant.ops.cpu_tables import FqCode, FqCodec, FqKeyMap, codec_struct

LIBRARY_PATH = PACKAGE_DIR / "lib" / "libfibquant_cpu.so"
MAX_HEAD_DIM = 512
HEAD_DIM_MULTIPLE = 16


class FqEncode(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("key", "value", "slot_mapping")),
        ("num_tokens", c_int64),
        *((f"stride_key_{name}", c_int64) for name in ("token", "head")),
        *((f"stride_value_{name}", c_int64) for name in ("token", "head")),
        ("dtype", c_int32),
        ("num_threads", c_int32),
        ("key_map", POINTER(FqKeyMap)),
        ("positions", c_void_p),
    ]


class FqBatch(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("query_start_loc", "seq_lens", "block_table")),
        *((name, c_void_p) for name in ("copy_table", "new_tokens", "new_rows")),
        *((name, c_int64) for name in ("stride_block_table", "num_new")),
        *((name, c_int32) for name in ("num_reqs", "num_copy_columns")),
    ]


class FqCopyPool(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("row_of_slot", "slot_of_row", "next", "previous")),
        ("num_slots", c_int64),
        *((name, c_int32) for name in ("num_rows", "num_first", "num_recent", "block_size")),
    ]


class FqAttend(Structure):
    _fields_ = [
        ("batch", POINTER(FqBatch)),
        ("plan", c_void_p),
        *((name, c_void_p) for name in ("query", "out", "raw_key", "raw_value", "sinks")),
        *((f"stride_query_{name}", c_int64) for name in ("token", "head")),
        *((f"stride_out_{name}", c_int64) for name in ("token", "head")),
        *((f"stride_raw_key_{name}", c_int64) for name in ("token", "head")),
        *((f"stride_raw_value_{name}", c_int64) for name in ("token", "head")),
        *((name, c_int32) for name in ("num_q_heads", "dtype", "window")),
        *((name, c_float) for name in ("scale", "soft_cap")),
        ("num_threads", c_int32),
        *((f"copy_{name}", c_void_p) for name in ("key", "value")),
        *((name, c_int32) for name in ("copy_dtype", "num_first")),
        ("num_copy_rows", c_int64),
        *((f"stride_copy_{name}", c_int64) for name in ("row", "head")),
        ("first_query", c_void_p),
        *((f"stride_first_query_{name}", c_int64) for name in ("token", "head")),
        ("keep_first", c_int64),
        ("key_map", POINTER(FqKeyMap)),
    ]


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded library.

    Raises:
        RuntimeError: it is missing, does not load, or was built from other sources.
    """
    advice = "build it with `pip install -e .` (or `python setup.py build_ext --inplace`)"
    structs = (FqCode, FqCodec, FqPages, FqEncode, FqBatch, FqCopyPool, FqAttend, FqKeyMap)
    lib = load_library("cpu.library", LIBRARY_PATH, "fq_abi", structs, advice)
    lib.fq_isa.restype = c_char_p
    lib.fq_select_isa.argtypes = [c_char_p]
    # What every layer calls has no argtypes: ctypes would check its three pointers, always made by
    # byref, for as long as the call itself takes.
    lib.fq_encode_kv.restype = c_int64
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


def record_layout(codec: KVCodec) -> list[int]:
    """The library's own idea of the record: offsets of K and V indices, of both norms, its size."""
    struct, out = codec_struct(codec), (c_int32 * 5)()
    library().fq_record_layout(codec.head_dim, byref(struct.key), byref(struct.value), out)
    return list(out)


def unsupported_head_dim(head_dim: int) -> str | None:
    """Why the kernels cannot take this head_dim, or None when they can."""
    if head_dim % HEAD_DIM_MULTIPLE or not 0 < head_dim <= MAX_HEAD_DIM:
        return (
            f"head_dim must be a multiple of {HEAD_DIM_MULTIPLE}, at most {MAX_HEAD_DIM}, "
            f"got {head_dim}"
        )
    return None
