# SPDX-License-Identifier: Apache-2.0
"""The CUDA library: loads libfibquant_cuda.so and hands it pointers.

A plain C ABI (csrc/cuda/params.h) without torch headers: one build serves every Python and torch.
The same kernels built for the emulator (csrc/cuda/emulate.h) are another `Library`, for tests.
Nothing here reads back to the host, so what a host cannot know is not raised: vectors with NaN or
infinity, and slots outside the cache, are counted on the device (`device_counters`), and a block
number outside the cache gives NaN in its request's rows.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from ctypes import (
    POINTER,
    byref,
    c_char_p,
    c_int32,
    c_int64,
    c_uint64,
    c_void_p,
)
from pathlib import Path
from typing import Any

import torch

from vllm_fibquant.codec.codec import KVCodec
from vllm_fibquant.files import PACKAGE_DIR
from vllm_fibquant.keys.key_map import KeyMap
from vllm_fibquant.ops import raw_states, splits
from vllm_fibquant.ops.abi import DTYPES, FqPages, load_library, pages_of
from vllm_fibquant.ops.call import Attend, Batch, Copied, Fresh, Pages
from vllm_fibquant.ops.checks import check_pair
from vllm_fibquant.ops.cuda_support import NARROW_COLUMNS, Support
from vllm_fibquant.ops.cuda_tables import (
    PAIRS,
    FqCudaAttend,
    FqCudaCode,
    FqCudaCodec,
    FqCudaEncode,
    FqCudaKeyMap,
    FqCudaPlan,
    codec_struct,
    key_map_struct,
    unsupported_key_map,
)
from vllm_fibquant.ops.kernels import GpuKernels, device_counters

LIBRARY_PATH = PACKAGE_DIR / "lib" / "libfibquant_cuda.so"
MIN_SPLIT = 512
"""Tokens below which another split costs more in merging than it saves."""
ENCODE_CTAS_PER_SM = 8


class Library:
    """One loaded library.

    Raises:
        RuntimeError: it does not load, or was built from other sources.
    """

    def __init__(self, path: Path) -> None:
        advice = "build it with `make cuda`"
        self.lib = load_library("cuda.Library", path, "cuda", "fq_cuda_abi", advice)
        for name in ("fq_cuda_support", "fq_cuda_error"):
            getattr(self.lib, name).restype = c_char_p
        layer = [POINTER(struct) for struct in (FqCudaCodec, FqPages, FqCudaKeyMap)]
        self.lib.fq_cuda_encode_kv.argtypes = [*layer, POINTER(FqCudaEncode), c_void_p]
        self.lib.fq_cuda_paged_attention.argtypes = [*layer, POINTER(FqCudaAttend), c_void_p]
        self.lib.fq_cuda_plan_copies.argtypes = [POINTER(FqCudaPlan), c_void_p]
        self.lib.fq_cuda_prepared_floats.argtypes = [c_int32, POINTER(FqCudaKeyMap)]
        self.lib.fq_cuda_prepared_floats.restype = c_int64
        self.lib.fq_cuda_token_order.argtypes = [c_int32, POINTER(FqCudaCode), POINTER(FqCudaCode)]
        self.lib.fq_cuda_token_order.restype = c_uint64
        self.support = Support.parse(self.lib.fq_cuda_support().decode())

    def why_unusable(self) -> str | None:
        """Why the current device cannot run the kernels, in the CUDA runtime's words, or None."""
        error = self.lib.fq_cuda_usable()
        return self.lib.fq_cuda_error(error).decode() if error else None

    def token_order(self, codec: KVCodec) -> list[int]:
        """Which token of a tile of 16 stands in each row of its products."""
        struct = codec_struct(codec, torch.device("cpu"))
        packed = self.lib.fq_cuda_token_order(codec.head_dim, struct.key, struct.value)
        return [packed >> 4 * row & 15 for row in range(16)]

    def occupancy(
        self,
        head_dim: int,
        record_bytes: int,
        wide: bool,
        per_cta: int,
        per_sm: int,
        mapped: bool = False,
    ) -> tuple[int, int, int]:
        """How decode attention (wide: of many rows; mapped: of mapped keys) fills a multiprocessor.

        Args:
            per_cta, per_sm: bytes of shared memory that a CTA may have, and a multiprocessor has.

        Returns:
            CTAs side by side, warps of each, and bytes of shared memory of each.
        """
        out = (c_int32 * 3)()
        kind = int(wide), int(mapped)
        self.lib.fq_cuda_occupancy(head_dim, record_bytes, *kind, per_cta, per_sm, out)
        return out[0], out[1], out[2]

    def plan_copies(self, call: FqCudaPlan, device: torch.device) -> None:
        """Plans one step of a pool of copies (csrc/cuda/copy_plan.h)."""
        with current(device):
            self.check("plan_copies", self.lib.fq_cuda_plan_copies(byref(call), _stream(device)))

    def check(self, function: str, error: int) -> None:
        """Raises RuntimeError with the library's own words for an error number that is not 0."""
        if error:
            message = self.lib.fq_cuda_error(error).decode()
            raise RuntimeError(f"{function}: the CUDA library must succeed, got {message}")


