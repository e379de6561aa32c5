# SPDX-License-Identifier: Apache-2.0
"""A codec and a map of keys as structs and tables of the CPU library (csrc/cpu/tables.h)."""

from __future__ import annotations

import functools
from ctypes import Structure, pointer
from dataclasses import dataclass
from typing import Any

import torch

from vllm_fibquant.codec.codebook import Codebook
from vllm_fibquant.codec.codec import KVCodec, VectorCodec
from vllm_fibquant.codec.config import GAIN_NUMBERS, CodeSpec
from vllm_fibquant.codec.latent import LatentCodec
from vllm_fibquant.codec.search import CodewordLists
from vllm_fibquant.keys.key_map import STEP, KeyMap, Turns
from vllm_fibquant.ops.abi import from_header
from vllm_fibquant.ops.kept import kept_with
from vllm_fibquant.ops.search_tables import make_boxes, make_scan, make_squares

_LARGEST_WORD = 32639  # 127 * 256 + 127
_COLUMNS = 16  # of turning tables, a multiple of it for each kind of pair


@from_header
class FqCode(Structure): ...


@from_header
class FqCodec(Structure): ...


@from_header
class FqKeyMap(Structure): ...


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """A contiguous float32 CPU copy of x; torch begins what it allocates there at a multiple of 64
    bytes."""
    return x.to(device="cpu", dtype=torch.float32).contiguous().clone()


@functools.lru_cache(maxsize=64)
def _code(
    spec: CodeSpec, codebook: Codebook, lists: CodewordLists | None = None
) -> tuple[FqCode, list[torch.Tensor]]:
    """A code, and the tables it points to, which whoever uses it must keep.

    Layers share them: 14 KiB that one layer has read are then in a cache for the next one.
    """
    keep: list[torch.Tensor] = []
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
    shape = dim, spec.index_bits, num_rows, int(spec.folded), gain, padded
    code = FqCode(*shape, *pointers, *found, *_planes(codebook, keep))
    if (scan := make_scan(codebook)) is not None:
        keep.append(scan.table)
        code.scan, code.scan_scale = scan.table.data_ptr(), 1 / scan.step
        code.scan_most, code.scan_margin = scan.most, scan.margin
    if (squares := make_squares(codebook)) is not None:
        keep += [squares.rows, squares.planes]
        code.squares, code.square_planes = (x.data_ptr() for x in keep[-2:])
        code.square_low, code.square_scale = squares.low, 1 / squares.size
    if (boxes := make_boxes(codebook)) is not None:
        keep += [boxes.rows, boxes.sides]
        code.boxes, code.box_sides = (x.data_ptr() for x in keep[-2:])
        code.box_low, code.box_fine = boxes.low, 1 / boxes.fine
        code.box_scale, code.box_shift = 1 / boxes.step, boxes.shift
        code.box_reach, code.box_margin = boxes.reach, boxes.margin
    return code, keep


