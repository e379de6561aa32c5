# SPDX-License-Identifier: Apache-2.0
"""The one table of what each implementation of the operations can do (`kernels`)."""

from __future__ import annotations

from typing import NamedTuple

IMPLEMENTATIONS = ("reference", "cpu", "cuda", "triton")


class Feature(NamedTuple):
    """Something that may be asked of an implementation.

    Attributes:
        what: for people.
        asked_by: the option, or what of a model, that asks for it.
        had_by: the implementations that can do it.
    """

    what: str
    asked_by: str
    had_by: tuple[str, ...]


_ALL, _ON_CPUS = IMPLEMENTATIONS, ("reference", "cpu")
_NOT_TRITON = ("reference", "cpu", "cuda")

FEATURES = {
    "window": Feature("sliding window", "the model", _ALL),
    "chunk": Feature("attention within chunks", "the model", _ALL),
    "soft_cap": Feature("soft cap of scores", "the model", _ALL),
    "sinks": Feature("attention sinks", "the model", _ALL),
    "raw": Feature("a step's new tokens read as computed", '`"prefill": "raw"`', _ALL),
    "copies": Feature(
        "newest and first tokens kept in 16 bits", '`"mode": "quality"`', _NOT_TRITON
    ),
    "means": Feature("keys coded without their means", '`"calibrate": "means"`', _NOT_TRITON),
    "transform": Feature("keys transformed", '`"calibrate": "transform"`', _NOT_TRITON),
    "keep_first": Feature("first tokens seen outside a window", "`retain`", _NOT_TRITON),
    "lists": Feature("codewords searched through lists", "`num_lists`", _ON_CPUS),
    "layers": Feature("other presets for some layers", "`layers`", _ALL),
    "monitor": Feature("fidelity compared while serving", "`monitor`", _ALL),
}
"""What may be asked, by name. Refusals, tests and the documents' table follow from it; head dims,
codes and block sizes are answered by `Kernels.refuses`."""


def features_of(implementation: str) -> frozenset[str]:
    """The features one implementation has."""
    return frozenset(name for name, row in FEATURES.items() if implementation in row.had_by)
