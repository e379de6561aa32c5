# SPDX-License-Identifier: Apache-2.0
"""What vLLM would make of a cache's memory, asked of a model that has no weights.

For layers beside attention (Mamba, linear attention, short convolutions) the size of a block
follows from the size of a state, and that from a formula of each architecture. So the model is
built without memory for weights, which takes a tenth of a second whatever its size, and vLLM's own
functions are asked: what they say, an engine says.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_fibquant.engine import compat_pages, layers
from vllm_fibquant.engine.latent_support import latent_layers
from vllm_fibquant.engine.support import is_ours, run_options


@dataclass(frozen=True)
class Planned:
    """A cache as an engine would make it.

    Attributes:
        layers: what vLLM specifies of those that keep keys and values, in order.
        coded: those of them that store codes.
        num_states: layers that keep a state of one size, whatever the number of tokens.
        num_copies: tokens of a request that are also kept in 16 bits.
        copy_bytes: memory that these take.
    """

    layers: list[AttentionSpec]
    coded: list[AttentionSpec]
    num_states: int
    num_blocks: int
    max_concurrency: float
    num_copies: int
    copy_bytes: int


def planned(
    model: str,
    kv_cache_dtype: str,
    memory_bytes: int,
    fibquant: dict | None = None,
    **settings: Any,
) -> Planned:
    """The cache of one worker that serves `model` alone, in bfloat16.

    Args:
        model: directory with a config.json, or a Hugging Face name.
        memory_bytes: of pages and copies.
        fibquant: our options.
        settings: further arguments of vLLM's `EngineArgs`.

    Raises:
        ValueError: vLLM, or this package, would refuse to serve it.
    """
    options = {"fibquant": fibquant or {}} if is_ours(kv_cache_dtype) else {}
    defaults = {"dtype": "bfloat16", "enforce_eager": True, "skip_tokenizer_init": True}
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # nothing is started: what vLLM would say of it is not so
    try:
        config = EngineArgs(
            model=model,
            kv_cache_dtype=kv_cache_dtype,
            additional_config=options,
            **{**defaults, **settings},
        ).create_engine_config()
        with compat_pages.layers_without_weights(config):
            return _ask(config, memory_bytes)
    finally:
        logging.disable(level)


def _ask(config: VllmConfig, memory_bytes: int) -> Planned:
    specs = compat_pages.plain_specs(config)
    coded = {*layers.our_layers(config), *latent_layers(config)}
    if is_ours(config.cache_config.cache_dtype):
        layers.check_layers(config)
        specs = compat_pages.fitted(specs)
    num_rows, row_bytes = layers.copy_rows(config, memory_bytes)
    copy_bytes = num_rows * row_bytes
    found = compat_pages.allocate(config, specs, max(0, memory_bytes - copy_bytes))
    kept = {name: spec for name, spec in specs.items() if isinstance(spec, AttentionSpec)}
    return Planned(
        list(kept.values()),
        [spec for name, spec in kept.items() if name in coded],
        len(specs) - len(kept),
        found.num_blocks,
        found.max_concurrency,
        run_options(config).num_copies if num_rows else 0,
        copy_bytes,
    )
