# SPDX-License-Identifier: Apache-2.0
"""The headers of the C ABIs, which ship with the package: they alone say what the structs hold.

`ops.abi` makes structs of them, and setup.py builds each library with the digest of its headers, so
that a library built from others is known. Needs nothing but Python.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

HEADERS = {
    "cpu": ("abi.h", "cpu/tables.h", "cpu/params.h", "cpu/latent_params.h"),
    "cuda": ("abi.h", "cuda/params.h"),
}
"""Of each library, in csrc."""

FOLDER = Path(__file__).parent / "csrc"


def header_text(library: str, folder: Path = FOLDER) -> str:
    """The headers of a library, one behind the other, in the package or in another `folder`."""
    return "".join((folder / name).read_text(encoding="utf-8") for name in HEADERS[library])


def header_digest(library: str, folder: Path = FOLDER) -> str:
    """What setup.py builds a library with, from the headers that are compiled, and
    `ops.abi.load_library` asks of it, from those of the package."""
    return hashlib.sha256(header_text(library, folder).encode()).hexdigest()[:16]