class _Layer:
    """What calls on the pages of one layer have in common; `Pages.kept`.

    Attributes:
        codec, pages, key_map: references to the structs, as the library takes them; key_map is
            None if keys have none.
        prepared_floats: of scratch memory for each row of queries to mapped keys; 0 without.
        joined_floats: the same of a layer that has copies or keeps first tokens.
        device: of the pages.
        num_kv_heads: as the pages say.
        encode_ctas: CTAs of an encode launch, at most.
    """

    def __init__(self, library: Library, pages: Pages) -> None:
        codec, cache = pages.codec, pages.cache
        self.device = cache.device
        self.codec = byref(codec_struct(codec, self.device))
        self.pages = byref(pages_of(cache))
        self.key_map, self.prepared_floats = None, 0
        self.joined_floats: int = library.lib.fq_cuda_prepared_floats(codec.head_dim, None)
        if pages.key_map is not None:
            key_map = key_map_struct(pages.key_map, self.device)
            self.key_map = byref(key_map)
            self.prepared_floats = library.lib.fq_cuda_prepared_floats(codec.head_dim, key_map)
            self.joined_floats = self.prepared_floats
        self.num_kv_heads, self._block_size = pages.num_kv_heads, pages.block_size
        num_sms = splits.num_sms(self.device)
        self.encode_ctas = ENCODE_CTAS_PER_SM * num_sms
        self._columns = (NARROW_COLUMNS, library.support.wide_columns.get(codec.head_dim, 0))
        per_cta, per_sm = _shared_memory(self.device)
        at, mapped = (per_cta, per_sm), pages.key_map is not None
        self._slots = [
            num_sms * library.occupancy(codec.head_dim, cache.shape[3], wide, *at, mapped)[0]
            for wide in (False, True)
        ]

    def num_splits(
        self, wide: bool, num_reqs: int, num_tokens: int, num_q_heads: int, table_width: int
    ) -> int:
        """Splits of every sequence that fill the device."""
        group_size = num_q_heads // self.num_kv_heads
        blocks = splits.num_row_blocks(num_reqs, num_tokens, group_size, self._columns[wide])
        return splits.choose_splits(
            blocks * self.num_kv_heads, table_width * self._block_size, self._slots[wide], MIN_SPLIT
        )


class _Attending:
    """What calls of one layer that attends its pages in one way have in common; `Attend.kept`."""

    def __init__(self, layer: _Layer, pages: Pages, attend: Attend) -> None:
        check_pair(pages, attend)
        self.layer, self.of = layer, pages
        self.attend = FqCudaAttend(
            reach=attend.reach, scale=attend.scale, soft_cap=attend.soft_cap,
            keep_first=attend.keep_first,
        )  # fmt: skip
        self.args = byref(self.attend)
        if attend.sinks is not None:
            self.attend.sinks = attend.sinks.data_ptr()
        if (copies := attend.copies) is not None:
            self.attend.copy_key, self.attend.copy_value = (
                x.data_ptr() for x in (copies.key, copies.value)
            )
            self.attend.num_copy_rows, self.attend.num_copied_first = (
                len(copies.key), copies.num_first,
            )  # fmt: skip
            self.attend.copy_dtype = DTYPES[copies.key.dtype]


