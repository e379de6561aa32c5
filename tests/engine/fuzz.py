# SPDX-License-Identifier: Apache-2.0
"""Completion requests with random sampling parameters: about a third are sound."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

NONSENSE = [
    None, True, "", "high", "1.5", [], {}, [1], {"a": 1}, -1, 0, 1e308, -1e308, 2**31, 2**63,
    10**30,
    float("nan"), float("inf"), -float("inf"), 1e-300, "\x00", "\ud83d\ude00" * 50,
]  # fmt: skip

SOUND: dict[str, Callable[[random.Random], Any]] = {
    "temperature": lambda draw: draw.choice([0, 0.1, 1, 1.9, 1e-6]),
    "top_p": lambda draw: draw.uniform(0.01, 1),
    "top_k": lambda draw: draw.choice([-1, 0, 1, 5, 511, 512, 100_000]),
    "min_p": lambda draw: draw.uniform(0, 1),
    "presence_penalty": lambda draw: draw.uniform(-2, 2),
    "frequency_penalty": lambda draw: draw.uniform(-2, 2),
    "repetition_penalty": lambda draw: draw.uniform(0.1, 2),
    "seed": lambda draw: draw.randrange(2**31),
    "n": lambda draw: draw.choice([1, 2, 3]),
    "stop": lambda draw: draw.choice(["w5", ["w1", "w2"], ["w3 w4"]]),
    "stop_token_ids": lambda draw: [draw.randrange(512) for _ in range(3)],
    "logprobs": lambda draw: draw.choice([0, 1, 5]),
    "prompt_logprobs": lambda draw: draw.choice([0, 1, 5]),
    "echo": lambda draw: draw.choice([True, False]),
    "ignore_eos": lambda draw: draw.choice([True, False]),
    "min_tokens": lambda draw: draw.choice([0, 1, 3]),
    "logit_bias": lambda draw: {str(draw.randrange(512)): draw.uniform(-100, 100)},
    "allowed_token_ids": lambda draw: [draw.randrange(512) for _ in range(4)],
    "bad_words": lambda draw: ["w7"],
    "skip_special_tokens": lambda draw: draw.choice([True, False]),
    "include_stop_str_in_output": lambda draw: draw.choice([True, False]),
    "truncate_prompt_tokens": lambda draw: draw.choice([1, 16, 64]),
    "stream": lambda draw: True,
    "priority": lambda draw: draw.choice([0, 3]),
    "structured_outputs": lambda draw: draw.choice([{"choice": ["w1", "w2"]}, {"regex": "w[0-9]"}]),
}
BAD_PROMPTS = [
    None, "", [], [[]], [-1], [512], [10**12], [1.5], ["w1", 2], {}, 3, [[1, 2], [3]], ["w1", "w2"],
    ["\x00"], "w1 " * 3000, [5] * 513,
]  # fmt: skip


def random_body(number: int, vocab_size: int) -> bytes:
    """The content of request `number`, always the same one. At most 16 tokens are generated.

    NaN and infinities are written as Python writes them, which is not JSON.
    """
    draw = random.Random(number)
    prompt: Any = [draw.randrange(vocab_size) for _ in range(draw.randrange(1, 150))]
    if draw.random() < 0.1:
        prompt = draw.choice(BAD_PROMPTS)
    body = {"model": "served", "prompt": prompt, "max_tokens": draw.choice([0, 1, 4, 16])}
    for name in draw.sample(sorted(SOUND), draw.randrange(1, 6)):
        body[name] = SOUND[name](draw)
    if draw.random() < 0.5:
        # max_tokens stays: what is unlimited by mistake is no fault.
        body[draw.choice(sorted(SOUND))] = draw.choice(NONSENSE)
    content = json.dumps(body).encode()
    if draw.random() < 0.02:
        content = content[: draw.randrange(len(content))]
    return content
