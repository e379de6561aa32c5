# SPDX-License-Identifier: Apache-2.0
"""Launches find their tensors quickly."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.ptx import device


@pytest.fixture(autouse=True, scope="module")
def tensors_before() -> Iterator[None]:
    with device.tensors_before():
        yield