class Cuda(GpuKernels):
    """The CUDA kernels.

    Args:
        library: loaded; the emulator's is one as well, for tests.
        num_splits: parts of every sequence; None chooses.
        wide: whether more than 8 query rows share a decoded token; None chooses.
        allocate: (float32 elements, device) to scratch memory; what is allocated while a CUDA
            graph is captured stays valid in the graph's memory pool.
        raw_states: (query, batch, attend, fresh) to the states of new tokens over raw keys and
            values; None for `attend.raw_library` where it takes them, else the Triton kernel.
    """

    implementation = "cuda"
    copies_while = ("encoding",)
    copy_dtypes = (torch.bfloat16, torch.float16)

    def __init__(
        self,
        library: Library,
        num_splits: int | None = None,
        wide: bool | None = None,
        allocate: Callable[[int, torch.device], torch.Tensor] = splits.allocate,
        raw_states: Callable[..., tuple[torch.Tensor, ...]] | None = None,
    ) -> None:
        self.library = library
        self._num_splits, self._wide, self._allocate = num_splits, wide, allocate
        self._raw_states = raw_states

    def refuses(self, codec: KVCodec, cache: torch.Tensor | None = None) -> str | None:
        reason = super().refuses(codec, cache) or self.library.support.unsupported(codec)
        return reason if reason or cache is None else unsupported_cache(cache)

    def refuses_key_map(self, key_map: KeyMap) -> str | None:
        return unsupported_key_map(key_map)

    def encode_kv(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        slot_mapping: torch.Tensor,
        pages: Pages,
        positions: torch.Tensor | None = None,
        copied: Copied | None = None,
    ) -> int:
        """Returns 0: what is not finite is counted on the device."""
        layer = pages.kept
        if layer is None:
            layer = pages.kept = _Layer(self.library, pages)
        args = FqCudaEncode(
            key.data_ptr(), value.data_ptr(), slot_mapping.data_ptr(),
            None if positions is None else positions.data_ptr(),
            device_counters(layer.device).data_ptr(), slot_mapping.shape[0], *key.stride()[:2],
            *value.stride()[:2], DTYPES[key.dtype], layer.encode_ctas,
        )  # fmt: skip
        if copied is not None:
            copies = copied.copies
            args.copy_key, args.copy_value = copies.key.data_ptr(), copies.value.data_ptr()
            args.copy_rows, args.num_copy_rows = copied.rows.data_ptr(), len(copies.key)
            args.copy_dtype = DTYPES[copies.key.dtype]
        with current(layer.device):
            error = self.library.lib.fq_cuda_encode_kv(
                layer.codec, layer.pages, layer.key_map, byref(args), _stream(layer.device)
            )
        self.library.check("encode_kv", error)
        return 0

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
            layer = pages.kept = _Layer(self.library, pages)
        kept: Any = attend.kept
        if kept is None or kept.of is not pages:
            kept = attend.kept = _Attending(layer, pages, attend)
        args = kept.attend
        self._write(args, layer, query, out, batch)
        if fresh is None or fresh.raw_key is None:
            args.raw_o = args.raw_m = args.raw_l = None
        else:
            raw = (self._raw_states or raw_states.of)(query, batch, attend, fresh)
            args.raw_o, args.raw_m, args.raw_l = (x.data_ptr() for x in raw)
        if attend.keep_first:
            first = query if fresh is None or fresh.first_query is None else fresh.first_query
            args.first_query = first.data_ptr()
            args.stride_first_query_token, args.stride_first_query_head, _ = first.stride()
        num_rows, num_splits = args.num_tokens * args.num_q_heads, args.num_splits
        args.state_o = args.state_ml = args.prepared = None
        states = workspace_floats(num_rows, pages.codec.head_dim, num_splits)
        table, per_row = batch.copy_table, layer.prepared_floats
        args.copy_table, args.num_copy_columns = None, 0
        if table is not None:
            args.copy_table, args.num_copy_columns = table.data_ptr(), table.shape[1]
        if table is not None or attend.keep_first:
            per_row = layer.joined_floats
        floats = states + num_rows * per_row
        if floats:
            workspace = self._allocate(floats, layer.device)
            at = workspace.data_ptr()
            if states:
                args.state_o = at
                args.state_ml = at + 4 * num_rows * num_splits * pages.codec.head_dim
            if per_row:
                args.prepared = at + 4 * states
        with current(layer.device):
            error = self.library.lib.fq_cuda_paged_attention(
                layer.codec, layer.pages, layer.key_map, kept.args, _stream(layer.device)
            )
        self.library.check("paged_attention", error)

    def _write(
        self, args: FqCudaAttend, layer: _Layer, query: torch.Tensor, out: torch.Tensor,
        batch: Batch,
    ) -> None:  # fmt: skip
        """Writes the fields that describe a call's tensors, and how its work is cut."""
        num_tokens, num_q_heads, _ = query.shape
        num_reqs, table = batch.num_reqs, batch.block_table
        wide, num_splits = self._wide, self._num_splits
        if wide is None:
            wide = num_tokens * num_q_heads > NARROW_COLUMNS * num_reqs * layer.num_kv_heads
        if num_splits is None:
            num_splits = layer.num_splits(wide, num_reqs, num_tokens, num_q_heads, table.shape[1])
        args.query, args.out = query.data_ptr(), out.data_ptr()
        args.query_start_loc = batch.query_start_loc.data_ptr()
        args.seq_lens, args.block_table = batch.seq_lens.data_ptr(), table.data_ptr()
        args.stride_block_table, args.table_width = table.stride(0), table.shape[1]
        args.num_tokens, args.num_q_heads, args.num_reqs = num_tokens, num_q_heads, num_reqs
        args.dtype, args.wide, args.num_splits = DTYPES[query.dtype], wide, num_splits
        args.stride_query_token, args.stride_query_head, _ = query.stride()
        args.stride_out_token, args.stride_out_head, _ = out.stride()


