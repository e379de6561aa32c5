# SPDX-License-Identifier: Apache-2.0
"""Finds attention layers whose key projection has a bias.

Such keys have a large constant part. Stored without it being taken out first, as `calibrate` does,
the code spends its bits on the constant, and what tells tokens apart is lost.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

PROJECTIONS = ("qkv_proj", "gqkv_proj", "qkv", "query_key_value", "Wqkv", "c_attn", "k_proj")
"""What vLLM's models call the projection that makes keys (read in 0.32.0's model files)."""


def biased_layers(model: torch.nn.Module, layer_names: Iterable[str]) -> list[str]:
    """The attention layers, of those named, whose keys have a bias that is not zero.

    Args:
        model: as loaded.
        layer_names: names of attention layers; each one's projection is beside it in its parent.
    """
    modules = dict(model.named_modules())
    found = []
    for name in layer_names:
        parent = modules.get(name.rpartition(".")[0])
        for projection in PROJECTIONS:
            bias = _key_bias(getattr(parent, projection, None))
            if bias is not None and bool((bias != 0).any()):
                found.append(name)
                break
    return found


def _key_bias(projection: torch.nn.Module | None) -> torch.Tensor | None:
    """The part of a projection's bias that is added to keys; all of it where that is not known."""
    bias = getattr(projection, "bias", None)
    if bias is None:
        return None
    sizes = (getattr(projection, name, None) for name in ("num_heads", "num_kv_heads", "head_size"))
    num_heads, num_kv_heads, head_size = sizes
    if num_heads is None or num_kv_heads is None or head_size is None:
        return bias
    begin = num_heads * head_size
    return bias[begin : begin + num_kv_heads * head_size]
