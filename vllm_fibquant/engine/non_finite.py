# SPDX-License-Identifier: Apache-2.0
"""Counts vectors that held a NaN or an infinity, and says so at most once a minute.

On a CPU the encode op returns how many there were. A GPU counts on the device, and reading that
would wait for it; so the host copies the device's counters now and then, and looks at a copy once
it has arrived.
"""

from __future__ import annotations

import time

import torch
from vllm.logger import init_logger

from vllm_fibquant.observe.counters import own_counters
from vllm_fibquant.ops.kernels import device_counters

logger = init_logger(f"vllm.{__name__}")

WARN_EVERY_S = 60.0
READ_EVERY_S = 1.0


class NonFiniteCounter:
    """The count of this process."""

    def __init__(self) -> None:
        self.total = 0
        self._next_warning = 0.0

    def add(self, count: int) -> None:
        self.total += count
        own_counters()["non_finite_vectors"] = self.total
        now = time.monotonic()
        if now >= self._next_warning:
            self._next_warning = now + WARN_EVERY_S
            logger.warning(
                "FibQuant stored %d keys or values with NaN or Inf as zero vectors (%d since the "
                "start); the model overflows in its dtype: try --dtype bfloat16 or float32",
                count,
                self.total,
            )


counter = NonFiniteCounter()
"""Of this process; what a GPU counted is there up to the last copy."""


class DeviceReader:
    """Hands what a device has counted to `counter`, never waiting for the device."""

    def __init__(self, device: torch.device) -> None:
        self._on_device = device_counters(device)
        on_gpu = device.type == "cuda"
        self._copy = torch.zeros(2, dtype=torch.int32, device="cpu", pin_memory=on_gpu)
        self._arrived = torch.cuda.Event() if on_gpu else None
        self._under_way = False
        self._next_copy = 0.0
        self._seen = 0

    def poll(self) -> None:
        """To be called once a step, outside the capture of a CUDA graph."""
        if self._under_way and (self._arrived is None or self._arrived.query()):
            self._under_way = False
            count = int(self._copy[0]) - self._seen
            if count:
                self._seen += count
                counter.add(count)
        now = time.monotonic()
        if not self._under_way and now >= self._next_copy:
            self._next_copy = now + READ_EVERY_S
            self._copy.copy_(self._on_device, non_blocking=True)
            if self._arrived is not None:
                self._arrived.record()
            self._under_way = True
