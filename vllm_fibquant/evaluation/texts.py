# SPDX-License-Identifier: Apache-2.0
"""What is read: the bundled public-domain texts, cut into the units that results are kept for.

alice.txt        Lewis Carroll, "Alice's Adventures in Wonderland" (1865): everything measured
calibration.txt  John Milton, "Paradise Lost" (1667), books I and II: fitting only
CODE             modules of Python's standard library, of the Python that runs: code as text
"""

from __future__ import annotations

import hashlib
import random
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vllm_fibquant.files import PACKAGE_DIR

DATA = PACKAGE_DIR / "data"
EVALUATION = DATA / "alice.txt"
CALIBRATION = DATA / "calibration.txt"

CODE = ("argparse.py", "ast.py", "tarfile.py", "typing.py")
"""Modules whose beginnings are code as text; their text is that of the Python that runs, so results
are filed under a digest of the tokens."""

Encode = Callable[[str], list[int]]


class Tokenizer:
    """A model's tokenizer, told apart from how a text begins.

    Attributes:
        begin: the tokens that the model expects before any text: its BOS token, or none.
    """

    def __init__(self, model: str) -> None:
        from transformers import AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(model)
        first = self._tokenizer.bos_token_id
        begins = self._tokenizer.encode("a")[:1] == [first]
        self.begin: list[int] = [first] if first is not None and begins else []

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without those of `begin`."""
        return self._tokenizer.encode(text, add_special_tokens=False)


Kind = Literal["fidelity", "text", "passkey", "greedy", "retrieval"]

NAMES = ("lion", "ship", "garden", "river", "castle", "candle", "window", "mountain")
NEEDLE = "\nThe pass key of the {name} is {digits}. Remember it.\n"
QUESTIONS = "\nQuestion: What are the pass keys?\nAnswer:"
ANSWER = " The pass key of the {name} is"


@dataclass(frozen=True)
class Unit:
    """One thing that is measured of every format.

    Attributes:
        kind: what of it: fidelity of keys, values and attention; next-token distributions of a
            text; pass keys, in short texts and in long ones (retrieval); tokens equal to the
            uncompressed model's, which are appended once they are known.
        name: unique among the units of a plan.
        tokens: all that is read.
        spans: begin and end of each answer in `tokens`.
        depths: where each key was hidden, as a share of the text before the questions.
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
        chunk: tokens of a text.
        num_chunks: texts of each source.
        num_other: texts of other than main rows.
        fidelity: tokens of the one fidelity unit.
        calibration: tokens that formats are fitted to.
        step: tokens that the engine prefills at once where that matters.
        far: positions from here on are reported apart.
        passkeys: (number of keys, number of texts).
        passkey_length: tokens of such a text, before the questions.
        greedy: number of prompts; prompt_length: tokens of one; answer_length: of its continuation.
        retrieval: tokens of long texts with many keys; num_retrieval: texts of each length.
    """

    chunk: int = 2048
    num_chunks: int = 2
    num_other: int = 2
    fidelity: int = 1024
    calibration: int = 2048
    step: int = 16
    far: int = 1024
    passkeys: tuple[tuple[int, int], ...] = ((1, 4), (2, 2), (4, 1), (8, 1))
    passkey_length: int = 448
    greedy: int = 8
    prompt_length: int = 128
    answer_length: int = 128
    retrieval: tuple[int, ...] = (4096, 8192)
    num_retrieval: int = 4


QUICK = Sizes(
    chunk=512, num_chunks=1, num_other=1, fidelity=256, calibration=1024, far=256,
    passkeys=((1, 2), (4, 1)), passkey_length=256, greedy=2, prompt_length=64, answer_length=32,
    retrieval=(),
)  # fmt: skip


def chunks_of(
    path: Path, encode: Encode, length: int, count: int, begin: Sequence[int] = ()
) -> list[list[int]]:
    """The first `count` runs of tokens of a text, each of `length` with `begin` before it.

    Raises:
        ValueError: the text is too short.
    """
    tokens = encode(path.read_text(encoding="utf-8"))
    fresh = length - len(begin)
    if len(tokens) < fresh * count:
        raise ValueError(
            f"chunks_of: {path.name} must have {fresh * count} tokens, got {len(tokens)}; "
            "ask for fewer or shorter chunks"
        )
    return [[*begin, *tokens[i * fresh : (i + 1) * fresh]] for i in range(count)]


def text_units(tokenizer: Tokenizer, sources: Sequence[str], length: int, count: int) -> list[Unit]:
    """The first `count` texts of `length` tokens of every source.

    Args:
        sources: `prose`, the bundled novel; `code`, CODE; or the paths of text files.

    Raises:
        ValueError: a source is too short, or there is none.
    """
    units = []
    for source in sources:
        if source == "code":
            library = Path(sysconfig.get_path("stdlib"))
            chunks = [
                (f"code:{name}:{length}", chunks_of(library / name, tokenizer.encode, length, 1,
                                                    tokenizer.begin)[0])
                for name in CODE[:count]
            ]  # fmt: skip
        else:
            path = EVALUATION if source == "prose" else Path(source)
            if not path.is_file():
                raise ValueError(
                    f"text_units: a text must be prose, code or the path of a file, got {source!r}"
                    "; give another one"
                )
            label = "text" if source == "prose" else path.name
            runs = chunks_of(path, tokenizer.encode, length, count, tokenizer.begin)
            chunks = [(f"{label}:{length}:{i}", run) for i, run in enumerate(runs)]
        units += [Unit("text", name, tuple(chunk)) for name, chunk in chunks]
    names = [unit.name for unit in units]
    if twice := sorted({name.partition(":")[0] for name in names if names.count(name) > 1}):
        raise ValueError(
            f"text_units: every text must have a name of its own, got {', '.join(twice)} more than "
            "once; rename or leave out one"
        )
    return units


def spread_keys(num_keys: int) -> tuple[tuple[int, int], ...]:
    """`Sizes.passkeys` for about `num_keys` keys, at least 20: as many texts of each kind, in
    proportion, as 20 keys have."""
    times = max(1, round(num_keys / sum(n * count for n, count in Sizes.passkeys)))
    return tuple((n, times * count) for n, count in Sizes.passkeys)


def passkey_units(
    tokenizer: Tokenizer, sizes: Sizes, haystack: Path = EVALUATION
) -> Iterator[Unit]:
    """Texts with pass keys hidden at spread depths, then the question after every one of them.

    The answers follow one another in an order of their own, the right one after each question, so
    that one reading answers all: an answer is right when each of its tokens is the model's
    likeliest at its place, that is, when greedy generation would have given it.
    """
    encode = tokenizer.encode
    total = sum(count for _, count in sizes.passkeys)
    hays = chunks_of(haystack, encode, sizes.passkey_length, total)
    for num_keys, count in sizes.passkeys:
        for i in range(count):
            draw = random.Random(f"{num_keys}/{i}")
            names = draw.sample(NAMES, num_keys)
            keys = [str(draw.randrange(10_000, 100_000)) for _ in names]
            # One key of each part of the text; the texts differ in where in its part.
            depths = [(j + (i + 0.5) / count) / num_keys for j in range(num_keys)]
            hay, begin = hays.pop(), 0
            tokens = list(tokenizer.begin)
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


def greedy_units(tokenizer: Tokenizer, sizes: Sizes) -> list[Unit]:
    """Prompts whose greedy continuation by the uncompressed model is compared."""
    encode, begin = tokenizer.encode, tokenizer.begin
    length = sizes.prompt_length
    prompts = chunks_of(EVALUATION, encode, length, 4 * sizes.greedy, begin)[::4]
    return [
        Unit(
            "greedy", f"greedy:{length}:{sizes.answer_length}:{i}", tuple(prompt),
            ((length, length + sizes.answer_length),),
        )
        for i, prompt in enumerate(prompts)
    ]  # fmt: skip
