# SPDX-License-Identifier: Apache-2.0
"""The CPU library: loads libfibquant_cpu.so and hands it pointers.

The library has a plain C ABI (csrc/cpu/params.h), so one build serves every Python and torch. It
shares torch's OpenMP runtime, and so its threads and their binding, because torch is imported
first. Arguments are checked by `ops`; nothing here is called directly.
"""

from __future__ import annotations

import ctypes
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
    c_void_p,
    pointer,
)
from dataclasses import dataclass
from typing import Any

import torch

from vllm_fibquant.codec.codebook import Codebook
from vllm_fibquant.codec.codec import KVCodec
from vllm_fibquant.codec.config import GAIN_NUMBERS, CodeSpec
from vllm_fibquant.codec.gain import level_of_half, levels
from vllm_fibquant.codec.search import CodewordLists
from vllm_fibquant.files import PACKAGE_DIR
from vllm_fibquant.keys.key_map import STEP, KeyMap, Turns
from vllm_fibquant.ops.abi import DTYPES, Pages, load_library, pages_of
from vllm_fibquant.ops.reference import TokenCopies

LIBRARY_PATH = PACKAGE_DIR / "lib" / "libfibquant_cpu.so"
MAX_HEAD_DIM = 512
HEAD_DIM_MULTIPLE = 16
_ALIGNMENT = 64
_LARGEST_WORD = 32639  # 127 * 256 + 127
_COLUMNS = 16  # of turning tables, a multiple of it for each kind of pair


class _Code(Structure):
    _fields_ = [
        *((name, c_int32) for name in ("subvec_dim", "index_bits", "num_rows", "folded", "gain")),
        ("num_rows_padded", c_int32),
        ("norm_bytes", c_int32),
        *((name, c_void_p) for name in ("rows", "rows_t", "half_sq")),
        *((name, c_int32) for name in ("num_cells", "num_lists")),
        *((name, c_void_p) for name in ("cell_tiles", "list_tiles", "list_begin", "list_index")),
        ("planes", c_void_p),
        ("plane_step", c_float),
    ]


class _Codec(Structure):
    _fields_ = [
        ("head_dim", c_int32),
        ("record_bytes", c_int32),
        *((f"rotation_{name}", c_void_p) for name in ("signs", "matrix", "matrix_t")),
        ("key", _Code),
        ("value", _Code),
        ("levels", c_void_p),
        ("level_of_half", c_void_p),
    ]


class _KeyMap(Structure):
    _fields_ = [
        ("mean", c_void_p),
        ("num_plain", c_int64),
        *((name, c_void_p) for name in ("key_matrix_t", "query_matrix_t", "weight")),
        ("source_scale", c_float),
        ("num_coded", c_int32),
        ("num_subvecs", c_int32 * 3),
        ("codes", _Code * 3),
        *((name, c_void_p) for name in ("turn_pairs", "turn_mean", "turn_fine", "turn_coarse")),
        ("num_positions", c_int64),
        *((name, c_int32) for name in ("num_turning", "num_fast", "num_columns")),
        *((name, c_int32) for name in ("num_fast_columns", "num_first_means")),
        *((name, c_void_p) for name in ("first_key", "first_value")),
    ]


class _Encode(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("key", "value", "slot_mapping")),
        ("num_tokens", c_int64),
        *((f"stride_key_{name}", c_int64) for name in ("token", "head")),
        *((f"stride_value_{name}", c_int64) for name in ("token", "head")),
        ("dtype", c_int32),
        ("num_threads", c_int32),
        ("key_map", POINTER(_KeyMap)),
        ("positions", c_void_p),
    ]


class _Attend(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("query", "out", "raw_key", "raw_value")),
        *((name, c_void_p) for name in ("query_start_loc", "seq_lens", "block_table", "sinks")),
        ("stride_block_table", c_int64),
        *((f"stride_query_{name}", c_int64) for name in ("token", "head")),
        *((f"stride_out_{name}", c_int64) for name in ("token", "head")),
        *((f"stride_raw_key_{name}", c_int64) for name in ("token", "head")),
        *((f"stride_raw_value_{name}", c_int64) for name in ("token", "head")),
        *((name, c_int32) for name in ("num_reqs", "num_q_heads", "dtype", "window")),
        *((name, c_float) for name in ("scale", "soft_cap")),
        *((name, c_int32) for name in ("num_threads", "copy_dtype")),
        *((f"copy_{name}", c_void_p) for name in ("key", "value", "table")),
        *((f"stride_copy_{name}", c_int64) for name in ("row", "head")),
        *((name, c_int32) for name in ("num_first", "num_recent")),
        *((name, c_void_p) for name in ("new_tokens", "new_rows")),
        *((name, c_int64) for name in ("num_new", "num_copy_rows")),
        ("first_query", c_void_p),
        *((f"stride_first_query_{name}", c_int64) for name in ("token", "head")),
        ("keep_first", c_int64),
        ("key_map", POINTER(_KeyMap)),
    ]


