# SPDX-License-Identifier: Apache-2.0
"""What vLLM's allocator makes of records: tokens that fit, beside 16 bits and every preset.

vLLM draws the blocks of all layers from one pool of equally large pages. Where layers differ in
head_dim, and beside state-space layers, it pads the smaller pages, so that fewer bits need not hold
more tokens. So every figure here comes from vLLM's own functions, given the layers' sizes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_fibquant.codec.config import PRESETS
from vllm_fibquant.codec.layout import preset_layout
from vllm_fibquant.engine import compat_pages
from vllm_fibquant.engine.latent_support import is_latent

TOLD_PADDING = 0.1
"""Share of pages that holds nothing, above which a start warns."""


@dataclass(frozen=True)
class Fit:
    """What fits into a worker's memory with one cache dtype.

    Attributes:
        num_tokens: as vLLM reports the cache's size.
        padding: share of the bytes given to a request of maximum length that holds nothing.
    """

    num_tokens: int
    padding: float


def what_fits(vllm_config: VllmConfig, memory_bytes: int) -> dict[str, Fit]:
    """What fits into this worker's memory: "stored", as it is, "16bit", and every preset.

    Presets whose codes do not divide a head_dim are left out, with latent attention all of them,
    and for a model with state-space layers all but "stored": for those vLLM chooses other block
    sizes with another cache dtype.

    Args:
        memory_bytes: of all pages.
    """
    specs = compat_pages.plain_specs(vllm_config)
    if not specs or memory_bytes <= 0:
        return {}
    fits = {"stored": _fit(vllm_config, _fitted(vllm_config, specs), memory_bytes)}
    attention = {n: spec for n, spec in specs.items() if isinstance(spec, AttentionSpec)}
    if len(attention) < len(specs):
        return fits
    is_ours = {name for name, spec in attention.items() if spec.dtype == torch.uint8}
    dense = {
        name: replace(spec, dtype=torch.bfloat16, state_content_bytes=None, page_size_padded=None)
        for name, spec in attention.items()
    }
    fits["16bit"] = _fit(vllm_config, dense, memory_bytes)
    if is_latent(vllm_config):
        return fits
    for preset in PRESETS.values():
        try:
            sizes = {n: preset_layout(preset, attention[n].head_size).record_bytes for n in is_ours}
        except ValueError:  # a subvec_dim that does not divide a head_dim
            continue
        coded = {n: replace(attention[n], state_content_bytes=size) for n, size in sizes.items()}
        coded = _fitted(vllm_config, {**attention, **coded})
        fits[preset.name] = _fit(vllm_config, coded, memory_bytes)
    return fits


def _fitted(vllm_config: VllmConfig, specs: dict[str, Any]) -> dict[str, Any]:
    is_one_group = vllm_config.scheduler_config.disable_hybrid_kv_cache_manager
    return specs if is_one_group else compat_pages.fitted(specs)


def _fit(vllm_config: VllmConfig, specs: dict[str, Any], memory_bytes: int) -> Fit:
    found = compat_pages.allocate(vllm_config, specs, memory_bytes)
    num_tokens = int(found.max_concurrency * vllm_config.model_config.max_model_len)
    return Fit(num_tokens, 1 - found.used_bytes / found.request_bytes)


def padding_advice(fits: dict[str, Fit], preset_name: str) -> str | None:
    """What to say of a cache of which more than TOLD_PADDING is padding, or None.

    Args:
        fits: as `what_fits` returns.
        preset_name: the cache's own.
    """
    stored = fits.get("stored")
    if stored is None or stored.padding <= TOLD_PADDING:
        return None
    told = (
        f"vLLM pads this model's pages to one size: {stored.padding:.0%} of the cache holds nothing"
    )
    presets = {name: fit for name, fit in fits.items() if name in PRESETS}
    if not presets:
        return told
    least = min(presets, key=lambda name: presets[name].padding)
    most = max(presets, key=lambda name: presets[name].num_tokens)
    told += f"; least is wasted with {least} ({presets[least].padding:.0%})"
    if presets[most].num_tokens > stored.num_tokens and most != preset_name:
        told += f", most tokens fit with {most} ({presets[most].num_tokens:,})"
    return told
