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
class PlannedLayer:
    """One layer that keeps keys and values.

    Attributes:
        window: its sliding window, or 0.
        record_bytes: of one token and KV head, keys and values.
        is_coded: whether they are stored as codes.
    """

    num_kv_heads: int
    head_dim: int
    window: int
    record_bytes: int
    is_coded: bool


@dataclass(frozen=True)
class Planned:
    """A cache as an engine would make it.

    Attributes:
        layers: those that keep keys and values, in order.
        num_states: layers that keep a state of one size, whatever the number of tokens.
        block_size: tokens of a block of attention layers.
        num_copies: tokens of a request that are also kept in 16 bits.
        copy_bytes: memory that these take.
    """

    layers: tuple[PlannedLayer, ...]
    num_states: int
    block_size: int
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
    found = compat_pages.allocate(config, specs, memory_bytes - copy_bytes)
    found_layers = tuple(
        PlannedLayer(
            spec.num_kv_heads,
            spec.head_size,
            getattr(spec, "sliding_window", None) or 0,
            spec.real_page_size_bytes // spec.block_size // spec.num_kv_heads,
            name in coded,
        )
        for name, spec in specs.items()
        if isinstance(spec, AttentionSpec)
    )
    return Planned(
        found_layers,
        len(specs) - len(found_layers),
        config.cache_config.block_size,
        found.num_blocks,
        found.max_concurrency,
        run_options(config).num_copies if num_rows else 0,
        copy_bytes,
    )
