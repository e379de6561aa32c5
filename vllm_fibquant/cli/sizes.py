# SPDX-License-Identifier: Apache-2.0
"""Sizes and numbers of tokens as people write them on a command line."""

from __future__ import annotations

import re

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY_UNITS = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_size(text: str) -> int:
    """Bytes of a size such as ``8GiB``, ``500 MB`` or ``1073741824``.

    Raises:
        ValueError: not a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?(b?)\s*", text, re.IGNORECASE)
    if not match or (not match[2] and "." in match[1]):
        raise ValueError(f"--memory must be a size such as 8GiB or 500MB, got {text!r}")
    unit = (match[2] or "").lower()
    size = int(float(match[1]) * (_BINARY_UNITS.get(unit) or _UNITS[unit]))
    if size < 1:
        raise ValueError(f"--memory must be at least one byte, got {text!r}")
    return size


def parse_tokens(text: str) -> int:
    """A number of tokens such as ``4096``, ``32k`` (32 x 1024) or ``1m``.

    Raises:
        ValueError: not a positive number of tokens.
    """
    match = re.fullmatch(r"\s*(\d+)\s*([km]?)\s*", text, re.IGNORECASE)
    num_tokens = int(match[1]) * {"": 1, "k": 2**10, "m": 2**20}[match[2].lower()] if match else 0
    if num_tokens < 1:
        raise ValueError(f"--context must be a number of tokens such as 4096 or 32k, got {text!r}")
    return num_tokens
