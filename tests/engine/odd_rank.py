# SPDX-License-Identifier: Apache-2.0
"""A worker whose installation differs on rank 1, for tests: give it as --worker-cls."""

from __future__ import annotations

import os
from pathlib import Path

from vllm.v1.worker.cpu_worker import CPUWorker

CODEBOOKS = "FIBQUANT_TEST_ODD_CODEBOOKS"
"""Environment variable: the folder with rank 1's codebooks."""


class OddRankWorker(CPUWorker):
    def init_device(self) -> None:
        if self.rank == 1:
            from vllm_fibquant import codebook, codec

            codebook.SHIPPED_DIR = Path(os.environ[CODEBOOKS])
            codec._kv_codec.cache_clear()
        super().init_device()
