# SPDX-License-Identifier: Apache-2.0
"""The structs of the CUDA library (csrc/cuda/params.h); a codec and a map of keys as such, with
their tables."""

from __future__ import annotations

from ctypes import Structure

import torch

from vllm_fibquant.codec.codebook import Codebook
from vllm_fibquant.codec.codec import KVCodec
from vllm_fibquant.codec.config import GAIN_NUMBERS, CodeSpec
from vllm_fibquant.keys.key_map import STEP, KeyMap, TurningMean, Turns
from vllm_fibquant.keys.transform import run_lengths
from vllm_fibquant.ops.abi import from_header
from vllm_fibquant.ops.kept import kept_with

TILE = 16
"""Positions of a row of the coarse table of cosines and sines."""
PAIRS = 8
"""Pairs that turn come in a multiple of it: those of one product."""


@from_header
class FqCudaCode(Structure): ...


@from_header
class FqCudaCodec(Structure): ...


@from_header
class FqCudaKeyMap(Structure): ...


@from_header
class FqCudaEncode(Structure): ...


@from_header
class FqCudaAttend(Structure): ...


@from_header
class FqCudaPlan(Structure): ...


def _code(
    spec: CodeSpec, book: Codebook, device: torch.device, keep: list[torch.Tensor]
) -> FqCudaCode:
    table = book.table.to(torch.float16)
    if spec.storage == "int8" and spec.folded:
        table = table + 0.5  # exact, and so is row = scale * table
    rows = book.rows.float()
    tables = [x.contiguous().clone().to(device) for x in (table, rows, rows.square().sum(-1) / 2)]
    keep.extend(tables)
    return FqCudaCode(
        spec.subvec_dim, spec.index_bits, int(spec.folded), GAIN_NUMBERS[spec.gain],
        float(book.scale), spec.num_rows, *(x.data_ptr() for x in tables),
    )  # fmt: skip


@kept_with
def codec_struct(codec: KVCodec, device: torch.device) -> FqCudaCodec:
    """The codec with its tables on `device`, made once and kept while the codec lives.

    The first call copies to the device: make it before a CUDA graph is captured.
    """
    rotation = codec.key.rotation
    if rotation.kind == "hadamard":
        keep = [rotation.signs.float().contiguous().to(device)]
        pointers = [keep[0].data_ptr(), None, None]
    else:
        matrix = rotation.matrix.float()
        keep = [x.contiguous().to(device) for x in (matrix, matrix.T)]
        pointers = [None, *(x.data_ptr() for x in keep)]
    struct = FqCudaCodec(codec.head_dim, codec.layout.record_bytes, *pointers)
    struct.key, struct.value = (
        _code(c.spec, c.codebook, device, keep) for c in (codec.key, codec.value)
    )
    struct.tables = keep
    return struct


@kept_with
def key_map_struct(key_map: KeyMap, device: torch.device) -> FqCudaKeyMap:
    """The map with its tables on `device`, made once and kept while the map lives.

    The first call copies to the device: make it before a CUDA graph is captured.
    """
    keep: list[torch.Tensor] = []

    def put(x: torch.Tensor) -> int:
        keep.append(x.contiguous().clone().to(device))
        return keep[-1].data_ptr()

    struct = FqCudaKeyMap(put(key_map.mean), num_plain=key_map.num_plain)
    struct.num_coded, struct.source_scale = key_map.mean.shape[1], 1.0
    if (transform := key_map.transform) is not None:
        # A table holds rows over their scale: the query's part has it.
        scales = [
            torch.full((count * book.spec.subvec_dim,), float(book.scale))
            for book, count in zip(transform.codebooks, transform.lengths, strict=True)
        ]
        scale = torch.nn.functional.pad(
            torch.cat(scales), (0, transform.num_coded - sum(map(len, scales)))
        )
        struct.key_matrix_t = put(transform.key_matrix.mT)
        struct.query_matrix_t = put((transform.query_matrix * scale.unsqueeze(-1)).mT)
        struct.weight = put(transform.weight)
        struct.source_scale, struct.num_coded = transform.source_scale, transform.num_coded
        struct.num_subvecs[:] = transform.lengths
        struct.codes[:] = [_code(b.spec, b, device, keep) for b in transform.codebooks]
    if (first := key_map.first) is not None:
        struct.first_key, struct.first_value = put(first.key), put(first.value)
        struct.num_first = first.num_first
    if key_map.turning is not None:
        pairs, mean = _padded_turns(key_map.turning)
        struct.turn_pairs, struct.turn_mean = put(pairs), put(mean)
        fine, coarse = _turn_tables(key_map.turning.turns, device)
        keep += [fine, coarse]
        struct.turn_fine, struct.turn_coarse = fine.data_ptr(), coarse.data_ptr()
        struct.num_turning, struct.num_pairs = pairs.shape[1], fine.shape[1]
        struct.num_steps = len(coarse)
    struct.tables = keep
    return struct


