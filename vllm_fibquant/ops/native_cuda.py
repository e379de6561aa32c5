# SPDX-License-Identifier: Apache-2.0
"""The CUDA library: loads libfibquant_cuda.so and hands it pointers.

A plain C ABI (csrc/cuda/params.h) without torch headers: one build serves every Python and torch.
The same kernels built for the emulator (csrc/cuda/emulate.h) are another `Library`, for tests.
Arguments are checked by `gpu`; nothing here is called directly, and nothing reads back to the host.
"""

from __future__ import annotations

import functools
import weakref
from ctypes import (
    POINTER,
    Structure,
    byref,
    c_char_p,
    c_float,
    c_int32,
    c_int64,
    c_uint64,
    c_void_p,
)
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_fibquant.codec.codec import KVCodec, VectorCodec
from vllm_fibquant.codec.config import GAIN_NUMBERS
from vllm_fibquant.files import PACKAGE_DIR
from vllm_fibquant.ops import splits
from vllm_fibquant.ops.abi import DTYPES, Pages, load_library, pages_of

LIBRARY_PATH = PACKAGE_DIR / "lib" / "libfibquant_cuda.so"
NARROW_COLUMNS = 8
MIN_SPLIT = 512
"""Tokens below which another split costs more in merging than it saves."""
ENCODE_CTAS_PER_SM = 8
MAX_LAYERS = 4096
"""Of which the structs are kept, per library."""


class _Code(Structure):
    _fields_ = [
        *((name, c_int32) for name in ("subvec_dim", "index_bits", "folded", "gain")),
        ("table_scale", c_float),
        ("num_rows", c_int32),
        *((name, c_void_p) for name in ("table", "rows", "half_sq")),
    ]


class _Codec(Structure):
    _fields_ = [
        ("head_dim", c_int32),
        ("record_bytes", c_int32),
        *((f"rotation_{name}", c_void_p) for name in ("signs", "matrix", "matrix_t")),
        ("key", _Code),
        ("value", _Code),
    ]


class _Encode(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("key", "value", "slot_mapping", "counters")),
        ("num_tokens", c_int64),
        *((f"stride_key_{name}", c_int64) for name in ("token", "head")),
        *((f"stride_value_{name}", c_int64) for name in ("token", "head")),
        *((name, c_int32) for name in ("dtype", "max_ctas")),
    ]


class _Attend(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("query", "out", "query_start_loc", "seq_lens")),
        *((name, c_void_p) for name in ("block_table", "sinks", "raw_o", "raw_m", "raw_l")),
        *((name, c_void_p) for name in ("state_o", "state_ml")),
        ("stride_block_table", c_int64),
        *((f"stride_query_{name}", c_int64) for name in ("token", "head")),
        *((f"stride_out_{name}", c_int64) for name in ("token", "head")),
        ("num_tokens", c_int64),
        *((name, c_int32) for name in ("num_reqs", "num_q_heads", "table_width", "dtype")),
        *((name, c_int32) for name in ("window", "num_splits", "wide")),
        *((name, c_float) for name in ("scale", "soft_cap")),
    ]


