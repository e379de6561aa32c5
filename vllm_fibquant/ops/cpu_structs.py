# SPDX-License-Identifier: Apache-2.0
"""A call as the CPU library reads it, field by field as in csrc/cpu/params.h; when the library is
loaded, names, offsets and sizes are compared with its own."""

from __future__ import annotations

from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p

from vllm_fibquant.ops.cpu_tables import FqKeyMap


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
