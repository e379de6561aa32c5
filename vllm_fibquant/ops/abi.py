# SPDX-License-Identifier: Apache-2.0
"""The C ABIs of the CPU and the CUDA library: structs as the headers have them, and loading."""

from __future__ import annotations

import ctypes
import functools
import re
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any, TypeVar

import torch

from vllm_fibquant.headers import HEADERS, header_digest, header_text

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

Struct = TypeVar("Struct", bound=Structure)

_KINDS: dict[str, Any] = {"int32_t": c_int32, "int64_t": c_int64, "float": c_float}


@functools.cache
def _code() -> str:
    """All headers without comments."""
    return re.sub("//.*", "", "".join(map(header_text, HEADERS)))


def from_header(struct: type[Struct]) -> type[Struct]:
    """Gives a struct the fields that a header has for its name.

    A struct that it holds or points to must have got its own before; any other pointer is an
    address.
    """
    found = re.search(rf"struct {struct.__name__} {{(.*?)\n}};", _code(), re.DOTALL)
    if found is None:
        raise RuntimeError(f"from_header: struct {struct.__name__} must be in a header, got none")
    fields: list[tuple[str, Any]] = []
    for line in filter(None, map(str.strip, found[1].split(";"))):
        declared = re.fullmatch(
            r"(?:const )?(\w+)(\*?) (\w+(?:\[\d+\])?(?:,\s*\w+(?:\[\d+\])?)*)", line
        )
        if declared is None:
            raise RuntimeError(
                f"from_header: {struct.__name__} must have plain fields, got {line!r}"
            )
        kind, star, names = declared.groups()
        own: Any = c_void_p
        if not star or kind.startswith("Fq"):
            own = POINTER(_KINDS[kind]) if star else _KINDS[kind]
        for name, count in re.findall(r"(\w+)(?:\[(\d+)\])?", names):
            fields.append((name, own * int(count) if count else own))
    struct._fields_ = fields
    _KINDS[struct.__name__] = struct
    return struct


@from_header
class FqPages(Structure):
    """The pages of one layer."""


def pages_of(cache: torch.Tensor) -> FqPages:
    """A layer's cache, uint8 [num_blocks, num_kv_heads, block_size, record_bytes], as a library
    reads it."""
    num_blocks, num_kv_heads, block_size, _ = cache.shape
    return FqPages(cache.data_ptr(), num_blocks, *cache.stride()[:2], num_kv_heads, block_size)


def load_library(owner: str, path: Path, library: str, function: str, advice: str) -> ctypes.CDLL:
    """Loads a library that was built from the headers that our structs are made of.

    Args:
        owner: who speaks in errors.
        library: "cpu" or "cuda".
        function: what returns the digest of the headers that it was built from.
        advice: how the library is built.

    Raises:
        RuntimeError: it is missing, does not load, or was built from other headers.
    """
    if not path.exists():
        raise RuntimeError(f"{owner}: {path} is missing; {advice}")
    try:
        lib = ctypes.CDLL(str(path))
    except OSError as error:
        raise RuntimeError(f"{owner}: {path} does not load ({error}); {advice}") from error
    got = "none"
    if hasattr(lib, function):
        getattr(lib, function).restype = ctypes.c_char_p
        got = getattr(lib, function)().decode().split("\n")[0]  # libraries once had a text here
    if got != header_digest(library):
        raise RuntimeError(
            f"{owner}: {path} must be built from this version's sources, whose headers have digest "
            f"{header_digest(library)}, got {got}; {advice}"
        )
    return lib
