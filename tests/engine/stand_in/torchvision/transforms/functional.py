# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

from . import InterpolationMode

__all__ = ["InterpolationMode"]


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)

    def absent(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(f"{name}: a stand-in was called; models here are given texts alone")

    return absent