def is_built() -> bool:
    """Whether the library file exists."""
    return LIBRARY_PATH.exists()


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded library.

    Raises:
        RuntimeError: it is missing, does not load, or was built from other sources.
    """
    advice = "build it with `pip install -e .` (or `python setup.py build_ext --inplace`)"
    structs = (_Code, _Codec, Pages, _Encode, _Attend, _KeyMap)
    lib = load_library("native.library", LIBRARY_PATH, "fq_abi", structs, advice)
    lib.fq_isa.restype = c_char_p
    lib.fq_select_isa.argtypes = [c_char_p]
    lib.fq_encode_kv.argtypes = [POINTER(_Codec), POINTER(Pages), POINTER(_Encode)]
    lib.fq_encode_kv.restype = c_int64
    lib.fq_paged_attention.argtypes = [POINTER(_Codec), POINTER(Pages), POINTER(_Attend)]
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


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """A contiguous float32 CPU copy of x whose data starts at a multiple of 64 bytes."""
    x = x.to(device="cpu", dtype=torch.float32).contiguous()
    spare = _ALIGNMENT // 4
    buffer = torch.empty(x.numel() + spare, dtype=torch.float32)
    start = -(buffer.data_ptr() // 4) % spare
    view = buffer[start : start + x.numel()].view(x.shape)
    return view.copy_(x)


def _code(
    spec: CodeSpec, codebook: Codebook, lists: CodewordLists | None, keep: list[torch.Tensor]
) -> _Code:
    rows = codebook.rows.float()  # [num_rows, subvec_dim]
    num_rows, dim = rows.shape
    padded = -(-num_rows // 16) * 16
    rows_t = torch.zeros(dim, padded)
    rows_t[:, :num_rows] = rows.T
    half_sq = torch.full((padded,), torch.inf)
    half_sq[:num_rows] = rows.square().sum(-1) / 2
    tables = [_aligned(t) for t in (rows, rows_t, half_sq)]
    keep.extend(tables)
    pointers = [t.data_ptr() for t in tables]
    gain = GAIN_NUMBERS[spec.gain]
    found = _lists(rows, lists, spec.lists_searched, keep)
    shape = dim, spec.index_bits, num_rows, int(spec.folded), gain, padded, spec.norm_bytes
    return _Code(*shape, *pointers, *found, *_planes(codebook, keep))


def _planes(codebook: Codebook, keep: list[torch.Tensor]) -> tuple[int | None, float]:
    """The fields of `_Code` from planes on.

    int8 books are taken as they are stored. Coordinates of float16 books become integers of two
    bytes, within 2e-5 of the book's largest one.
    """
    spec = codebook.spec
    one_byte = (4, "int8"), (8, "int8")
    shape = spec.subvec_dim, spec.storage
    if spec.num_rows != 256 or shape not in (*one_byte, (2, "float16")):
        return None, 0.0
    if shape in one_byte:
        planes, step = codebook.table.T, codebook.scale
    else:
        offset = 128.5 if spec.folded else 0.0
        rows = codebook.rows.double().T
        step16 = float(rows.abs().max()) / (_LARGEST_WORD - offset)
        words = (rows / step16 - offset).round()  # 256 * high + low, both signed
        high = ((words + 128) / 256).floor()
        planes, step = torch.cat((high, words - 256 * high)), 256 * step16
    buffer = torch.empty(planes.numel() + _ALIGNMENT, dtype=torch.int8)
    start = -buffer.data_ptr() % _ALIGNMENT
    aligned = buffer[start : start + planes.numel()].view(planes.shape)
    keep.append(aligned.copy_(planes))
    return aligned.data_ptr(), step


def _lists(
    rows: torch.Tensor, lists: CodewordLists | None, num_lists: int, keep: list[torch.Tensor]
) -> tuple[int | None, ...]:
    """The fields of `_Code` from num_cells on."""
    if lists is None:
        return 0, 0, None, None, None, None
    listed = [members.nonzero().squeeze(-1) for members in lists.members]
    index = torch.cat([torch.nn.functional.pad(i, (0, -len(i) % 16), value=-1) for i in listed])
    num_tiles = torch.tensor([0, *(-(-len(i) // 16) for i in listed)])
    cells = torch.arange(len(lists.cells))
    cells = torch.nn.functional.pad(cells, (0, -len(cells) % 16), value=-1)
    tables = [_aligned(_tiles(lists.cells, cells)), _aligned(_tiles(rows, index))]
    tables += [num_tiles.cumsum(0).to(torch.int32), index.to(torch.int32)]
    keep.extend(tables)
    return len(lists.cells), num_lists, *(t.data_ptr() for t in tables)


def _tiles(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """rows[index] as tiles (params.h), float32 `[n / 16, subvec_dim + 1, 16]`; -1 is padding."""
    bias = (-rows.square().sum(-1) / 2)[index].masked_fill(index < 0, -torch.inf)
    return torch.cat((bias.unsqueeze(-1), rows[index]), -1).unflatten(0, (-1, 16)).transpose(1, 2)


_codecs: weakref.WeakKeyDictionary[KVCodec, tuple[_Codec, list[torch.Tensor]]] = (
    weakref.WeakKeyDictionary()
)


def codec_struct(codec: KVCodec) -> _Codec:
    """The codec as the library reads it, made once per codec and kept alive with it."""
    if codec not in _codecs:
        keep: list[torch.Tensor] = []
        rotation = codec.key.rotation
        if rotation.kind == "hadamard":
            keep.append(_aligned(rotation.signs))
            pointers = [keep[0].data_ptr(), None, None]
        else:
            keep += [_aligned(rotation.matrix), _aligned(rotation.matrix.T)]
            pointers = [None, *(t.data_ptr() for t in keep)]
        struct = _Codec(codec.head_dim, codec.layout.record_bytes, *pointers)
        struct.key, struct.value = (
            _code(side.spec, side.codebook, side.lists, keep) for side in (codec.key, codec.value)
        )
        struct.levels, struct.level_of_half = (t.data_ptr() for t in (levels(), level_of_half()))
        _codecs[codec] = (struct, keep)
    return _codecs[codec][0]


_key_maps: weakref.WeakKeyDictionary[KeyMap, tuple[_KeyMap, list[torch.Tensor]]] = (
    weakref.WeakKeyDictionary()
)


def _key_map_pointer(key_map: KeyMap | None) -> Any:
    """The map as the library reads it, made once per map and kept alive with it."""
    if key_map is None:
        return None
    if key_map not in _key_maps:
        keep = [_aligned(key_map.mean)]
        struct = _KeyMap(keep[0].data_ptr(), key_map.num_plain)
        if (transform := key_map.transform) is not None:
            matrices = (transform.key_matrix.mT, transform.query_matrix.mT, transform.weight)
            keep += [_aligned(x) for x in matrices]
            struct.key_matrix_t, struct.query_matrix_t, struct.weight = (
                x.data_ptr() for x in keep[1:]
            )
            struct.source_scale, struct.num_coded = transform.source_scale, transform.num_coded
            struct.num_subvecs[:] = transform.lengths
            struct.codes[:] = [_code(b.spec, b, None, keep) for b in transform.codebooks]
        if (turning := key_map.turning) is not None:
            turns, chosen = turning.turns, turning.chosen
            tables = _turn_tables(turns)
            coordinates = turns.pairs[chosen.long()]  # [num_kv_heads, num_turning, 2]
            columns = tables.column_of_pair[chosen.long()].unsqueeze(-1)
            rows = torch.cat((coordinates, columns), -1).contiguous()
            keep += (rows, _aligned(turns.length * turning.mean), tables.fine, tables.coarse)
            struct.turn_pairs, struct.turn_mean, struct.turn_fine, struct.turn_coarse = (
                x.data_ptr() for x in keep[-4:]
            )
            struct.num_positions, struct.num_fast = turns.num_positions, turning.num_fast
            struct.num_turning, struct.num_columns = chosen.shape[1], tables.coarse.shape[2]
            struct.num_fast_columns = tables.fine.shape[1]
        if (first := key_map.first) is not None:
            keep += [_aligned(first.key), _aligned(first.value)]
            struct.first_key, struct.first_value = (x.data_ptr() for x in keep[-2:])
            struct.num_first_means = first.num_first
        _key_maps[key_map] = (struct, keep)
    return pointer(_key_maps[key_map][0])


@dataclass(frozen=True)
class _TurnTables:
    """The tables of `params.h`, and which of their columns each pair is."""

    fine: torch.Tensor  # float32 [2, num_fast_columns, STEP / 2]
    coarse: torch.Tensor  # float32 [num_positions / STEP + 1, 2, num_columns]
    column_of_pair: torch.Tensor  # int32 [num_pairs]


_tables: weakref.WeakKeyDictionary[Turns, _TurnTables] = weakref.WeakKeyDictionary()


def _turn_tables(turns: Turns) -> _TurnTables:
    """Made once for all layers that turn alike."""
    if turns not in _tables:
        kinds = [kind.nonzero().squeeze(-1) for kind in (~turns.is_slow, turns.is_slow)]
        fast, slow = (-(-len(kind) // _COLUMNS) * _COLUMNS for kind in kinds)
        columns = torch.zeros(len(turns.pairs), dtype=torch.int32)
        for kind, begin in zip(kinds, (0, fast), strict=True):
            columns[kind] = torch.arange(begin, begin + len(kind), dtype=torch.int32)
        middles = torch.arange(turns.num_positions // STEP + 1) * STEP + (STEP - 1) / 2
        coarse = torch.zeros(len(middles), 2, fast + slow)
        table = turns.table(middles, stepped=True).float().unflatten(-1, (2, -1))
        coarse[..., columns.long()] = table
        fine = torch.zeros(2, fast, STEP // 2)
        table = turns.table(torch.arange(STEP // 2) + 0.5).float().T.unflatten(0, (2, -1))
        fine[:, : len(kinds[0])] = table[:, kinds[0]]
        _tables[turns] = _TurnTables(_aligned(fine), _aligned(coarse), columns)
    return _tables[turns]


def record_layout(codec: KVCodec) -> list[int]:
    """The library's own idea of the record: offsets of K and V indices, of both norms, its size."""
    struct, out = codec_struct(codec), (c_int32 * 5)()
    library().fq_record_layout(codec.head_dim, byref(struct.key), byref(struct.value), out)
    return list(out)


