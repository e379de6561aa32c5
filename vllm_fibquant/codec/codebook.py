# SPDX-License-Identifier: Apache-2.0
"""Codebooks: what they are in memory, their file, and where they are found.

A file (`d<head_dim>-<code>-<storage>.fqcb`) is, little-endian and without padding:

    offset          bytes           content
    0               8               magic "FIBQBOOK"
    8               4               format version, uint32
    12              4               header_bytes, uint32
    16              header_bytes    JSON object, UTF-8: head_dim, subvec_dim, num_codewords, folded,
                                    storage, scale (int8 only), provenance
    ...             rows            table [num_rows, subvec_dim], row-major, int8 or float16
    end - 32        32              SHA-256 of everything before it

An int8 entry q means q * scale; in a folded book, whose rows are magnitudes, (q + 0.5) * scale with
q from 0 to 127, so that a kernel negates a coordinate by XOR 0xFF.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vllm_fibquant import files
from vllm_fibquant.codec.config import HEAD_DIMS, PRESETS, CodeSpec
from vllm_fibquant.files import seal, unseal

MAGIC = b"FIBQBOOK"
FORMAT_VERSION = 1
SHIPPED_DIR = files.PACKAGE_DIR / "codebooks"

_DTYPES: dict[str, np.dtype[Any]] = {"int8": np.dtype("i1"), "float16": np.dtype("<f2")}


@dataclass(frozen=True, eq=False)
class Codebook:
    """The rounded codebook of one code at one head_dim: what encoder, oracle and kernels read.

    Attributes:
        spec: the code. Its gain plays no part and is always "norm" here.
        head_dim: the book is fitted to subvectors of unit vectors of this size.
        table: int8 or float16 `[num_rows, subvec_dim]`, as stored.
        scale: float32 step of an int8 table, 1.0 for float16.
        rows: float32 `[num_rows, subvec_dim]`, contiguous: the values the table stands for.
        provenance: how it was made (seed, restarts, samples, iterations, MSE).
        digest: SHA-256 of the file's content, hexadecimal.
    """

    spec: CodeSpec
    head_dim: int
    table: torch.Tensor
    scale: float
    rows: torch.Tensor
    provenance: dict[str, Any]
    digest: str

    def codewords(self) -> torch.Tensor:
        """All codewords, float32 `[num_codewords, subvec_dim]`; signs expanded in a folded book.

        Codeword `pattern * num_rows + row` of a folded book is that row with coordinate j negated
        where bit j of the pattern is set.
        """
        if not self.spec.folded:
            return self.rows
        k = self.spec.subvec_dim
        # torch's default device may be a GPU, and its default dtype the model's.
        patterns, shifts = (torch.arange(n, device="cpu") for n in (1 << k, k))
        signs = 1 - 2 * ((patterns.unsqueeze(-1) >> shifts) & 1)  # [2**k, k]
        return (signs.unsqueeze(1) * self.rows).reshape(-1, k)

    def serves(self, spec: CodeSpec) -> bool:
        """Whether this is a book of `spec` (whatever its gain and its search)."""
        return self.spec == replace(spec, gain="norm", num_lists=None)


def make_codebook(
    spec: CodeSpec, head_dim: int, table: np.ndarray, scale: float, provenance: dict[str, Any]
) -> tuple[Codebook, bytes]:
    """A codebook and the content of its file.

    Args:
        spec: the code.
        head_dim: d.
        table: int8 or float16 `[num_rows, subvec_dim]`.
        scale: step of an int8 table; a float32 value.
        provenance: JSON-serialisable.
    """
    header: dict[str, Any] = {
        "head_dim": head_dim,
        "subvec_dim": spec.subvec_dim,
        "num_codewords": spec.num_codewords,
        "folded": spec.folded,
        "storage": spec.storage,
        "provenance": provenance,
    }
    if spec.storage == "int8":
        header["scale"] = scale
    data = np.ascontiguousarray(table, _DTYPES[spec.storage]).tobytes()
    content = seal(MAGIC, FORMAT_VERSION, header, data)
    return parse_codebook(content, "make_codebook"), content


@functools.lru_cache(maxsize=64)
def parse_codebook(content: bytes, name: str) -> Codebook:
    """Read a codebook from the bytes of its file, checking all of them.

    The same bytes are the same object, whose tables for kernels are then made once.

    Args:
        content: the whole file.
        name: what to call it in errors.

    Raises:
        ValueError: not a codebook file, another format version, damaged, or inconsistent.
    """

    def refuse(what: str, advice: str = "delete the file and build it again") -> ValueError:
        return ValueError(f"load_codebook: {name} {what}; {advice}")

    sealed = unseal(
        content,
        MAGIC,
        FORMAT_VERSION,
        refuse,
        other_file="this is no codebook file",
        other_version=("build it again with this version of vllm-fibquant",),
    )
    try:
        header = json.loads(sealed.header)
        spec = CodeSpec(
            subvec_dim=header["subvec_dim"],
            num_codewords=header["num_codewords"],
            folded=header["folded"],
            storage=header["storage"],
        )
        head_dim = header["head_dim"]
        spec.num_subvecs(head_dim)
        scale = float(header["scale"]) if spec.storage == "int8" else 1.0
        provenance = dict(header["provenance"])
    except (ValueError, KeyError, TypeError) as error:
        raise refuse(f"must have a valid header, got {type(error).__name__}: {error}") from error

    dtype = _DTYPES[spec.storage]
    raw = sealed.data
    expected = spec.num_rows * spec.subvec_dim * dtype.itemsize
    if len(raw) != expected:
        raise refuse(f"must hold a table of {expected} bytes, got {len(raw)}")
    # A native-endian copy: torch accepts no other, and the bytes object is read-only.
    table = np.frombuffer(raw, dtype).astype(dtype.newbyteorder("="))
    table = table.reshape(spec.num_rows, spec.subvec_dim)
    rows = dequantise(table, np.float32(scale), spec.folded)
    if not (math.isfinite(scale) and scale > 0 and np.isfinite(rows).all()):
        raise refuse("must hold finite values and a positive scale, got others")
    if spec.folded and rows.min() <= 0:
        raise refuse(f"must hold positive magnitudes, got {rows.min()}")
    return Codebook(
        spec=spec,
        head_dim=head_dim,
        table=torch.from_numpy(table),
        scale=scale,
        rows=torch.from_numpy(rows),
        provenance=provenance,
        digest=sealed.digest,
    )


def dequantise(table: np.ndarray, scale: np.float32, folded: bool) -> np.ndarray:
    """The float32 values an int8 or float16 table stands for."""
    if table.dtype == np.int8:
        return (table.astype(np.float32) + np.float32(0.5 if folded else 0)) * np.float32(scale)
    return table.astype(np.float32)


def codebook_filename(spec: CodeSpec, head_dim: int) -> str:
    """Name of the file of this code, e.g. ``d64-k4n256-int8.fqcb``."""
    return f"d{head_dim}-{spec.name}-{spec.storage}.fqcb"


def cache_name(spec: CodeSpec, head_dim: int) -> str:
    """The file of this code among those of the user's cache: see `files`."""
    return f"codebooks/{codebook_filename(spec, head_dim)}"


