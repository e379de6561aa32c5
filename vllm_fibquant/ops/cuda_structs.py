# SPDX-License-Identifier: Apache-2.0
"""The CUDA library's structs that describe a call (csrc/cuda/params.h)."""

from __future__ import annotations

from ctypes import Structure, c_float, c_int32, c_int64, c_void_p

from vllm_fibquant.ops.abi import fields


class FqCudaEncode(Structure):
    _fields_ = fields(
        (c_void_p, "key value slot_mapping positions counters"),
        (c_int64, "num_tokens stride_key_token stride_key_head stride_value_token "
                  "stride_value_head"),
        (c_int32, "dtype max_ctas copy_dtype num_copy_rows"),
        (c_void_p, "copy_key copy_value copy_rows"),
    )  # fmt: skip


class FqCudaAttend(Structure):
    _fields_ = fields(
        (c_void_p, "query out query_start_loc seq_lens block_table sinks raw_o raw_m raw_l "
                   "state_o state_ml copy_table copy_key copy_value prepared first_query"),
        (c_int64, "stride_block_table stride_query_token stride_query_head stride_out_token "
                  "stride_out_head stride_first_query_token stride_first_query_head "
                  "num_tokens"),
        (c_int32, "num_reqs num_q_heads table_width dtype window num_splits wide "
                  "num_copy_columns num_copied_first num_copy_rows copy_dtype keep_first"),
        (c_float, "scale soft_cap"),
    )  # fmt: skip


class FqCudaPlan(Structure):
    _fields_ = fields(
        (c_void_p, "query_start_loc seq_lens block_table slots tags wanted rows table"),
        (c_int64, "stride_block_table num_tokens"),
        (c_int32, "num_reqs table_width block_size num_first num_recent first_units "
                  "recent_units"),
    )  # fmt: skip
