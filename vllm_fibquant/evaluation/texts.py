# SPDX-License-Identifier: Apache-2.0
"""What is read: the bundled public-domain texts, cut into the units that results are kept for.

alice.txt        Lewis Carroll, "Alice's Adventures in Wonderland" (1865): everything measured
calibration.txt  John Milton, "Paradise Lost" (1667), books I and II: fitting only
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vllm_fibquant.files import PACKAGE_DIR

DATA = PACKAGE_DIR / "data"
EVALUATION = DATA / "alice.txt"
CALIBRATION = DATA / "calibration.txt"

Encode = Callable[[str], list[int]]
Kind = Literal["fidelity", "text", "passkey", "greedy"]

NAMES = ("lion", "ship", "garden", "river", "castle", "candle", "window", "mountain")
NEEDLE = "\nThe pass key of the {name} is {digits}. Remember it.\n"
QUESTIONS = "\nQuestion: What are the pass keys?\nAnswer:"
ANSWER = " The pass key of the {name} is"


@dataclass(frozen=True)
class Unit:
    """One thing that is measured of every format.

    Attributes:
        kind: what of it: fidelity of keys, values and attention; next-token distributions of a
            text; passkeys; tokens equal to the uncompressed model's.
        name: unique among the units of a plan.
        tokens: all that is read.
        spans: passkey: begin and end of each answer in `tokens`; greedy: of the continuation.
        depths: passkey: where each key was hidden, as a share of the text before the questions.
    """

    kind: Kind
    name: str
    tokens: tuple[int, ...]
    spans: tuple[tuple[int, int], ...] = ()
    depths: tuple[float, ...] = ()

    @property
    def digest(self) -> str:
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Sizes:
    """How much is read.

    Attributes:
        chunk: tokens of a text unit.
        num_chunks, num_other_chunks: text units of main rows, and of the others.
        fidelity: tokens of the one fidelity unit.
        calibration: tokens that formats are fitted to.
        step: tokens that the engine prefills at once where that matters.
        far: positions from here on are reported apart.
        passkeys: (number of keys, number of texts).
        passkey_length: tokens of such a text, before the questions.
        greedy: number of prompts; prompt_length: tokens of one; answer_length: of its continuation.
    """

    chunk: int = 2048
    num_chunks: int = 4
    num_other_chunks: int = 2
    fidelity: int = 1024
    calibration: int = 2048
    step: int = 16
    far: int = 1024
    passkeys: tuple[tuple[int, int], ...] = ((1, 4), (2, 2), (4, 1), (8, 1))
    passkey_length: int = 448
    greedy: int = 8
    prompt_length: int = 128
    answer_length: int = 128

    @property
    def longest(self) -> int:
        """Tokens of the longest unit, or a little more."""
        return max(self.chunk, self.passkey_length + 512, self.prompt_length + self.answer_length)


QUICK = Sizes(
    chunk=512, num_chunks=1, num_other_chunks=1, fidelity=256, calibration=1024, far=256,
    passkeys=((1, 2), (4, 1)), passkey_length=256, greedy=2, prompt_length=64, answer_length=32,
)  # fmt: skip
SMOKE = Sizes(
    chunk=160, num_chunks=1, num_other_chunks=1, fidelity=96, calibration=256, far=80,
    passkeys=((1, 1),), passkey_length=64, greedy=1, prompt_length=32, answer_length=8,
)  # fmt: skip


def chunks_of(path: Path, encode: Encode, length: int, count: int) -> list[list[int]]:
    """The first `count` runs of `length` tokens of a text.

    Raises:
        ValueError: the text is too short.
    """
    tokens = encode(path.read_text(encoding="utf-8"))
    if len(tokens) < length * count:
        raise ValueError(
            f"chunks_of: {path.name} must have {length * count} tokens, got {len(tokens)}; "
            "ask for fewer or shorter chunks"
        )
    return [tokens[i * length : (i + 1) * length] for i in range(count)]


def text_units(encode: Encode, sizes: Sizes) -> list[Unit]:
    """Text units, and before them the fidelity unit: the beginning of the first of them."""
    chunks = chunks_of(EVALUATION, encode, sizes.chunk, sizes.num_chunks)
    fidelity = Unit("fidelity", f"fidelity:{sizes.fidelity}", tuple(chunks[0][: sizes.fidelity]))
    return [fidelity] + [
        Unit("text", f"text:{sizes.chunk}:{i}", tuple(chunk)) for i, chunk in enumerate(chunks)
    ]


def passkey_units(encode: Encode, sizes: Sizes) -> Iterator[Unit]:
    """Texts with pass keys hidden at spread depths, then the question after every one of them.

    The answers follow one another in an order of their own, the right one after each question, so
    that one reading answers all: an answer is right when each of its tokens is the model's
    likeliest at its place, that is, when greedy generation would have given it.
    """
    total = sum(count for _, count in sizes.passkeys)
    hays = chunks_of(EVALUATION, encode, sizes.passkey_length, total)
    for num_keys, count in sizes.passkeys:
        for i in range(count):
            draw = random.Random(f"{num_keys}/{i}")
            names = draw.sample(NAMES, num_keys)
            keys = [str(draw.randrange(10_000, 100_000)) for _ in names]
            # One key of each part of the text; the texts differ in where in its part.
            depths = [(j + (i + 0.5) / count) / num_keys for j in range(num_keys)]
            hay, tokens, begin = hays.pop(), [], 0
            for name, key, depth in zip(names, keys, depths, strict=True):
                end = int(depth * len(hay))
                tokens += hay[begin:end] + encode(NEEDLE.format(name=name, digits=key))
                begin = end
            tokens += hay[begin:] + encode(QUESTIONS)
            order = draw.sample(range(num_keys), num_keys)
            spans = []
            for j in order:
                tokens += encode(ANSWER.format(name=names[j]))
                answer = encode(" " + keys[j])
                spans.append((len(tokens), len(tokens) + len(answer)))
                tokens += answer + encode(".")
            yield Unit(
                "passkey", f"passkey:{sizes.passkey_length}:{num_keys}:{i}", tuple(tokens),
                tuple(spans), tuple(round(depths[j], 3) for j in order),
            )  # fmt: skip


def greedy_units(
    encode: Encode, sizes: Sizes, answer: Callable[[list[list[int]], int], list[list[int]]]
) -> list[Unit]:
    """Prompts with the uncompressed model's own greedy continuation.

    Args:
        answer: prompts and a number of tokens to the continuations.
    """
    prompts = chunks_of(EVALUATION, encode, sizes.prompt_length, 4 * sizes.greedy)[::4]
    length = sizes.prompt_length
    return [
        Unit(
            "greedy", f"greedy:{length}:{sizes.answer_length}:{i}", (*prompt, *continuation),
            ((length, length + len(continuation)),),
        )
        for i, (prompt, continuation) in enumerate(
            zip(prompts, answer(prompts, sizes.answer_length), strict=True)
        )
    ]  # fmt: skip