def current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """A context in which `device` is the current one."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(device)


_NOTHING = contextlib.nullcontext()


@functools.cache
def _shared_memory(device: torch.device) -> tuple[int, int]:
    """Bytes of shared memory that a CTA may have, and a multiprocessor has."""
    if device.type != "cuda":
        return 99 << 10, 100 << 10
    properties = torch.cuda.get_device_properties(device)
    per_cta: int = getattr(properties, "shared_memory_per_block_optin")  # noqa: B009
    return per_cta, properties.shared_memory_per_multiprocessor


def is_built() -> bool:
    """Whether the CUDA library's file exists."""
    return LIBRARY_PATH.exists()


@functools.cache
def library() -> Library:
    """The CUDA library.

    Raises:
        RuntimeError: it is missing, does not load, or was built from other sources.
    """
    return Library(LIBRARY_PATH)


@functools.cache
def kernels() -> Cuda:
    """The CUDA kernels."""
    return Cuda(library())


def workspace_floats(num_rows: int, head_dim: int, num_splits: int) -> int:
    """float32 elements of the states of all splits; num_rows is tokens times query heads.

    One split has none: its outputs are written directly.
    """
    return 0 if num_splits == 1 else num_rows * num_splits * (head_dim + 2)


def most_prepared_floats(head_dim: int) -> int:
    """float32 elements of scratch memory that a row of queries needs with any map of keys."""
    most = FqCudaKeyMap(num_turning=-(-head_dim // 4 // PAIRS) * PAIRS)
    floats: int = library().lib.fq_cuda_prepared_floats(head_dim, most)
    return floats


def unsupported_cache(cache: torch.Tensor) -> str | None:
    """Why the kernels cannot take these pages, or None when they can."""
    if cache.shape[2] % 16:
        return f"block_size must be a multiple of 16 for the CUDA library, got {cache.shape[2]}"
    if (cache.data_ptr() | cache.stride(0) | cache.stride(1)) % 16:
        return f"cache must be 16-byte aligned for the CUDA library, got strides {cache.stride()}"
    return None


def _stream(device: torch.device) -> int | None:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None
