# SPDX-License-Identifier: Apache-2.0
"""The CUDA library's structs that describe a call (csrc/cuda/params.h)."""

from __future__ import annotations

from ctypes import Structure, c_float, c_int32, c_int64, c_void_p


class FqCudaEncode(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("key", "value", "slot_mapping", "positions", "counters")),
        ("num_tokens", c_int64),
        *((f"stride_key_{name}", c_int64) for name in ("token", "head")),
        *((f"stride_value_{name}", c_int64) for name in ("token", "head")),
        *((name, c_int32) for name in ("dtype", "max_ctas", "copy_dtype", "num_copy_rows")),
        *((name, c_void_p) for name in ("copy_key", "copy_value", "copy_rows")),
    ]


class FqCudaAttend(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("query", "out", "query_start_loc", "seq_lens")),
        *((name, c_void_p) for name in ("block_table", "sinks", "raw_o", "raw_m", "raw_l")),
        *((name, c_void_p) for name in ("state_o", "state_ml", "copy_table", "copy_key")),
        *((name, c_void_p) for name in ("copy_value", "prepared", "first_query")),
        ("stride_block_table", c_int64),
        *((f"stride_query_{name}", c_int64) for name in ("token", "head")),
        *((f"stride_out_{name}", c_int64) for name in ("token", "head")),
        *((f"stride_first_query_{name}", c_int64) for name in ("token", "head")),
        ("num_tokens", c_int64),
        *((name, c_int32) for name in ("num_reqs", "num_q_heads", "table_width", "dtype")),
        *((name, c_int32) for name in ("window", "num_splits", "wide", "num_copy_columns")),
        *((name, c_int32) for name in ("num_copied_first", "num_copy_rows", "copy_dtype")),
        ("keep_first", c_int32),
        *((name, c_float) for name in ("scale", "soft_cap")),
    ]


class FqCudaPlan(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("query_start_loc", "seq_lens", "block_table", "slots")),
        *((name, c_void_p) for name in ("tags", "wanted", "rows", "table")),
        *((name, c_int64) for name in ("stride_block_table", "num_tokens")),
        *((name, c_int32) for name in ("num_reqs", "table_width", "block_size", "num_first")),
        *((name, c_int32) for name in ("num_recent", "first_units", "recent_units")),
    ]