@dataclass(frozen=True)
class Support:
    """What a library has kernels for, as csrc/cuda/supported.h says.

    Attributes:
        wide_columns: by head_dim, the query rows that share a decoded token in a wide row block.
        codes: name by (subvec_dim, index_bits, folded).
        pairs: (key code, value code) with decode kernels of their own; any other pair of codes
            takes one that finds out at run time.
    """

    wide_columns: dict[int, int]
    codes: dict[tuple[int, int, bool], str]
    pairs: frozenset[tuple[str, str]]

    @classmethod
    def parse(cls, text: str) -> Support:
        rows = [line.split() for line in text.splitlines()]
        codes = [row[1:] for row in rows if row[0] == "code"]
        name_of = {kind: name for kind, name, *_ in codes}
        return cls(
            {int(row[1]): int(row[2]) for row in rows if row[0] == "head_dim"},
            {(int(dim), int(bits), folded == "1"): name for _, name, dim, bits, folded in codes},
            frozenset((name_of[row[1]], name_of[row[2]]) for row in rows if row[0] == "pair"),
        )

    def markdown(self) -> str:
        """The table of docs/gpu.md."""
        lines = ["| code | coordinates | index bits | sign-folded |", "|---|---|---|---|"]
        for (dim, bits, folded), name in self.codes.items():
            lines.append(f"| `{name}` | {dim} | {bits} | {'yes' if folded else 'no'} |")
        lines += ["", "| head_dim | rows of a narrow row block | of a wide one |", "|---|---|---|"]
        for dim, columns in self.wide_columns.items():
            lines.append(f"| {dim} | {NARROW_COLUMNS} | {columns} |")
        pairs = ", ".join(f"`{key}`/`{value}`" for key, value in sorted(self.pairs))
        lines += ["", f"Key/value pairs with a decode kernel of their own: {pairs}."]
        return "\n".join(lines)

    def unsupported(self, codec: KVCodec) -> str | None:
        """Why there is no kernel for this codec, or None when there is one."""
        if codec.head_dim not in self.wide_columns:
            known = ", ".join(map(str, self.wide_columns))
            return f"head_dim must be one of {known} for the CUDA library, got {codec.head_dim}"
        for side, code in (("key", codec.key), ("value", codec.value)):
            spec = code.spec
            if (spec.subvec_dim, spec.index_bits, spec.folded) not in self.codes:
                known = ", ".join(self.codes.values())
                return (
                    f"the {side} code must be one of {known} for the CUDA library, got {spec.name}"
                )
        return None


