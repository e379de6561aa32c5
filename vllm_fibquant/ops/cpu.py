# SPDX-License-Identifier: Apache-2.0
"""The two operations on CPUs: hands the CPU library pointers.

Structs are kept with what they describe (`Pages`, `Attend`, `Batch`); a call writes a few fields.
"""

from __future__ import annotations

from ctypes import byref, pointer
from typing import Any

import torch

from vllm_fibquant.codec.codec import KVCodec
from vllm_fibquant.ops.abi import DTYPES, pages_of
from vllm_fibquant.ops.call import Attend, Batch, Copied, Fresh, Pages
from vllm_fibquant.ops.checks import check_pair
from vllm_fibquant.ops.cpu_library import (
    FqAttend,
    FqBatch,
    FqEncode,
    isa,
    library,
    unsupported_head_dim,
)
from vllm_fibquant.ops.cpu_tables import codec_struct, key_map_pointer
from vllm_fibquant.ops.kernels import Kernels

_ERRORS = {
    1: "block_table must hold block numbers inside the cache",
    2: "query_start_loc and seq_lens must describe requests with at least as many tokens as "
    "new tokens",
    3: "seq_lens must not exceed what a row of block_table holds",
    4: "seq_lens must not exceed the positions that key_map.turning knows",
    5: "new_tokens and new_rows must be tokens of the batch and rows of the layer's copies",
}


class _Layer:
    """What calls on the pages of one layer have in common; `Pages.kept`.

    Attributes:
        encoded: the `Pages.encoded` whose layouts `encode` describes.
    """

    def __init__(self, pages: Pages) -> None:
        self.codec = byref(codec_struct(pages.codec))
        self.struct = pages_of(pages.cache)
        self.pages = byref(self.struct)
        self.encode = FqEncode(key_map=key_map_pointer(pages.key_map))
        self.encode_args = byref(self.encode)
        self.encoded: Any = None


class _Step:
    """What calls on one batch have in common, whatever their layer; `Batch.kept`.

    Attributes:
        plans: how its work is cut into jobs, by what that depends on.
    """

    def __init__(self, batch: Batch) -> None:
        table, tokens, rows = batch.copy_table, batch.new_tokens, batch.new_rows
        self.struct = FqBatch(
            query_start_loc=batch.query_start_loc.data_ptr(),
            seq_lens=batch.seq_lens.data_ptr(),
            block_table=batch.block_table.data_ptr(),
            stride_block_table=batch.block_table.stride(0),
            num_reqs=batch.num_reqs,
        )
        if table is not None:
            self.struct.copy_table, self.struct.num_copy_columns = table.data_ptr(), table.shape[1]
        if tokens is not None and rows is not None:
            self.struct.new_tokens, self.struct.new_rows = tokens.data_ptr(), rows.data_ptr()
            self.struct.num_new = tokens.shape[0]
        self.pointer = pointer(self.struct)
        self.plans: dict[Any, torch.Tensor] = {}


class _Attending:
    """What calls of one layer that attends its pages in one way have in common; `Attend.kept`.

    Attributes:
        kind: what the plan of a step depends on of this layer.
        attended: the `Attend.attended` whose layouts `attend` describes.
    """

    def __init__(self, layer: _Layer, pages: Pages, attend: Attend) -> None:
        check_pair(pages, attend)
        self.layer, self.of = layer, pages
        self.batch: Batch | None = None
        self.attended: Any = None
        self.attend = FqAttend(
            scale=attend.scale,
            reach=attend.reach,
            soft_cap=attend.soft_cap,
            keep_first=attend.keep_first,
            key_map=key_map_pointer(pages.key_map),
        )
        self.args = byref(self.attend)
        if attend.sinks is not None:
            self.attend.sinks = attend.sinks.data_ptr()
        num_copy_rows = 0
        if (copies := attend.copies) is not None:
            args, num_copy_rows = self.attend, copies.key.shape[0]
            args.copy_key, args.copy_value = copies.key.data_ptr(), copies.value.data_ptr()
            args.copy_dtype, args.num_copy_rows = DTYPES[copies.key.dtype], num_copy_rows
            args.stride_copy_row, args.stride_copy_head, _ = copies.key.stride()
            args.num_first = copies.num_first
        of_map = None
        if (key_map := pages.key_map) is not None:
            turns = key_map.turning and key_map.turning.turns.num_positions
            of_map = key_map.transform is None, key_map.num_plain, turns
        of_pages = pages.num_kv_heads, pages.block_size, pages.codec.head_dim
        self.kind = *of_pages, self.attend.reach, attend.keep_first, num_copy_rows, of_map

    def plan(self, plans: dict[Any, torch.Tensor], kind: tuple[Any, ...]) -> torch.Tensor:
        """Plans the batch and keeps that under `kind`."""
        fq_plan, of = library().fq_plan, (self.layer.codec, self.layer.pages, self.args)
        if (num_bytes := fq_plan(*of, None)) < 0:
            raise ValueError(f"paged_attention: {_ERRORS[-num_bytes]}")
        plans[kind] = plan = torch.empty(num_bytes, dtype=torch.uint8, device="cpu")
        fq_plan(*of, plan.data_ptr())
        return plan


