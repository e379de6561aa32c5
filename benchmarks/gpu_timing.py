# SPDX-License-Identifier: Apache-2.0
"""Times of calls on a GPU, for benchmarks/gpu_proof.py."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

WARM_UPS = 3


def captured(run: Callable[[], object], cuda: Any = torch.cuda) -> tuple[Callable[[], object], str]:
    """A call as a CUDA graph, as vLLM serves decode steps: what Python costs is left out.

    Returns:
        The graph's replay and ""; or, where the call cannot be captured, itself and the reason.
    """
    side = cuda.Stream()
    side.wait_stream(cuda.current_stream())
    with cuda.stream(side):  # compiles, and allocates what is kept
        for _ in range(WARM_UPS):
            run()
    cuda.current_stream().wait_stream(side)
    cuda.synchronize()
    graph = cuda.CUDAGraph()
    try:
        with cuda.graph(graph):
            run()
    except Exception as error:  # some peers wait for the device, or allocate in ways of their own
        cuda.synchronize()
        return run, f"{type(error).__name__}: {error}"[:200]
    return graph.replay, ""


def timed(run: Callable[[], object], repetitions: int) -> tuple[float, str]:
    """Median milliseconds of a call on the device, and why it is no graph, if it is none.

    The caches are flushed by 256 MiB before each.
    """
    call, reason = captured(run)
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    times = []
    for repetition in range(repetitions + WARM_UPS):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        if repetition >= WARM_UPS:
            times.append(begin.elapsed_time(end))
    return statistics.median(times), reason


def milliseconds(run: Callable[[], object], repetitions: int) -> float:
    """The time alone."""
    return timed(run, repetitions)[0]


def into(row: dict[str, Any], name: str, run: Callable[[], object], repetitions: int) -> None:
    """Writes `ms_name`, and `eager_name` where the call could not be captured."""
    row[f"ms_{name}"], reason = timed(run, repetitions)
    if reason:
        row[f"eager_{name}"] = reason


def copy_rate(repetitions: int) -> float:
    """Bytes read and written per millisecond by a large copy."""
    x = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.numel() / milliseconds(lambda: y.copy_(x), repetitions)
