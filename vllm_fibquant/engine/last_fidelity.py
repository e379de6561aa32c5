# SPDX-License-Identifier: Apache-2.0
"""What the gate found at a model's last start, kept for `vllm-fibquant doctor`.

A start measures what codes cost (`gate`); before it nothing is known but what the last one found.
So its figures are kept in the user's cache under what decides them: the model's place and
configuration, the preset, and our options. Where there is no cache, doctor has no figures.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from vllm_fibquant import files
from vllm_fibquant.engine.support import run_options

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_fibquant.observe.loss import Outcome

KEPT = ("state", "kl", "perplexity_increase", "worst_layer", "worst_layer_cosine", "num_tokens")


def _name(vllm_config: VllmConfig) -> str:
    """The record's path in a cache: one for each model, preset and set of options."""
    model = vllm_config.model_config
    place = os.path.realpath(model.model) if os.path.isdir(model.model) else model.model
    facts = [place, model.hf_config.to_json_string(), run_options(vllm_config).digest]
    return f"fidelity/{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]}.json"


def keep(vllm_config: VllmConfig, outcome: Outcome, calibrations: Iterable[str]) -> None:
    """Remembers what this start has measured; nothing where it has not.

    Args:
        calibrations: digests of the files that its keys are coded by.
    """
    facts = outcome.facts()
    if facts["kl"] is not None:
        kept = {name: facts[name] for name in KEPT} | {"date": time.strftime("%Y-%m-%d")}
        kept["calibrations"] = sorted(calibrations)
        files.keep(_name(vllm_config), json.dumps(kept).encode())


def read(vllm_config: VllmConfig) -> dict[str, Any] | None:
    """What the last start with this model, preset and options found: KEPT, calibrations and
    its date, or None."""
    path = files.find(_name(vllm_config))
    if path is None:
        return None
    try:
        kept = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return kept if isinstance(kept, dict) and {*KEPT, "calibrations"} <= set(kept) else None
