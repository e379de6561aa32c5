# SPDX-License-Identifier: Apache-2.0
"""Files that cannot be damaged unnoticed: a magic, a version, a JSON header, data, a SHA-256.

bytes   content
8       magic
4       format version, little-endian uint32
4       bytes of the header, little-endian uint32
n       header, JSON with sorted keys
m       data
32      SHA-256 of all before it
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGE_DIR = Path(__file__).parent
"""Where what ships with the package is found, wherever the module that asks is."""

_PREFIX = struct.Struct("<8sII")
_DIGEST_BYTES = 32


@dataclass(frozen=True)
class Sealed:
    """What an intact file holds: its header, still JSON, its data, and its SHA-256 in hex."""

    header: bytes
    data: bytes
    digest: str


def seal(magic: bytes, version: int, header: Mapping[str, Any], data: bytes) -> bytes:
    """The content of a file."""
    encoded = json.dumps(header, sort_keys=True).encode()
    content = _PREFIX.pack(magic, version, len(encoded)) + encoded + data
    return content + hashlib.sha256(content).digest()


def unseal(
    content: bytes,
    magic: bytes,
    version: int,
    refuse: Callable[..., ValueError],
    *,
    other_file: str,
    other_version: tuple[str, ...] = (),
) -> Sealed:
    """Reads a file, checking everything but what its header and data mean.

    Args:
        content: the whole file.
        refuse: makes the error from what is wrong and, if given, what to do.
        other_file: what is said of a file with another magic.
        other_version: what to do about another version, if that is not what `refuse` says.

    Raises:
        ValueError: another file or version, or damaged.
    """
    if len(content) < _PREFIX.size + _DIGEST_BYTES:
        raise refuse(f"must be at least {_PREFIX.size + _DIGEST_BYTES} bytes, got {len(content)}")
    found, found_version, header_bytes = _PREFIX.unpack_from(content)
    if found != magic:
        raise refuse(f"must begin with {magic!r}, got {found!r}", other_file)
    if found_version != version:
        raise refuse(f"must have format version {version}, got {found_version}", *other_version)
    body, stored = content[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
    digest = hashlib.sha256(body).digest()
    if digest != stored:
        raise refuse(f"must have SHA-256 {stored.hex()}, got {digest.hex()}: it is damaged")
    # From here on a refusal means a faulty writer, not damage: the digest holds.
    begin = _PREFIX.size + header_bytes
    if begin > len(body):
        raise refuse(f"must hold a header of {header_bytes} bytes, got {len(body)} bytes in all")
    return Sealed(body[_PREFIX.size : begin], body[begin:], digest.hex())
