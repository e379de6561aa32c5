# SPDX-License-Identifier: Apache-2.0
"""The model in vLLM, in this process, with a cache of codes."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vllm_fibquant.codec.config import is_fibquant
from vllm_fibquant.evaluation.watch import AttentionWatch, attention_layers

UNCOMPRESSED = "auto"
"""The cache dtype of the engine whose distributions are the truth."""


@dataclass(frozen=True)
class Shape:
    """What of a model decides the size of its cache."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    num_positions: int

    @classmethod
    def of(cls, model: str) -> Shape:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(model).get_text_config()
        num_heads = config.num_attention_heads
        return cls(
            config.num_hidden_layers,
            getattr(config, "num_key_value_heads", None) or num_heads,
            getattr(config, "head_dim", None) or config.hidden_size // num_heads,
            getattr(config, "max_position_embeddings", 1 << 30),
        )


class Engine:
    """A vLLM engine whose model's last hidden states can be had: what its head reads.

    Texts are prefilled `step` tokens of each at a time, so that all but the newest come from the
    cache: written, paged and read back. Up to `num_texts` are read together, which costs less
    than one after another and changes nothing of what each of them reads. `close` it when done;
    one engine at a time.
    """

    def __init__(
        self, model: str, kv_cache_dtype: str, fibquant: dict[str, Any], step: int, longest: int,
        num_texts: int = 1, dtype: Any = "float32",
    ) -> None:  # fmt: skip
        os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_OMP_THREADS_BIND="nobind")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # would override kv_cache_memory_bytes
        from vllm import LLM

        threads = torch.get_num_threads()
        self._reading: _Reading | None = None
        step = min(step, longest)
        self._llm = LLM(
            model, dtype=dtype, enforce_eager=True, kv_cache_dtype=kv_cache_dtype,
            # What codes cost is what is measured here, however much it is.
            additional_config={"fibquant": {**fibquant, "fidelity_gate": False}}
            if is_fibquant(kv_cache_dtype) else {},
            max_model_len=longest + 1, max_num_batched_tokens=step * num_texts,
            max_num_seqs=num_texts, long_prefill_token_threshold=step,
            kv_cache_memory_bytes=_cache_bytes(model, longest, num_texts), block_size=32,
            enable_prefix_caching=False, skip_tokenizer_init=True, seed=0,
        )  # fmt: skip
        torch.set_num_threads(threads)
        self._num_texts = num_texts
        self._watch: AttentionWatch | None = None
        self._llm.apply_model(self._listen)

    def _listen(self, model: torch.nn.Module) -> None:
        def begin(_module: Any, _args: Any, given: dict[str, Any]) -> None:
            if self._reading is not None:
                self._reading.begin(given.get("input_ids"), given["positions"])
                if self._watch is not None:
                    self._watch.piece = self._reading.piece_of_first

        def end(_module: Any, _args: Any, states: torch.Tensor) -> None:
            if self._reading is not None:
                self._reading.end(states)

        model.register_forward_pre_hook(begin, with_kwargs=True)
        model.register_forward_hook(end)
        for name, layer in attention_layers(model):
            layer.register_forward_hook(
                lambda module, args, given, output, name=name: (
                    self._watch.attended(name, module, args, given, output) if self._watch else None
                ),
                with_kwargs=True,
            )

    def hidden(
        self, texts: Sequence[Sequence[int]], watch: AttentionWatch | None = None
    ) -> list[torch.Tensor]:
        """The model's last hidden states of each text, float32 `[num_tokens, hidden_size]`.

        Args:
            watch: is shown what attention reads and returns of the first text.

        Raises:
            RuntimeError: the engine computed other tokens.
        """
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
        states: list[torch.Tensor] = []
        for begin in range(0, len(texts), self._num_texts):
            batch = [list(tokens) for tokens in texts[begin : begin + self._num_texts]]
            self._reading = _Reading(batch)
            self._watch = watch if begin == 0 else None
            prompts: Any = [{"prompt_token_ids": tokens} for tokens in batch]
            self._llm.generate(prompts, params, use_tqdm=False)
            states += self._reading.result()
            self._reading = self._watch = None
        return states

    def continuations(self, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
        """The next `count` likeliest tokens of each prompt, one after another."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
        given: Any = [{"prompt_token_ids": list(tokens)} for tokens in prompts]
        outputs = self._llm.generate(given, params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    @torch.no_grad()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the model's head makes of `[n, hidden_size]`: float32 `[n, vocabulary]`."""

        def head(model: Any) -> torch.Tensor:
            dtype = next(model.parameters()).dtype
            return model.compute_logits(hidden.to(dtype)).float()

        return self._llm.apply_model(head)[0]

    def close(self) -> None:
        from vllm.distributed import cleanup_dist_env_and_memory

        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        gc.collect()
        with contextlib.suppress(Exception):
            cleanup_dist_env_and_memory()


def _cache_bytes(model: str, longest: int, num_texts: int) -> int:
    """Enough for the texts in float32, with half a text to spare for each."""
    shape = Shape.of(model)
    token_bytes = 2 * 4 * shape.num_layers * shape.num_kv_heads * shape.head_dim
    return max(64 << 20, int(1.5 * token_bytes * (longest + 64) * num_texts))


class _Reading:
    """Hidden states of texts that are read together, put back in the texts' order.

    Attributes:
        piece_of_first: the rows of the step that belong to the first text; None: none do.
    """

    def __init__(self, texts: Sequence[list[int]]) -> None:
        self._texts = texts
        self._done = [0] * len(texts)
        self._states: list[list[torch.Tensor]] = [[] for _ in texts]
        self._pieces: list[tuple[int, slice]] = []

    @property
    def piece_of_first(self) -> slice | None:
        return next((rows for text, rows in self._pieces if text == 0), None)

    def begin(self, token_ids: torch.Tensor | None, positions: torch.Tensor) -> None:
        """A step: each run of consecutive positions is the next piece of one text.

        Args:
            token_ids, positions: int64 `[num_tokens]`, what the model is called with.
        """
        if token_ids is None or positions.dim() > 1 or len(token_ids) != len(positions):
            raise RuntimeError(
                "Engine: the model must be called with token ids and one position each, got "
                "others; its hidden states cannot be told apart, and it cannot be measured"
            )
        ids, at = token_ids.tolist(), positions.tolist()
        bounds = [i for i in range(len(at)) if i == 0 or at[i] != at[i - 1] + 1] + [len(at)]
        self._pieces = []
        for begin, end in itertools.pairwise(bounds):
            text = self._text_of(ids[begin:end], at[begin])
            self._done[text] += end - begin
            self._pieces.append((text, slice(begin, end)))

    def _text_of(self, piece: list[int], position: int) -> int:
        """The text that goes on with these tokens. Two that do have said the same so far, but for
        texts whose earlier pieces differ: of these the one that comes first in the step."""
        taken = {text for text, _ in self._pieces}
        for i, tokens in enumerate(self._texts):
            goes_on = tokens[position : position + len(piece)] == piece
            if i not in taken and self._done[i] == position and goes_on:
                return i
        raise RuntimeError(
            f"Engine: every step must go on with a text, got {len(piece)} other tokens at position "
            f"{position}; the engine pads or repeats steps, which this measurement cannot see "
            "through"
        )

    def end(self, states: torch.Tensor) -> None:
        """The step's result, `[num_tokens, hidden_size]`."""
        for text, rows in self._pieces:
            self._states[text].append(states[rows].float())

    def result(self) -> list[torch.Tensor]:
        for tokens, done in zip(self._texts, self._done, strict=True):
            if done != len(tokens):
                raise RuntimeError(
                    f"Engine: hidden states must be of {len(tokens)} tokens, got {done}; the "
                    "engine left some out, which this measurement cannot see through"
                )
        return [torch.cat(parts) for parts in self._states]
