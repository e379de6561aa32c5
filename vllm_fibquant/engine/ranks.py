# SPDX-License-Identifier: Apache-2.0
"""What the ranks of one engine must have in common, and what is said when they do not.

Ranks of a tensor or pipeline parallel engine may be processes on several machines, each with its
own installation, command line and codebook files. A rank that encodes with another codebook or
rotation gives answers that are wrong without an error, so ranks compare before they serve.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import fields

from vllm_fibquant import __version__
from vllm_fibquant.codec.codec import KVCodec
from vllm_fibquant.codec.latent import LatentCodec
from vllm_fibquant.options import Options

SHOWN_DIGITS = 16
"""Hexadecimal digits of a digest that are compared and shown."""


NO_FILE = ("none", "bias")
"""What a layer's keys are coded by where no calibration file says it: nothing, or what the model's
own weights say."""

_NOT_COMPARED = ("calibration",)
"""Options that say where something is, not what it is: its digest is compared."""


def facts_of(layers: Iterable[tuple[Options, KVCodec | LatentCodec, str]]) -> dict[str, str]:
    """What decides the bytes of a rank's pages and how they are read, by name.

    Args:
        layers: options and codec of each of the rank's attention layers, and the digest of the
            calibration its keys are coded by; none gives no facts.
    """
    facts: dict[str, str] = {}
    calibrations = set()
    for options, codec, calibration in layers:
        facts["vllm-fibquant"] = __version__
        if calibration not in NO_FILE:
            calibrations.add(calibration[:SHOWN_DIGITS])
            facts["digest of the calibration"] = " and ".join(sorted(calibrations))
        for field in fields(options):
            if field.name not in _NOT_COMPARED:
                facts[field.name] = str(getattr(options, field.name))
        for side, half in codec.codes:
            spec = half.codebook.spec
            name = f"{side} codebook {spec.name} in {spec.storage} for head_dim {half.head_dim}"
            facts[name] = half.codebook.digest[:SHOWN_DIGITS]
            name = f"rotation for head_dim {half.head_dim}"
            facts[name] = half.rotation.digest[:SHOWN_DIGITS]
    return facts


def differences(facts_of_ranks: list[dict[str, str]]) -> list[str]:
    """One line per fact in which ranks differ, naming the ranks of each value.

    A fact that some ranks lack, because their layers have other head dims or are not ours, is
    compared among those that have it.

    Args:
        facts_of_ranks: `facts_of` of rank 0, 1, ...
    """
    lines = []
    for name in dict.fromkeys(name for facts in facts_of_ranks for name in facts):
        ranks_of: dict[str, list[str]] = {}
        for rank, facts in enumerate(facts_of_ranks):
            if name in facts:
                ranks_of.setdefault(facts[name], []).append(str(rank))
        if len(ranks_of) > 1:
            values = "; ".join(f"{v} on rank {', '.join(r)}" for v, r in ranks_of.items())
            lines.append(f"{name}: must be the same on every rank, got {values}")
    return lines


def digest_of(facts: dict[str, str]) -> str:
    """A short digest of facts, to compare engines that know nothing of each other."""
    text = "\n".join(f"{name}={value}" for name, value in sorted(facts.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:SHOWN_DIGITS]