class Library:
    """One loaded library.

    Raises:
        RuntimeError: it does not load, or was built from other sources.
    """

    def __init__(self, path: Path) -> None:
        self.lib = load_library(
            "native_cuda.Library",
            path,
            "fq_cuda_abi",
            (_Code, _Codec, Pages, _Encode, _Attend),
            "build it with `make cuda`",
        )
        for name in ("fq_cuda_support", "fq_cuda_error"):
            getattr(self.lib, name).restype = c_char_p
        codec, pages = POINTER(_Codec), POINTER(Pages)
        self.lib.fq_cuda_encode_kv.argtypes = [codec, pages, POINTER(_Encode), c_void_p]
        self.lib.fq_cuda_paged_attention.argtypes = [codec, pages, POINTER(_Attend), c_void_p]
        self.lib.fq_cuda_token_order.argtypes = [c_int32, POINTER(_Code), POINTER(_Code)]
        self.lib.fq_cuda_token_order.restype = c_uint64
        self.support = Support.parse(self.lib.fq_cuda_support().decode())
        self._layers: dict[tuple[Any, ...], _Layer] = {}

    def why_unusable(self) -> str | None:
        """Why the current device cannot run the kernels, in the CUDA runtime's words, or None."""
        error = self.lib.fq_cuda_usable()
        return self.lib.fq_cuda_error(error).decode() if error else None

    def token_order(self, codec: KVCodec) -> list[int]:
        """Which token of a tile of 16 stands in each row of its products."""
        struct = _codec_struct(codec, torch.device("cpu"))
        packed = self.lib.fq_cuda_token_order(codec.head_dim, struct.key, struct.value)
        return [packed >> 4 * row & 15 for row in range(16)]

    def _layer(self, codec: KVCodec, cache: torch.Tensor) -> _Layer:
        """What calls on these pages have in common, made at the first."""
        at = (codec, cache.data_ptr(), cache.shape, cache.stride(), cache.device)
        layer = self._layers.get(at)
        if layer is None:
            if len(self._layers) >= MAX_LAYERS:  # caches that are gone
                self._layers.clear()
            layer = self._layers[at] = _Layer(self, codec, cache)
        return layer

    def occupancy(
        self, head_dim: int, record_bytes: int, wide: bool, per_cta: int, per_sm: int
    ) -> tuple[int, int, int]:
        """How decode attention (wide: of many rows) fills a multiprocessor.

        Args:
            per_cta, per_sm: bytes of shared memory that a CTA may have, and a multiprocessor has.

        Returns:
            CTAs side by side, warps of each, and bytes of shared memory of each.
        """
        out = (c_int32 * 3)()
        self.lib.fq_cuda_occupancy(head_dim, record_bytes, int(wide), per_cta, per_sm, out)
        return out[0], out[1], out[2]

    def _check(self, function: str, error: int) -> None:
        if error:
            message = self.lib.fq_cuda_error(error).decode()
            raise RuntimeError(f"{function}: the CUDA library must succeed, got {message}")

    def encode_kv(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        codec: KVCodec,
        counters: torch.Tensor,
    ) -> None:
        """See `ops.encode_kv` and `gpu.counters`."""
        layer = self._layer(codec, cache)
        args = _Encode(
            key=key.data_ptr(),
            value=value.data_ptr(),
            slot_mapping=slot_mapping.data_ptr(),
            counters=counters.data_ptr(),
            num_tokens=slot_mapping.shape[0],
            dtype=DTYPES[key.dtype],
            max_ctas=layer.encode_ctas,
        )
        args.stride_key_token, args.stride_key_head, _ = key.stride()
        args.stride_value_token, args.stride_value_head, _ = value.stride()
        error = self.lib.fq_cuda_encode_kv(
            layer.codec, layer.pages, byref(args), _stream(layer.device)
        )
        self._check("encode_kv", error)

    def paged_attention(
        self,
        query: torch.Tensor,
        cache: torch.Tensor,
        codec: KVCodec,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        block_table: torch.Tensor,
        out: torch.Tensor,
        *,
        scale: float,
        window: int = 0,
        soft_cap: float = 0.0,
        sinks: torch.Tensor | None = None,
        raw_states: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
        num_splits: int | None = None,
        wide: bool | None = None,
        workspace: torch.Tensor | None = None,
    ) -> None:
        """See `ops.paged_attention`.

        Args:
            raw_states: states of the new tokens from raw keys and values, or None: float32
                contiguous o [num_tokens * num_q_heads, head_dim], m and l [num_tokens *
                num_q_heads], weights relative to exp(m). When given, codes are attended for the
                tokens before the new ones only.
            num_splits: parts of every sequence; None chooses.
            wide: whether more than 8 query rows share a decoded token; None chooses.
            workspace: float32 [at least `workspace_floats`] on the cache's device; None allocates,
                which a CUDA graph's memory pool keeps valid.
        """
        layer = self._layer(codec, cache)
        num_tokens, num_q_heads, head_dim = query.shape
        num_reqs, table_width = seq_lens.shape[0], block_table.shape[1]
        if wide is None:
            wide = num_tokens * num_q_heads > NARROW_COLUMNS * num_reqs * layer.num_kv_heads
        if num_splits is None:
            num_splits = layer.num_splits(wide, num_reqs, num_tokens, num_q_heads, table_width)
        args = _Attend(
            query=query.data_ptr(),
            out=out.data_ptr(),
            query_start_loc=query_start_loc.data_ptr(),
            seq_lens=seq_lens.data_ptr(),
            block_table=block_table.data_ptr(),
            stride_block_table=block_table.stride(0),
            num_tokens=num_tokens,
            num_reqs=num_reqs,
            num_q_heads=num_q_heads,
            table_width=table_width,
            dtype=DTYPES[query.dtype],
            window=window,
            num_splits=num_splits,
            wide=int(wide),
            scale=scale,
            soft_cap=soft_cap,
        )
        args.stride_query_token, args.stride_query_head, _ = query.stride()
        args.stride_out_token, args.stride_out_head, _ = out.stride()
        if num_splits > 1:
            num_rows = num_tokens * num_q_heads
            floats = workspace_floats(num_rows, head_dim, num_splits)
            workspace = splits.workspace_of(workspace, floats, layer.device)
            args.state_o = at = workspace.data_ptr()
            args.state_ml = at + 4 * num_rows * num_splits * head_dim
        if sinks is not None:
            args.sinks = sinks.data_ptr()
        if raw_states is not None:
            args.raw_o, args.raw_m, args.raw_l = (x.data_ptr() for x in raw_states)
        error = self.lib.fq_cuda_paged_attention(
            layer.codec, layer.pages, byref(args), _stream(layer.device)
        )
        self._check("paged_attention", error)


