# SPDX-License-Identifier: Apache-2.0
"""What makes engines in this process start and stop in a second: both are vLLM's housekeeping."""

from __future__ import annotations

import functools
import gc
from collections.abc import Iterator

import pytest

from tests.conftest import HAS_VLLM


@pytest.fixture(autouse=True, scope="module")
def thawed() -> Iterator[None]:
    """A file leaves nothing frozen."""
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def imports_frozen(thawed: None) -> Iterator[None]:
    """Garbage is looked for among what a test makes, not in all that is imported.

    vLLM collects nine times as an engine starts and stops, which took four fifths of either. In
    between it freezes the engine too and thaws everything afterwards; left out, so that imports
    stay frozen and an engine can be collected.
    """
    gc.collect()
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("freeze", "unfreeze"):
            patch.setattr(gc, name, lambda: None)
        yield


@pytest.fixture(autouse=True, scope="session")
def kernels_registered_once() -> None:
    """At every start vLLM's CPU platform searches all modules for Triton's kernels, to replace them
    by its own. The first start has replaced them all."""
    if not HAS_VLLM:
        return
    from vllm.platforms import current_platform

    platform = type(current_platform)
    if register := getattr(platform, "register_triton_kernel_overrides", None):
        once = staticmethod(functools.cache(register))
        platform.register_triton_kernel_overrides = once
