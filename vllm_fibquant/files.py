# SPDX-License-Identifier: Apache-2.0
"""Files: content that cannot be damaged unnoticed, writing that is atomic, and the user's cache.

A sealed file is, little-endian:

bytes   content
8       magic
4       format version, uint32
4       bytes of the header, uint32
n       header, JSON with sorted keys
m       data
32      SHA-256 of all before it

The cache is optional. What ships with the package is never looked for there. A file is searched in
every cache that can be read, and written to the first that can be written. Where there is none, as
in a container whose user has no home or whose file system is read-only, nothing is kept, and that
is said once.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import struct
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

logger = logging.getLogger(f"vllm.{__name__}")

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


def digest_of(path: Path) -> str:
    """The SHA-256 that a sealed file says it has, in hex; "" where it cannot be read."""
    try:
        return path.read_bytes()[-_DIGEST_BYTES:].hex()
    except OSError:
        return ""


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


NAME = "vllm-fibquant"
CACHE_VARIABLE = "FIBQUANT_CACHE_DIR"


def cache_candidates() -> list[Path]:
    """Folders that may be the cache, best first, whether they exist or not.

    $FIBQUANT_CACHE_DIR alone where it is set: what a user names is not replaced by a guess. Else
    vllm-fibquant in $XDG_CACHE_HOME, in ~/.cache, and in $VLLM_CACHE_ROOT, which operators mount
    for vLLM's own caches. Never the model's folder: it is shared, checked by digests and published.
    """
    if chosen := os.environ.get(CACHE_VARIABLE):
        return [Path(chosen)]
    roots = [os.environ.get("XDG_CACHE_HOME"), _home_cache(), os.environ.get("VLLM_CACHE_ROOT")]
    # The XDG specification has relative paths ignored, and so are all of them here.
    paths = [Path(root) / NAME for root in roots if root and os.path.isabs(root)]
    return list(dict.fromkeys(paths))


def _home_cache() -> str:
    """~/.cache; relative, and so ignored, for a user without $HOME and without a passwd entry."""
    return os.path.join(os.path.expanduser("~"), ".cache")


def cache_dir() -> Path | None:
    """The first candidate that can be written, or None. Nothing is created."""
    return next((path for path in cache_candidates() if is_writable(path)), None)


def is_writable(folder: Path) -> bool:
    """Whether files can be created in a folder, which need not exist yet. Nothing is created."""
    try:
        while not folder.exists():
            if folder == folder.parent:
                return False
            folder = folder.parent
        return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)
    except OSError:  # a parent that cannot be read, a name that is too long
        return False


def find(name: str) -> Path | None:
    """The file `name`, a path relative to a cache, in the first cache that has it, or None."""
    for folder in cache_candidates():
        try:
            if (folder / name).is_file() and os.access(folder / name, os.R_OK):
                return folder / name
        except OSError:
            continue
    return None


def place(name: str) -> Path | None:
    """Where a new file `name`, a path relative to a cache, can be written, or None."""
    folder = cache_dir()
    return None if folder is None else folder / name


def keep(name: str, content: bytes) -> Path | None:
    """Writes a file into the cache. Returns its path, or None where it could not be kept.

    Args:
        name: path relative to the cache.
        content: all of it.
    """
    problems = []
    for folder in cache_candidates():
        try:
            write_atomically(folder / name, content)
            return folder / name
        except OSError as error:  # a read-only file system, a full disk, another user's folder
            problems.append(f"{folder}: {error.strerror or error}")
    _say_absent("; ".join(problems) or "there is no home directory")
    return None


@functools.cache
def _say_absent(why: str) -> None:
    """Logs, once in a process, that there is no cache and what to do about it."""
    logger.warning(
        "FibQuant keeps nothing for the next start, as no cache can be written (%s); "
        "set %s to a folder that can",
        why,
        CACHE_VARIABLE,
    )


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file so that readers see the old one or all of the new one.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)  # mkstemp makes it private
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