class _Layer:
    """A library's kernels on the pages of one layer: what its calls have in common.

    Attributes:
        codec, pages: references to the structs, as the library takes them.
        device: of the pages.
        num_kv_heads: as the pages say.
        encode_ctas: CTAs of an encode launch, at most.
    """

    def __init__(self, library: Library, codec: KVCodec, cache: torch.Tensor) -> None:
        self.device = cache.device
        self.codec = byref(_codec_struct(codec, self.device))
        self.pages = byref(pages_of(cache))
        self.num_kv_heads, self._block_size = cache.shape[1], cache.shape[2]
        num_sms = splits.num_sms(self.device)
        self.encode_ctas = ENCODE_CTAS_PER_SM * num_sms
        self._columns = (NARROW_COLUMNS, library.support.wide_columns.get(codec.head_dim, 0))
        per_cta, per_sm = _shared_memory(self.device)
        self._slots = [
            num_sms * library.occupancy(codec.head_dim, cache.shape[3], wide, per_cta, per_sm)[0]
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


def workspace_floats(num_rows: int, head_dim: int, num_splits: int) -> int:
    """float32 elements of the states of all splits; num_rows is tokens times query heads.

    One split has none: its outputs are written directly.
    """
    return 0 if num_splits == 1 else num_rows * num_splits * (head_dim + 2)


def unsupported_cache(cache: torch.Tensor) -> str | None:
    """Why the kernels cannot take these pages, or None when they can."""
    if cache.shape[2] % 16:
        return f"block_size must be a multiple of 16 for the CUDA library, got {cache.shape[2]}"
    if (cache.data_ptr() | cache.stride(0) | cache.stride(1)) % 16:
        return f"cache must be 16-byte aligned for the CUDA library, got strides {cache.stride()}"
    return None


def _stream(device: torch.device) -> int | None:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None


def _code(code: VectorCodec, device: torch.device, keep: list[torch.Tensor]) -> _Code:
    spec, book = code.spec, code.codebook
    table = book.table.to(torch.float16)
    if spec.storage == "int8" and spec.folded:
        table = table + 0.5  # exact, and so is row = scale * table
    rows = book.rows.float()
    tables = [x.contiguous().clone().to(device) for x in (table, rows, rows.square().sum(-1) / 2)]
    keep.extend(tables)
    return _Code(
        spec.subvec_dim, spec.index_bits, int(spec.folded), GAIN_NUMBERS[spec.gain],
        float(book.scale), spec.num_rows, *(x.data_ptr() for x in tables),
    )  # fmt: skip


_Made = dict[torch.device, tuple[_Codec, list[torch.Tensor]]]
_codecs: weakref.WeakKeyDictionary[KVCodec, _Made] = weakref.WeakKeyDictionary()


def _codec_struct(codec: KVCodec, device: torch.device) -> Any:
    """The codec with its tables on `device`, made once and kept while the codec lives.

    The first call copies to the device: make it before a CUDA graph is captured.
    """
    made = _codecs.setdefault(codec, {})
    if device not in made:
        keep: list[torch.Tensor] = []
        rotation = codec.key.rotation
        if rotation.kind == "hadamard":
            keep.append(rotation.signs.float().contiguous().to(device))
            pointers = [keep[0].data_ptr(), None, None]
        else:
            matrix = rotation.matrix.float()
            keep += [x.contiguous().to(device) for x in (matrix, matrix.T)]
            pointers = [None, *(x.data_ptr() for x in keep)]
        struct = _Codec(codec.head_dim, codec.layout.record_bytes, *pointers)
        struct.key, struct.value = (_code(c, device, keep) for c in (codec.key, codec.value))
        made[device] = struct, keep
    return made[device][0]
