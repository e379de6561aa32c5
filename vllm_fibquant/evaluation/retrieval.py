# SPDX-License-Identifier: Apache-2.0
"""Long texts with many facts among distractors, after the needle tasks of RULER (arXiv 2404.06654).

A text is made of paragraphs: of a novel, or of SQuAD's or HotpotQA's contexts, which others have
written and which do not ship. Between them stand sentences that each give a number to a key. Most
are distractors; some keys are asked for (multi-key), one has several numbers, all of which are
asked for (multi-value). Questions and right answers follow one another, as `texts.passkey_units`
has them, so that one reading answers all.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from vllm_fibquant.evaluation.texts import EVALUATION, Tokenizer, Unit

NUM_KEYS, NUM_ASKED, NUM_VALUES = 20, 8, 4
"""Keys with one number each, those of them that are asked for, numbers of the one other key."""

NEAREST = 384
"""Tokens between the last number and the questions, at least: no window reaches it."""

FACT = " One of the special magic numbers for {key} is: {number}.\n"
QUESTION = "\nQuestion: What are the special magic numbers that the text mentions?\nAnswer:"
ONE = " The special magic number for {key} is:"
SEVERAL = " The special magic numbers for {key}, in the order of the text, are:"

FIRST = ("amber", "brisk", "coral", "dusty", "eager", "frozen", "gentle", "hollow", "ivory",
         "jolly", "knotty", "lunar", "mellow", "noble", "opal", "proud", "quiet", "rustic",
         "silver", "tidy", "upper", "velvet")  # fmt: skip
SECOND = ("anchor", "badger", "cactus", "dolphin", "engine", "falcon", "guitar", "harbor", "island",
          "jacket", "kettle", "lantern", "magnet", "needle", "orchid", "pillow", "quarry", "ribbon",
          "saddle", "tunnel", "umbrella", "violin")  # fmt: skip


def paragraphs(path: Path) -> list[str]:
    """Of a text file, or the contexts of a file in SQuAD's or HotpotQA's format, in its order.

    Raises:
        ValueError: a JSON file in another format.
    """
    if path.suffix != ".json":
        blocks = path.read_text(encoding="utf-8").split("\n\n")
        return [" ".join(block.split()) for block in blocks if block.strip()]
    content = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(content, dict) and "data" in content:  # SQuAD
        found = [p["context"] for article in content["data"] for p in article["paragraphs"]]
    elif isinstance(content, list) and content and "context" in content[0]:  # HotpotQA
        found = [
            f"{title}: {' '.join(s.strip() for s in sentences)}"
            for question in content
            for title, sentences in question["context"]
        ]
    else:
        raise ValueError(
            f"paragraphs: {path.name} must be in the format of SQuAD or HotpotQA, got another; "
            "give a text file"
        )
    return list(dict.fromkeys(" ".join(p.split()) for p in found))


def retrieval_units(
    tokenizer: Tokenizer, lengths: Sequence[int], count: int, path: Path = EVALUATION
) -> Iterator[Unit]:
    """`count` texts of each length with their questions, the same for every format.

    Each has other keys and numbers, and those of one length have other parts of the file.

    Raises:
        ValueError: the file is too short.
    """
    hay = Hay(tokenizer, path)
    for length in lengths:
        for index in range(count):
            yield _unit(tokenizer, hay, length, index)


class Hay:
    """A file's paragraphs as tokens, made as far as they are asked for."""

    def __init__(self, tokenizer: Tokenizer, path: Path) -> None:
        self.path = path
        self._encode = tokenizer.encode
        self._paragraphs = iter(paragraphs(path))
        self._tokens: list[int] = []

    def tokens(self, begin: int, count: int) -> list[int]:
        """The `count` tokens from number `begin` on.

        Raises:
            ValueError: there are not so many.
        """
        end = begin + max(count, 1)
        while len(self._tokens) < end:
            paragraph = next(self._paragraphs, None)
            if paragraph is None:
                raise ValueError(
                    f"retrieval: {self.path.name} must have {end} tokens, got "
                    f"{len(self._tokens)}; give a longer text, or ask for fewer or shorter ones"
                )
            self._tokens += self._encode(paragraph + "\n")
        return self._tokens[begin:end]


def _unit(tokenizer: Tokenizer, hay: Hay, length: int, index: int) -> Unit:
    encode = tokenizer.encode
    draw = random.Random(f"retrieval/{length}/{index}")
    num_facts = NUM_KEYS + NUM_VALUES
    names = zip(draw.sample(FIRST, NUM_KEYS + 1), draw.sample(SECOND, NUM_KEYS + 1), strict=True)
    keys = [" ".join(pair) for pair in names]
    keyed = keys[1:] + keys[:1] * NUM_VALUES
    facts = [(key, str(draw.randrange(10_000, 100_000))) for key in keyed]
    draw.shuffle(facts)

    sentences = [encode(FACT.format(key=key, number=number)) for key, number in facts]
    asked = draw.sample(keys[1:], NUM_ASKED)
    tail, spans = _questions(tokenizer, dict(facts), asked, keys[0], facts)
    room = length - len(tokenizer.begin) - sum(map(len, sentences)) - len(tail)
    if room < NEAREST:
        raise ValueError(
            f"retrieval: length must leave {NEAREST} tokens beside facts and questions, got "
            f"{length}; ask for {length - room + NEAREST} or more"
        )
    straw = hay.tokens(index * length, room)
    # Facts are spread evenly over the text but for its end.
    places = [int((i + 0.5) * (room - NEAREST) / num_facts) for i in range(num_facts)]
    tokens, begin = list(tokenizer.begin), 0
    for place, sentence in zip(places, sentences, strict=True):
        tokens += straw[begin:place] + sentence
        begin = place
    tokens += straw[begin:]
    shifted = tuple((len(tokens) + a, len(tokens) + b) for a, b in spans)
    depth = {fact: round(place / room, 3) for fact, place in zip(facts, places, strict=True)}
    of_asked = [next(f for f in facts if f[0] == key) for key in asked]
    order = of_asked + [f for f in facts if f[0] == keys[0]]
    return Unit(
        "retrieval", f"retrieval:{hay.path.stem}:{length}:{index}", (*tokens, *tail), shifted,
        tuple(depth[fact] for fact in order),
    )  # fmt: skip


def _questions(
    tokenizer: Tokenizer, numbers: dict[str, str], asked: list[str], several: str,
    facts: list[tuple[str, str]],
) -> tuple[list[int], list[tuple[int, int]]]:  # fmt: skip
    """Questions with their answers, and the answers' spans: first those of one number each, then
    those of the key with several."""
    encode = tokenizer.encode
    tokens, spans = encode(QUESTION), []

    def answer(number: str, end: str) -> None:
        given = encode(" " + number)
        spans.append((len(tokens), len(tokens) + len(given)))
        tokens.extend(given + encode(end))

    for key in asked:
        tokens += encode(ONE.format(key=key))
        answer(numbers[key], ".")
    tokens += encode(SEVERAL.format(key=several))
    for number in (number for key, number in facts if key == several):
        answer(number, ",")
    return tokens, spans
