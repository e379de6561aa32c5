# SPDX-License-Identifier: Apache-2.0
"""Engines in this process, and what they answer, in a form that can be compared bit by bit."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from vllm_fibquant.engine.measure import Texts

from .models import VOCAB_SIZE


@dataclass(frozen=True)
class Answer:
    """One greedy answer.

    Attributes:
        tokens: the generated token ids.
        logprobs: log-probability of each generated token, exact as vLLM returned it.
        num_cached: prompt tokens found in the prefix cache.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    num_cached: int = 0

    @property
    def bits(self) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """What must be equal when two answers are the same."""
        return self.tokens, self.logprobs


PLAIN = {"mode": "exact", "calibrate": "none"}
"""Codes alone, as published: what most tests are about."""
DEFAULTS: dict = {}
"""Given as `fibquant`, by identity: no option at all."""


@contextlib.contextmanager
def engine(
    model: str, kv_cache_dtype: str, *, fibquant: dict | None = None, **settings
) -> Iterator:
    """A vLLM engine in this process: float32, eager, 64 MiB of cache, blocks of 32 tokens.

    Args:
        fibquant: options that replace those of `PLAIN`; DEFAULTS for the product's own.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # would override kv_cache_memory_bytes
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    defaults = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 512,
        "max_num_seqs": 8,
        "block_size": 32,
        "kv_cache_memory_bytes": 64 << 20,
        "enable_prefix_caching": False,
        "disable_log_stats": False,
        "skip_tokenizer_init": True,
        "seed": 0,
    }
    if fibquant is not DEFAULTS and kv_cache_dtype.startswith("fibquant"):
        settings["additional_config"] = {"fibquant": {**PLAIN, **(fibquant or {})}}
    llm = LLM(model, kv_cache_dtype=kv_cache_dtype, **{**defaults, **settings})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        with contextlib.suppress(Exception):
            cleanup_dist_env_and_memory()


def generate(llm, prompts: Sequence, num_tokens: int = 8) -> list[Answer]:
    """Greedy answers to prompts given as token ids, or as vLLM takes them, submitted together."""
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0, max_tokens=num_tokens, ignore_eos=True, logprobs=1, detokenize=False
    )
    outputs = llm.generate(
        [p if isinstance(p, dict) else {"prompt_token_ids": list(p)} for p in prompts],
        params,
        use_tqdm=False,
    )
    answers = []
    for output in outputs:
        completion = output.outputs[0]
        logprobs = tuple(
            step[token].logprob
            for step, token in zip(completion.logprobs, completion.token_ids, strict=True)
        )
        answers.append(Answer(tuple(completion.token_ids), logprobs, output.num_cached_tokens or 0))
    return answers


def one_by_one(llm, prompts: Sequence[Sequence[int]], num_tokens: int = 8) -> list[Answer]:
    """As `generate`, each prompt alone in the engine."""
    return [generate(llm, [prompt], num_tokens)[0] for prompt in prompts]


def in_batches(llm, prompts, num_tokens: int = 8, batch: int = 8) -> list[Answer]:
    """As `generate`, in batches."""
    answers = []
    for start in range(0, len(prompts), batch):
        answers += generate(llm, prompts[start : start + batch], num_tokens)
    return answers


def random_text(model_config: object) -> Texts:
    """As `measure.text_sequences`, for models that know no words."""
    starts = varied_prompts(7, VOCAB_SIZE, longest=9, shortest=5)
    sequences = varied_prompts(3, VOCAB_SIZE, longest=150, shortest=100)
    return Texts(sequences, [tokens[:4] for tokens in starts])


def varied_prompts(
    count: int, vocab_size: int, longest: int = 200, shortest: int = 1, seed: int = 0
) -> list[list[int]]:
    """Prompts of `shortest` to `longest` tokens; every third begins like an earlier one.

    Lengths around the block size (31, 32, 33, 64, 65), if in range, are always among them.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, size: int) -> list[int]:
        return torch.randint(low, high, (size,), generator=generator).tolist()

    corners = [n for n in (1, 31, 32, 33, 64, 65, 96, longest) if shortest <= n <= longest]
    prompts: list[list[int]] = []
    for number in range(count):
        few = number < len(corners)
        length = corners[number] if few else draw(shortest, longest + 1, 1)[0]
        prompt = draw(2, vocab_size, length)
        if number % 3 == 2:
            shared = prompts[draw(0, number, 1)[0]]
            prompt = (shared[: length // 2] + prompt)[:length]
        prompts.append(prompt)
    return prompts


def cache_tensors(llm) -> list[torch.Tensor]:
    """The cache tensors of every attention layer of an in-process engine."""
    context = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    # Layers of experts are there too, without one.
    found = (getattr(layer, "kv_cache", None) for layer in context.values())
    return [cache for cache in found if cache is not None and cache.numel()]


def num_preemptions(llm) -> int:
    """How often the scheduler has preempted a request."""
    for metric in llm.get_metrics():
        if metric.name == "vllm:num_preemptions":
            return int(metric.value)
    return 0


def largest_difference(first: Sequence[Answer], second: Sequence[Answer]) -> tuple[int, int, float]:
    """(answers with other tokens, answers not bit-equal, largest log-probability difference).

    Log-probabilities are compared up to the first differing token, after which the two answers
    condition on different text.
    """
    other_tokens = not_equal = 0
    largest = 0.0
    for a, b in zip(first, second, strict=True):
        other_tokens += a.tokens != b.tokens
        not_equal += a.bits != b.bits
        for i, (p, q) in enumerate(zip(a.logprobs, b.logprobs, strict=True)):
            if a.tokens[: i + 1] != b.tokens[: i + 1]:
                break
            largest = max(largest, abs(p - q))
    return other_tokens, not_equal, largest
