# SPDX-License-Identifier: Apache-2.0
"""The model in vLLM, in this process, with a cache of codes."""

from __future__ import annotations

import contextlib
import gc
import os
from typing import Any

import torch

from vllm_fibquant.config import is_fibquant


class Engine:
    """A vLLM engine whose model's last hidden states can be had: what its head reads.

    A text is prefilled `step` tokens at a time, so that all but the newest come from the cache:
    written, paged and read back. `close` it when done; one engine at a time.
    """

    def __init__(
        self, model: str, kv_cache_dtype: str, fibquant: dict[str, Any], step: int, longest: int
    ) -> None:
        os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_OMP_THREADS_BIND="nobind")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # would override kv_cache_memory_bytes
        from vllm import LLM

        threads = torch.get_num_threads()
        self._states: list[torch.Tensor] = []
        self._llm = LLM(
            model, dtype="float32", enforce_eager=True, kv_cache_dtype=kv_cache_dtype,
            # What codes cost is what is measured here, however much it is.
            additional_config={"fibquant": {**fibquant, "fidelity_gate": False}}
            if is_fibquant(kv_cache_dtype) else {},
            max_model_len=longest + 1, max_num_batched_tokens=step, max_num_seqs=1,
            kv_cache_memory_bytes=512 << 20, block_size=32, enable_prefix_caching=False,
            skip_tokenizer_init=True, seed=0,
        )  # fmt: skip
        torch.set_num_threads(threads)
        self._llm.apply_model(
            lambda model: model.register_forward_hook(lambda *call: self._keep(call[2]))
        )

    def _keep(self, states: torch.Tensor) -> None:
        self._states.append(states.clone())

    def hidden(self, tokens: list[int]) -> torch.Tensor:
        """The model's last hidden states, float32 `[num_tokens, hidden_size]`.

        Raises:
            RuntimeError: the engine computed another number of tokens.
        """
        from vllm import SamplingParams

        self._states.clear()
        params = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
        prompt: Any = {"prompt_token_ids": list(tokens)}
        self._llm.generate([prompt], params, use_tqdm=False)
        states = torch.cat(self._states).float()
        if states.shape[0] != len(tokens):
            raise RuntimeError(
                f"Engine: hidden states must be of {len(tokens)} tokens, got {states.shape[0]}; "
                "the engine pads or repeats steps, which this measurement cannot see through"
            )
        return states

    def close(self) -> None:
        from vllm.distributed import cleanup_dist_env_and_memory

        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        gc.collect()
        with contextlib.suppress(Exception):
            cleanup_dist_env_and_memory()
