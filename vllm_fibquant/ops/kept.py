# SPDX-License-Identifier: Apache-2.0
"""What is made once for an object, and kept as long as that lives."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

Made = TypeVar("Made")


def kept_with(make: Callable[..., Made]) -> Callable[..., Made]:
    """`make`, called once for each first argument and what may follow it, such as a device.

    What it returns must not hold its first argument, which would then never end.
    """
    kept: weakref.WeakKeyDictionary[Any, dict[Any, Made]] = weakref.WeakKeyDictionary()

    @functools.wraps(make)
    def get(owner: Any, *rest: Any) -> Made:
        of_owner = kept.setdefault(owner, {})
        if rest not in of_owner:
            of_owner[rest] = make(owner, *rest)
        return of_owner[rest]

    return get