def build_command(spec: CodeSpec, head_dim: int) -> str:
    """The command that builds this codebook into the user's cache."""
    return (
        f"python -m vllm_fibquant codebook build --head-dim {head_dim} "
        f"--subvec-dim {spec.subvec_dim} --num-codewords {spec.num_codewords}"
        f"{' --folded' if spec.folded else ''} --storage {spec.storage}"
    )


def load_codebook(spec: CodeSpec, head_dim: int) -> Codebook:
    """The codebook of `spec` at `head_dim`: shipped with the package, else from a user's cache.

    Raises:
        ValueError: subvec_dim does not divide head_dim; there is no such file (the message has the
            command that builds it); or the file is damaged or of another code.
    """
    spec.num_subvecs(head_dim)
    shipped = SHIPPED_DIR / codebook_filename(spec, head_dim)
    path = shipped if shipped.is_file() else files.find(cache_name(spec, head_dim))
    if path is None:
        folders = [SHIPPED_DIR, *(root / "codebooks" for root in files.cache_candidates())]
        raise ValueError(
            f"load_codebook: the codebook of code {spec.name} in {spec.storage} for head_dim "
            f"{head_dim} must be shipped or built, got none in {' or '.join(map(str, folders))}; "
            f"run: {build_command(spec, head_dim)}"
        )
    book = read_codebook(path)
    if not book.serves(spec) or book.head_dim != head_dim:
        raise ValueError(
            f"load_codebook: {path} must be of code {spec.name} in {spec.storage} for "
            f"head_dim {head_dim}, got {book.spec.name} in {book.spec.storage} for "
            f"head_dim {book.head_dim}; delete it and run: {build_command(spec, head_dim)}"
        )
    return book


def read_codebook(path: Path) -> Codebook:
    """Read one codebook file.

    Raises:
        ValueError: see `parse_codebook`.
        OSError: the file cannot be read.
    """
    return parse_codebook(path.read_bytes(), str(path))


def shipped_codes() -> list[tuple[CodeSpec, int]]:
    """Every (code, head_dim) whose codebook ships with the package."""
    specs = {replace(s, gain="norm") for p in PRESETS.values() for s in (p.key, p.value)}
    ordered = sorted(specs, key=lambda s: (s.subvec_dim, s.num_codewords, s.folded, s.storage))
    return [(spec, head_dim) for head_dim in HEAD_DIMS for spec in ordered]
