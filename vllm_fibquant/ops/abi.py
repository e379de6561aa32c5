# SPDX-License-Identifier: Apache-2.0
"""What the C ABIs of the CPU and the CUDA library share (csrc/abi.h), and how both are loaded."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence
from ctypes import Structure, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def fields(*rows: tuple[Any, str]) -> list[tuple[str, Any]]:
    """The `_fields_` of a struct, from a type and the names of the fields in a row that have it."""
    return [(name, kind) for kind, names in rows for name in names.split()]


class FqPages(Structure):
    """The pages of one layer."""

    _fields_ = fields(
        (c_void_p, "base"),
        (c_int64, "num_blocks stride_block stride_head"),
        (c_int32, "num_kv_heads block_size"),
    )  # fmt: skip


def pages_of(cache: torch.Tensor) -> FqPages:
    """A layer's cache, uint8 [num_blocks, num_kv_heads, block_size, record_bytes], as a library
    reads it."""
    num_blocks, num_kv_heads, block_size, _ = cache.shape
    return FqPages(cache.data_ptr(), num_blocks, *cache.stride()[:2], num_kv_heads, block_size)


def describe(structs: Sequence[type[Structure]]) -> str:
    """Our structs in the words of csrc/abi_text.h: names, offsets and sizes of their fields."""
    lines = []
    for struct in structs:
        lines.append(f"struct {ctypes.sizeof(struct)}")
        for name, *_ in struct._fields_:
            field = getattr(struct, name)
            lines.append(f"{name} {field.offset} {field.size}")
    return "".join(line + "\n" for line in lines)


def load_library(
    owner: str, path: Path, abi_function: str, structs: Sequence[type[Structure]], advice: str
) -> ctypes.CDLL:
    """Loads a library that reads `structs` as we write them.

    Args:
        owner: who speaks in errors.
        abi_function: what describes its structs, in our order, in the words of csrc/abi_text.h.
        structs: ours.
        advice: how the library is built.

    Raises:
        RuntimeError: it is missing, does not load, or was built from other sources.
    """
    if not path.exists():
        raise RuntimeError(f"{owner}: {path} is missing; {advice}")
    try:
        lib = ctypes.CDLL(str(path))
    except OSError as error:
        raise RuntimeError(f"{owner}: {path} does not load ({error}); {advice}") from error
    try:
        function = getattr(lib, abi_function)
    except AttributeError:
        theirs = []
    else:
        function.restype = ctypes.c_char_p
        theirs = function().decode().splitlines()
    ours = describe(structs).splitlines()
    if ours != theirs:
        pairs = itertools.zip_longest(ours, theirs, fillvalue="nothing")
        wanted, got = next(pair for pair in pairs if pair[0] != pair[1])
        raise RuntimeError(
            f"{owner}: {path} must be built from this version's sources "
            f"({wanted!r} in its structs, got {got!r}); {advice}"
        )
    return lib
