# SPDX-License-Identifier: Apache-2.0
"""Workers for tests, to be given as --worker-cls: one whose installation differs on rank 1, and one
that is calibrated on random tokens."""

from __future__ import annotations

import os
from pathlib import Path

from vllm.v1.worker.cpu_worker import CPUWorker

CODEBOOKS = "FIBQUANT_TEST_ODD_CODEBOOKS"
"""Environment variable: the folder with rank 1's codebooks."""


class OddRankWorker(CPUWorker):
    def init_device(self) -> None:
        if self.rank == 1:
            from vllm_fibquant.codec.codec import codebook, codec

            codebook.SHIPPED_DIR = Path(os.environ[CODEBOOKS])
            codec._kv_codec.cache_clear()
        super().init_device()


class RandomTextWorker(CPUWorker):
    """For models without a tokenizer."""

    def init_device(self) -> None:
        from vllm_fibquant.engine import measure

        from .harness import random_text

        measure.text_sequences = random_text
        super().init_device()