class Cpu(Kernels):
    """The C++ kernels, in the instruction set this processor has."""

    implementation = "cpu"

    @property
    def name(self) -> str:
        return f"cpu-{isa()}"

    def refuses(self, codec: KVCodec, cache: torch.Tensor | None = None) -> str | None:
        if cache is not None and not cache.is_cpu:
            return f"cache must be on the CPU or a CUDA GPU, got {cache.device}"
        return unsupported_head_dim(codec.head_dim)

    def encode_kv(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        slot_mapping: torch.Tensor,
        pages: Pages,
        positions: torch.Tensor | None = None,
        copied: Copied | None = None,
    ) -> int:
        layer = pages.kept
        if layer is None:
            layer = pages.kept = _Layer(pages)
        args = layer.encode
        if layer.encoded is not pages.encoded or layer.encoded is None:
            layer.encoded = pages.encoded
            args.stride_key_token, args.stride_key_head, _ = key.stride()
            args.stride_value_token, args.stride_value_head, _ = value.stride()
            args.num_tokens, args.dtype = slot_mapping.shape[0], DTYPES[key.dtype]
            args.positions = None
        layer.struct.base = pages.cache.data_ptr()
        args.key, args.value = key.data_ptr(), value.data_ptr()
        args.slot_mapping, args.num_threads = slot_mapping.data_ptr(), torch.get_num_threads()
        if positions is not None:
            args.positions = positions.data_ptr()
        nonfinite: int = library().fq_encode_kv(layer.codec, layer.pages, layer.encode_args)
        if not nonfinite:
            return 0
        if nonfinite == -2 and positions is not None:
            raise ValueError(
                "encode_kv: positions must be at least 0 and of those key_map.turning knows, got "
                f"{int(positions.min())} to {int(positions.max())}"
            )
        if nonfinite < 0:
            num_slots = pages.cache.shape[0] * pages.block_size
            raise ValueError(
                f"encode_kv: slot_mapping must hold slots below {num_slots} or -1, got "
                f"{int(slot_mapping.max())}"
            )
        return nonfinite

    def paged_attention(
        self,
        query: torch.Tensor,
        out: torch.Tensor,
        pages: Pages,
        batch: Batch,
        attend: Attend,
        fresh: Fresh | None = None,
    ) -> None:
        layer = pages.kept
        if layer is None:
            layer = pages.kept = _Layer(pages)
        kept: Any = attend.kept
        if kept is None or kept.of is not pages:
            kept = attend.kept = _Attending(layer, pages, attend)
        step = batch.kept
        if step is None:
            step = batch.kept = _Step(batch)
        args = kept.attend
        if kept.batch is not batch:
            kept.batch, args.batch = batch, step.pointer
        raw_key, raw_value, first_query = fresh or _NOTHING
        if kept.attended is not attend.attended or kept.attended is None:
            kept.attended = attend.attended
            args.num_q_heads, args.dtype = query.shape[1], DTYPES[query.dtype]
            args.stride_query_token, args.stride_query_head, _ = query.stride()
            args.stride_out_token, args.stride_out_head, _ = out.stride()
            args.raw_key = args.raw_value = None
            if raw_key is not None and raw_value is not None:
                args.stride_raw_key_token, args.stride_raw_key_head, _ = raw_key.stride()
                args.stride_raw_value_token, args.stride_raw_value_head, _ = raw_value.stride()
        layer.struct.base = pages.cache.data_ptr()
        num_q_heads, num_threads = args.num_q_heads, torch.get_num_threads()
        args.query, args.out, args.num_threads = query.data_ptr(), out.data_ptr(), num_threads
        if raw_key is not None and raw_value is not None:
            args.raw_key, args.raw_value = raw_key.data_ptr(), raw_value.data_ptr()
        if attend.keep_first or pages.key_map is not None:
            first = query if first_query is None else first_query
            args.first_query = first.data_ptr()
            args.stride_first_query_token, args.stride_first_query_head, _ = first.stride()
        kind = kept.kind, num_q_heads, num_threads, raw_key is None
        plan = step.plans.get(kind)
        if plan is None:
            plan = kept.plan(step.plans, kind)
        args.plan = plan.data_ptr()
        if error := library().fq_paged_attention(layer.codec, layer.pages, kept.args):
            raise ValueError(f"paged_attention: {_ERRORS[error]}")


_NOTHING = Fresh()
