# SPDX-License-Identifier: Apache-2.0
"""A codec's tables on a device, and the constants a kernel is specialised for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from vllm_fibquant.codec.codec import KVCodec, VectorCodec
from vllm_fibquant.ops.kept import kept_with


def next_power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


@dataclass(frozen=True)
class DeviceCode:
    """One code on a device.

    Attributes:
        table: float16 `[num_rows, subvec_dim]`; row = table_scale * table, exactly.
        table_scale: an int8 book's step (its halves and integers are exact in float16), else 1.
        rows_t: float32 `[subvec_dim, num_rows]`.
        half_sq: float32 `[num_rows]`, |row|^2 / 2.
        constants: the code as compile-time constants.
    """

    table: torch.Tensor
    table_scale: float
    rows_t: torch.Tensor
    half_sq: torch.Tensor
    constants: dict[str, Any]


@dataclass(frozen=True)
class DeviceCodec:
    """Both codes and the rotation. `matrix` is float32 `[head_dim, head_dim]`, y = matrix @ x."""

    matrix: torch.Tensor
    key: DeviceCode
    value: DeviceCode


def word_bytes(index_bits: int) -> int:
    """Bytes that hold an index wherever it starts in its first byte."""
    latest = 8 - math.gcd(index_bits, 8)
    return -(-(latest + index_bits) // 8)


def unsupported_code(codec: KVCodec) -> str | None:
    """Why the Triton kernels cannot take this codec, or None when they can."""
    for side in (codec.key, codec.value):
        dim = side.spec.subvec_dim
        if dim & (dim - 1) or dim > 16:
            return f"subvec_dim must be 1, 2, 4, 8 or 16 on a GPU, got {dim}"
    return None


def _device_code(code: VectorCodec, device: torch.device) -> DeviceCode:
    spec, book = code.spec, code.codebook
    table = book.table.to(torch.float16)
    if spec.storage == "int8" and spec.folded:
        table = table + 0.5
    rows = book.rows.float()
    subvecs = next_power_of_two(code.num_subvecs)
    constants = {
        "SUBVEC_DIM": spec.subvec_dim,
        "INDEX_BITS": spec.index_bits,
        "ROW_BITS": spec.num_rows.bit_length() - 1,
        "FOLDED": spec.folded,
        "NUM_SUBVECS": code.num_subvecs,
        "SUBVECS": subvecs,
        "WORD_BYTES": word_bytes(spec.index_bits),
    }
    return DeviceCode(
        table.contiguous().to(device),
        float(book.scale),
        rows.T.contiguous().to(device),
        (rows.square().sum(-1) / 2).to(device),
        constants,
    )


@kept_with
def device_codec(codec: KVCodec, device: torch.device) -> DeviceCodec:
    """The codec's tables on `device`, made once and kept while the codec lives.

    The first call copies to the device: make it before a CUDA graph is captured.
    """
    return DeviceCodec(
        codec.key.rotation.matrix.float().contiguous().to(device),
        _device_code(codec.key, device),
        _device_code(codec.value, device),
    )


def prefixed(prefix: str, constants: dict[str, Any]) -> dict[str, Any]:
    """Constants of one side of the cache under the names a kernel with two sides gives them."""
    return {f"{prefix}_{name}": value for name, value in constants.items()}
