# SPDX-License-Identifier: Apache-2.0
"""Shared fixtures."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

HAS_VLLM = importlib.util.find_spec("vllm") is not None


def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """Engine tests live in tests/engine: mark them, and skip them where vLLM is missing.

    A module there with `NEEDS_ENGINE = False` starts none. Files of much work come first, so that
    processes that share the tests end together (`--no-loadscope-reorder`).
    """
    for item in items:
        is_engine = Path(item.path).parent.name == "engine"
        if is_engine and getattr(item.module, "NEEDS_ENGINE", True):
            item.add_marker(pytest.mark.engine)
            if not HAS_VLLM:
                item.add_marker(pytest.mark.skip(reason="vLLM is not installed"))
    marks = ("engine", "long")
    much = {item.path for item in items if any(map(item.get_closest_marker, marks))}
    items.sort(key=lambda item: item.path not in much)


@pytest.fixture
def caplog(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> Iterator[pytest.LogCaptureFixture]:
    """Gets what vLLM's loggers say, ours among them, which hand nothing on by themselves; whatever
    engines of this process made of them before."""
    monkeypatch.setenv("VLLM_CONFIGURE_LOGGING", "0")  # else every engine sets them up anew
    logger = logging.getLogger("vllm")
    monkeypatch.setattr(logger, "propagate", True)
    level = logger.level
    logger.setLevel(logging.INFO)
    yield caplog
    logger.setLevel(level)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tiny random models of this run are written."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(params=["portable", "avx2", "avx512", "avx512-vnni"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of this CPU in turn."""
    from vllm_fibquant.ops import cpu_library

    before = cpu_library.isa()
    try:
        cpu_library.select_isa(request.param)
    except ValueError:
        pytest.skip(f"this CPU does not have {request.param}")
    yield request.param
    cpu_library.select_isa(before)  # a library of tests may have no other
