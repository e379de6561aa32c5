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
    c_char_p,
    c_float,
    c_int32,
    c_int64,
    c_void_p,
)

from vllm_fibquant.files import PACKAGE_DIR
from vllm_fibquant.ops.abi import FqPages, fields, load_library
from vllm_fibquant.ops.cpu_tables import FqCode, FqCodec, FqKeyMap

LIBRARY_PATH = PACKAGE_DIR / "lib" / "libfibquant_cpu.so"
MAX_HEAD_DIM = 512
HEAD_DIM_MULTIPLE = 16


class FqEncode(Structure):
    _fields_ = fields(
        (c_void_p, "key value slot_mapping"),
        (c_int64, "num_tokens stride_key_token stride_key_head stride_value_token "
                  "stride_value_head"),
        (c_int32, "dtype num_threads"),
        (POINTER(FqKeyMap), "key_map"),
        (c_void_p, "positions"),
    )  # fmt: skip


class FqBatch(Structure):
    _fields_ = fields(
        (c_void_p, "query_start_loc seq_lens block_table copy_table new_tokens new_rows"),
        (c_int64, "stride_block_table num_new"),
        (c_int32, "num_reqs num_copy_columns"),
    )  # fmt: skip


class FqCopyPool(Structure):
    _fields_ = fields(
        (c_void_p, "row_of_slot slot_of_row next previous"),
        (c_int64, "num_slots"),
        (c_int32, "num_rows num_first num_recent block_size"),
    )  # fmt: skip


class FqAttend(Structure):
    _fields_ = fields(
        (POINTER(FqBatch), "batch"),
        (c_void_p, "plan query out raw_key raw_value sinks"),
        (c_int64, "stride_query_token stride_query_head stride_out_token stride_out_head "
                  "stride_raw_key_token stride_raw_key_head stride_raw_value_token "
                  "stride_raw_value_head"),
        (c_int32, "num_q_heads dtype window"),
        (c_float, "scale soft_cap"),
        (c_int32, "num_threads"),
        (c_void_p, "copy_key copy_value"),
        (c_int32, "copy_dtype num_first"),
        (c_int64, "num_copy_rows stride_copy_row stride_copy_head"),
        (c_void_p, "first_query"),
        (c_int64, "stride_first_query_token stride_first_query_head keep_first"),
        (POINTER(FqKeyMap), "key_map"),
    )  # fmt: skip


class FqEncodeLatents(Structure):
    _fields_ = fields(
        (c_void_p, "latent rotary slot_mapping"),
        (c_int64, "num_tokens stride_latent stride_rotary"),
        (c_int32, "rotary_dim dtype num_threads"),
    )  # fmt: skip


class FqAttendLatents(Structure):
    _fields_ = fields(
        (c_void_p, "query out block_table seq_lens"),
        (c_int64, "stride_query_req stride_query_head stride_block_table"),
        (c_int32, "num_reqs num_heads rotary_dim dtype num_threads"),
        (c_float, "scale"),
    )  # fmt: skip


_STRUCTS = (
    FqCode, FqCodec, FqPages, FqEncode, FqBatch, FqCopyPool, FqAttend, FqKeyMap, FqEncodeLatents,
    FqAttendLatents,
)  # fmt: skip


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded library.

    Raises:
        RuntimeError: it is missing, does not load, or was built from other sources.
    """
    advice = "build it with `pip install -e .` (or `python setup.py build_ext --inplace`)"
    lib = load_library("cpu.library", LIBRARY_PATH, "fq_abi", _STRUCTS, advice)
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