def _planes(codebook: Codebook, keep: list[torch.Tensor]) -> tuple[int | None, float]:
    """The fields of `FqCode` from planes on.

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
    keep.append(planes.to(torch.int8).contiguous())
    return keep[-1].data_ptr(), step


def _lists(
    rows: torch.Tensor, lists: CodewordLists | None, num_lists: int, keep: list[torch.Tensor]
) -> tuple[int | None, ...]:
    """The fields of `FqCode` from num_cells on."""
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
    """rows[index] as tiles (tables.h), float32 `[n / 16, subvec_dim + 1, 16]`; -1 is padding."""
    bias = (-rows.square().sum(-1) / 2)[index].masked_fill(index < 0, -torch.inf)
    return torch.cat((bias.unsqueeze(-1), rows[index]), -1).unflatten(0, (-1, 16)).transpose(1, 2)


@kept_with
def codec_struct(codec: KVCodec) -> FqCodec:
    """The codec as the library reads it, made once per codec and kept alive with it; `tables` are
    what it points to."""
    return _codec_struct(codec.key, codec.value, codec.layout.record_bytes)


@kept_with
def latent_struct(codec: LatentCodec) -> FqCodec:
    """As `codec_struct`, of latents: key and value are one code."""
    return _codec_struct(codec.latent, codec.latent, codec.record_bytes)


def _codec_struct(key: VectorCodec, value: VectorCodec, record_bytes: int) -> FqCodec:
    rotation = key.rotation
    if rotation.kind == "hadamard":
        tables = [_aligned(rotation.signs)]
        pointers = [tables[0].data_ptr(), None, None]
    else:
        tables = [_aligned(rotation.matrix), _aligned(rotation.matrix.T)]
        pointers = [None, *(t.data_ptr() for t in tables)]
    struct = FqCodec(key.head_dim, record_bytes, *pointers)
    struct.key, of_key = _code(key.spec, key.codebook, key.lists)
    struct.value, of_value = _code(value.spec, value.codebook, value.lists)
    struct.tables = tables + of_key + of_value
    return struct


def key_map_pointer(key_map: KeyMap | None) -> Any:
    """The map as the library reads it, made once per map and kept alive with it."""
    return None if key_map is None else pointer(_key_map_struct(key_map))


@kept_with
def _key_map_struct(key_map: KeyMap) -> FqKeyMap:
    keep = [_aligned(key_map.mean)]
    struct = FqKeyMap(keep[0].data_ptr(), key_map.num_plain)
    if (transform := key_map.transform) is not None:
        matrices = (transform.key_matrix.mT, transform.query_matrix.mT, transform.weight)
        keep += [_aligned(x) for x in matrices]
        struct.key_matrix_t, struct.query_matrix_t, struct.weight = (x.data_ptr() for x in keep[1:])
        if (halves := _halves(matrices[0])) is not None:
            keep.append(halves)
            struct.key_halves_t = halves.data_ptr()
        struct.source_scale, struct.num_coded = transform.source_scale, transform.num_coded
        struct.num_subvecs[:] = transform.lengths
        for i, book in enumerate(transform.codebooks):
            struct.codes[i], of_code = _code(book.spec, book)
            keep += of_code
    if (turning := key_map.turning) is not None:
        turns, chosen = turning.turns, turning.chosen
        tables = _turn_tables(turns)
        coordinates = turns.pairs[chosen.long()]  # [num_kv_heads, num_turning, 2]
        columns = tables.column_of_pair[chosen.long()].unsqueeze(-1)
        rows = torch.cat((coordinates, columns), -1).contiguous()
        mean = _aligned(turns.length * turning.mean)
        keep += (rows, mean, tables.fine, tables.coarse)
        struct.turn_pairs, struct.turn_mean, struct.turn_fine, struct.turn_coarse = (
            x.data_ptr() for x in keep[-4:]
        )
        keep += _dense_turns(rows.long(), mean, key_map.mean.shape[1])
        struct.turn_columns, struct.turn_dense = (x.data_ptr() for x in keep[-2:])
        struct.num_positions, struct.num_fast = turns.num_positions, turning.num_fast
        struct.num_turning, struct.num_columns = chosen.shape[1], tables.coarse.shape[2]
        struct.num_fast_columns = tables.fine.shape[1]
    if (first := key_map.first) is not None:
        keep += [_aligned(first.key), _aligned(first.value)]
        struct.first_key, struct.first_value = (x.data_ptr() for x in keep[-2:])
        struct.num_first_means = first.num_first
    struct.tables = keep
    return struct


def _halves(matrix_t: torch.Tensor) -> torch.Tensor | None:
    """key_halves_t of `tables.h`, whose words are typed as floats; None for numbers that bfloat16
    does not have."""
    halves = matrix_t.bfloat16()
    if not torch.equal(halves.float(), matrix_t):
        return None
    return _aligned(halves.unflatten(1, (-1, 2)).mT.contiguous().view(torch.float32).squeeze(-1))


def _dense_turns(
    rows: torch.Tensor, mean: torch.Tensor, head_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """turn_columns and turn_dense of `tables.h`, of turn_pairs `rows` and turn_mean."""
    columns = torch.zeros(head_dim, dtype=torch.int32)
    dense = torch.zeros(len(rows), 2, head_dim)
    first, second = rows[..., 0], rows[..., 1]
    for coordinate, of_cosine, of_sine in (
        (first, mean[..., 0], mean[..., 1]),
        (second, mean[..., 1], -mean[..., 0]),
    ):
        columns[coordinate] = rows[..., 2].int()  # the same in every head that has the pair
        dense[:, 0].scatter_(-1, coordinate, of_cosine)
        dense[:, 1].scatter_(-1, coordinate, of_sine)
    return columns, _aligned(dense)


@dataclass(frozen=True)
class _TurnTables:
    """The tables of `tables.h`, and which of their columns each pair is."""

    fine: torch.Tensor  # float32 [2, num_fast_columns, STEP / 2]
    coarse: torch.Tensor  # float32 [num_positions / STEP + 1, 2, num_columns]
    column_of_pair: torch.Tensor  # int32 [num_pairs]


@kept_with
def _turn_tables(turns: Turns) -> _TurnTables:
    """Made once for all layers that turn alike."""
    kinds = [kind.nonzero().squeeze(-1) for kind in (~turns.is_slow, turns.is_slow)]
    fast, slow = (-(-len(kind) // _COLUMNS) * _COLUMNS for kind in kinds)
    columns = torch.zeros(len(turns.pairs), dtype=torch.int32)
    fast = max(fast, _COLUMNS)  # where nothing turns fast too: without turn_fine nothing would turn
    for kind, begin in zip(kinds, (0, fast), strict=True):
        columns[kind] = torch.arange(begin, begin + len(kind), dtype=torch.int32)
    middles = torch.arange(turns.num_positions // STEP + 1) * STEP + (STEP - 1) / 2
    coarse = torch.zeros(len(middles), 2, fast + slow)
    table = turns.table(middles, stepped=True).float().unflatten(-1, (2, -1))
    coarse[..., columns.long()] = table
    fine = torch.zeros(2, fast, STEP // 2)
    table = turns.table(torch.arange(STEP // 2) + 0.5).float().T.unflatten(0, (2, -1))
    fine[:, : len(kinds[0])] = table[:, kinds[0]]
    return _TurnTables(_aligned(fine), _aligned(coarse), columns)