def encode_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    codec: KVCodec,
    key_map: KeyMap | None,
    positions: torch.Tensor | None,
) -> int:
    """See `ops.encode_kv`. Returns -1 when a slot lies outside the cache, -2 when a position does
    outside the map's table."""
    args = _Encode(
        key=key.data_ptr(),
        value=value.data_ptr(),
        slot_mapping=slot_mapping.data_ptr(),
        num_tokens=slot_mapping.shape[0],
        dtype=DTYPES[key.dtype],
        num_threads=torch.get_num_threads(),
        key_map=_key_map_pointer(key_map),
        positions=None if positions is None else positions.data_ptr(),
    )
    args.stride_key_token, args.stride_key_head, _ = key.stride()
    args.stride_value_token, args.stride_value_head, _ = value.stride()
    return library().fq_encode_kv(byref(codec_struct(codec)), byref(pages_of(cache)), byref(args))


def paged_attention(
    query: torch.Tensor,
    cache: torch.Tensor,
    codec: KVCodec,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    out: torch.Tensor,
    *,
    scale: float,
    window: int,
    soft_cap: float,
    sinks: torch.Tensor | None,
    raw_key: torch.Tensor | None,
    raw_value: torch.Tensor | None,
    copies: TokenCopies | None,
    keep_first: int,
    first_query: torch.Tensor | None,
    key_map: KeyMap | None,
) -> int:
    """See `ops.paged_attention`. Returns the library's error number, 0 for none."""
    args = _Attend(
        query=query.data_ptr(),
        out=out.data_ptr(),
        query_start_loc=query_start_loc.data_ptr(),
        seq_lens=seq_lens.data_ptr(),
        block_table=block_table.data_ptr(),
        stride_block_table=block_table.stride(0),
        num_reqs=seq_lens.shape[0],
        num_q_heads=query.shape[1],
        dtype=DTYPES[query.dtype],
        window=window,
        scale=scale,
        soft_cap=soft_cap,
        num_threads=torch.get_num_threads(),
        keep_first=keep_first,
        key_map=_key_map_pointer(key_map),
    )
    args.stride_query_token, args.stride_query_head, _ = query.stride()
    args.stride_out_token, args.stride_out_head, _ = out.stride()
    first = query if first_query is None else first_query
    args.first_query = first.data_ptr()
    args.stride_first_query_token, args.stride_first_query_head, _ = first.stride()
    if sinks is not None:
        args.sinks = sinks.data_ptr()
    if raw_key is not None and raw_value is not None:
        args.raw_key, args.raw_value = raw_key.data_ptr(), raw_value.data_ptr()
        args.stride_raw_key_token, args.stride_raw_key_head, _ = raw_key.stride()
        args.stride_raw_value_token, args.stride_raw_value_head, _ = raw_value.stride()
    if copies is not None:
        args.copy_dtype = DTYPES[copies.key.dtype]
        args.copy_key, args.copy_value = copies.key.data_ptr(), copies.value.data_ptr()
        args.copy_table = copies.table.data_ptr()
        args.stride_copy_row, args.stride_copy_head, _ = copies.key.stride()
        args.num_first = copies.num_first
        args.num_recent = copies.table.shape[1] - copies.num_first
        args.num_copy_rows = copies.key.shape[0]
        if copies.new_tokens is not None and copies.new_rows is not None:
            args.new_tokens = copies.new_tokens.data_ptr()
            args.new_rows = copies.new_rows.data_ptr()
            args.num_new = copies.new_tokens.shape[0]
    return library().fq_paged_attention(
        byref(codec_struct(codec)), byref(pages_of(cache)), byref(args)
    )