def _padded_turns(turning: TurningMean) -> tuple[torch.Tensor, torch.Tensor]:
    """turn_pairs and turn_mean of params.h."""
    turns, chosen = turning.turns, turning.chosen.long()
    missing = -chosen.shape[1] % PAIRS
    columns = chosen.unsqueeze(-1).to(torch.int32)
    rows = torch.cat((turns.pairs[chosen], columns, torch.zeros_like(columns)), -1)
    rows = torch.nn.functional.pad(rows, (0, 0, 0, missing))
    rows[:, chosen.shape[1] :, :2] = -1
    mean = torch.nn.functional.pad((turns.length * turning.mean).float(), (0, 0, 0, missing))
    return rows, mean


@kept_with
def _turn_tables(turns: Turns, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """turn_fine and turn_coarse of params.h, made once for all layers that turn alike.

    Slow pairs stand, over each step, as in its middle: their fine angle is 0.
    """
    fine = turns.table(torch.arange(TILE)).unflatten(-1, (2, -1)).mT
    fine[:, turns.is_slow] = torch.tensor([1.0, 0.0], dtype=fine.dtype)
    begins = torch.arange(-(-turns.num_positions // STEP) * (STEP // TILE)) * TILE
    coarse = turns.table(begins, stepped=True).unflatten(-1, (2, -1)).mT
    fine, coarse = (x.float().contiguous().to(device) for x in (fine, coarse))
    return fine, coarse


def unsupported_transform(index_bytes: int, head_dim: int) -> str | None:
    """Why the kernels cannot read transformed keys of this many index bytes, or None."""
    lengths = run_lengths(index_bytes, head_dim)
    sizes = [n * dim for n, dim in zip(lengths, (2, 4, 8), strict=True)]
    # Sixteen coordinates are a step of a product, and four codewords of 8 are two.
    if any(size % step for size, step in zip(sizes, (16, 16, 32), strict=True)):
        return (
            f"transformed keys of head_dim {head_dim} must have multiples of 16, 16 and 32 "
            "coordinates in subvectors of 2, 4 and 8 with the CUDA library, got "
            f"{', '.join(map(str, sizes))} in {index_bytes} bytes"
        )
    return None


def unsupported_key_map(key_map: KeyMap) -> str | None:
    """Why the kernels cannot take this map of keys, or None when they can (check_map of
    csrc/cuda/library.cu)."""
    head_dim = key_map.mean.shape[1]
    if key_map.transform is not None:
        reason = unsupported_transform(key_map.transform.index_bytes, head_dim)
        if reason:
            return reason
    if key_map.turning is not None and key_map.turning.chosen.shape[1] > head_dim // 4:
        return (
            f"a mean must turn in at most {head_dim // 4} pairs of coordinates with the CUDA "
            f"library, got {key_map.turning.chosen.shape[1]}"
        )
    if key_map.num_plain > TILE:
        return (
            f"at most {TILE} first tokens must be coded apart with the CUDA library, got "
            f"{key_map.num_plain}"
        )
    return None
