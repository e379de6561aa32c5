# SPDX-License-Identifier: Apache-2.0
"""A codec as structs and tables of the CUDA library (csrc/cuda/params.h)."""

from __future__ import annotations

import weakref
from ctypes import Structure, c_float, c_int32, c_void_p

import torch

from vllm_fibquant.codec.codec import KVCodec, VectorCodec
from vllm_fibquant.codec.config import GAIN_NUMBERS


class FqCudaCode(Structure):
    _fields_ = [
        *((name, c_int32) for name in ("subvec_dim", "index_bits", "folded", "gain")),
        ("table_scale", c_float),
        ("num_rows", c_int32),
        *((name, c_void_p) for name in ("table", "rows", "half_sq")),
    ]


class FqCudaCodec(Structure):
    _fields_ = [
        ("head_dim", c_int32),
        ("record_bytes", c_int32),
        *((f"rotation_{name}", c_void_p) for name in ("signs", "matrix", "matrix_t")),
        ("key", FqCudaCode),
        ("value", FqCudaCode),
    ]


def _code(code: VectorCodec, device: torch.device, keep: list[torch.Tensor]) -> FqCudaCode:
    spec, book = code.spec, code.codebook
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


_Made = dict[torch.device, tuple[FqCudaCodec, list[torch.Tensor]]]
_codecs: weakref.WeakKeyDictionary[KVCodec, _Made] = weakref.WeakKeyDictionary()


def codec_struct(codec: KVCodec, device: torch.device) -> FqCudaCodec:
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
        struct = FqCudaCodec(codec.head_dim, codec.layout.record_bytes, *pointers)
        struct.key, struct.value = (_code(c, device, keep) for c in (codec.key, codec.value))
        made[device] = struct, keep
    return made[device][0]
