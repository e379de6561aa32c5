# SPDX-License-Identifier: Apache-2.0
"""What a KV cache's size depends on, read from a model's configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

DEFAULT_CONTEXT = 2048
"""Tokens of a request to a model that names no maximum."""


@dataclass(frozen=True)
class ModelShape:
    """What a KV cache's size depends on.

    Attributes:
        windows: per layer that has a cache of its own, its sliding window, or 0 for full attention.
        heads: per layer its KV heads and head_dim, where they differ; else empty.
    """

    name: str
    head_dim: int
    num_kv_heads: int
    windows: tuple[int, ...]
    max_context: int
    heads: tuple[tuple[int, int], ...] = ()

    def layer_heads(self, index: int) -> tuple[int, int]:
        """KV heads and head_dim of a layer."""
        return self.heads[index] if self.heads else (self.num_kv_heads, self.head_dim)

    @property
    def head_dims(self) -> tuple[int, ...]:
        """Every head_dim of a layer, in order."""
        return tuple(sorted({self.layer_heads(i)[1] for i in range(len(self.windows))}))


def load_shape(model: str) -> ModelShape:
    """The shape of a model, from its directory or Hugging Face name.

    Raises:
        ValueError: it cannot be read, or its cache is of a kind that is not served.
    """
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise ValueError(f"plan: needs the package transformers ({error}); install it") from error
    try:
        config = AutoConfig.from_pretrained(model).to_dict()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"plan: model must be a directory with a config.json or a name that can be fetched, "
            f"got {model!r}; transformers says: {error}"
        ) from error
    return shape_of(model, config)


def shape_of(name: str, config: dict[str, Any]) -> ModelShape:
    """The shape a Hugging Face configuration describes.

    Raises:
        ValueError: naming what is missing or not served.
    """
    config = config.get("text_config") or config
    other = "vllm-fibquant serves standard attention only; use --kv-cache-dtype auto"
    if config.get("kv_lora_rank"):
        raise ValueError(
            f"plan: {name} must not use multi-head latent attention (MLA), "
            f"got kv_lora_rank {config['kv_lora_rank']}; {other}"
        )
    if num_shared := config.get("num_kv_shared_layers"):
        raise ValueError(
            f"plan: layers of {name} must each have a KV cache, got {num_shared} "
            f"that share another's; {other}"
        )
    needed = ("num_hidden_layers", "num_attention_heads", "hidden_size")
    missing = [field for field in needed if not config.get(field)]
    if missing:
        raise ValueError(
            f"plan: config of {name} must have {', '.join(missing)}, got none; {other}"
        )
    num_layers = config["num_hidden_layers"]
    num_q_heads = config["num_attention_heads"]

    window = config.get("sliding_window") or 0
    if not config.get("use_sliding_window", True):
        window = 0
    layer_types = config.get("layer_types")
    if layer_types:
        unknown = set(layer_types) - {"full_attention", "sliding_attention", "attention"}
        if unknown:
            raise ValueError(
                f"plan: layers of {name} must be full_attention or sliding_attention, "
                f"got {', '.join(sorted(unknown))}; {other}"
            )
        windows = [window if kind == "sliding_attention" else 0 for kind in layer_types]
    else:
        windows = [window] * num_layers
    return ModelShape(
        name=name,
        head_dim=config.get("head_dim") or config["hidden_size"] // num_q_heads,
        num_kv_heads=config.get("num_key_value_heads") or num_q_heads,
        windows=tuple(windows[:num_layers]),
        max_context=config.get("max_position_embeddings") or DEFAULT_CONTEXT,
        heads=_layer_heads(config, windows),
    )


def _layer_heads(config: dict[str, Any], windows: list[int]) -> tuple[tuple[int, int], ...]:
    """KV heads and head_dim per layer, where a configuration has others for some layers.

    Two spellings: global_head_dim, of layers with full attention, and per_layer_config.
    """
    heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    global_dim = config.get("global_head_dim") or head_dim
    global_heads = heads
    if config.get("attention_k_eq_v"):
        global_heads = config.get("num_global_key_value_heads") or heads
    layers = []
    for index, window in enumerate(windows):
        own = (config.get("per_layer_config") or {}).get(str(index), {})
        layers.append(
            (
                own.get("num_key_value_heads", heads if window else global_heads),
                own.get("head_dim", head_dim if window else global_dim),
            )
        )
    return tuple(layers) if set(layers) != {(heads, head_dim)} else ()
