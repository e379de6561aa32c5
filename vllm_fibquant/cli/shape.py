# SPDX-License-Identifier: Apache-2.0
"""What a KV cache's size depends on, read from a model's configuration."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

DEFAULT_CONTEXT = 2048
"""Tokens of a request to a model that names no maximum."""

STATE_LAYERS = {"mamba", "linear_attention", "conv"}
STATE_FIELDS = ("mamba_", "n_mamba", "linear_", "ssm_", "conv_L_cache")
"""What configurations of models with such layers have, by beginnings of names."""

POOLING = re.compile(
    "(Classification|RewardModeling|TextEncoding|(?<!Chat|Head|Omni)(?<!LM)(?<!vox)(?<!Audio)Model)$"
)
"""Names of architectures that generate nothing, as vLLM tells them."""


@dataclass(frozen=True)
class ModelShape:
    """What a KV cache's size depends on.

    Attributes:
        windows: per layer that has a cache of its own, its sliding window, or 0 for full attention.
        heads: per layer its KV heads and head_dim, where they differ; else empty.
        num_states: layers that keep a state of one size beside these.
        readers: of each layer that has no cache of its own, the number of the layer whose it reads.
    """

    name: str
    head_dim: int
    num_kv_heads: int
    windows: tuple[int, ...]
    max_context: int
    heads: tuple[tuple[int, int], ...] = ()
    num_states: int = 0
    readers: tuple[int, ...] = ()

    def layer_heads(self, index: int) -> tuple[int, int]:
        """KV heads and head_dim of a layer."""
        return self.heads[index] if self.heads else (self.num_kv_heads, self.head_dim)

    @property
    def head_dims(self) -> tuple[int, ...]:
        """Every head_dim of a layer, in order."""
        return tuple(sorted({self.layer_heads(i)[1] for i in range(len(self.windows))}))


def read_config(model: str) -> dict[str, Any]:
    """A model's configuration, from its directory or Hugging Face name: that of its text.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise ValueError(f"plan: needs the package transformers ({error}); install it") from error
    try:
        config = AutoConfig.from_pretrained(model).to_dict()
    except (OSError, ValueError, ArithmeticError, TypeError) as error:  # the last: of its numbers
        raise ValueError(
            f"plan: model must be a directory with a config.json or a name that can be fetched, "
            f"got {model!r}; transformers says: {error}; see that its numbers are above 0"
        ) from error
    return text_of(config)


def text_of(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a model's text, with the architectures of the whole model."""
    text = config.get("text_config")
    return {**text, "architectures": config.get("architectures")} if text else config


def max_context(config: dict[str, Any]) -> int:
    """Tokens of a request that a model allows."""
    return config.get("max_position_embeddings") or DEFAULT_CONTEXT


def keeps_states(config: dict[str, Any]) -> bool:
    """Whether layers of a model keep a state of one size: Mamba, linear attention, convolutions."""
    kinds = set(config.get("layer_types") or ())
    return bool(kinds & STATE_LAYERS) or any(name.startswith(STATE_FIELDS) for name in config)


def has_latents(config: dict[str, Any]) -> bool:
    """Whether a token's cache is one latent vector (MLA)."""
    return bool(config.get("kv_lora_rank"))


def needs_vllm(config: dict[str, Any]) -> bool:
    """Whether vLLM alone knows how large a model's cache is."""
    return keeps_states(config) or has_latents(config) or bool(config.get("attention_chunk_size"))


def shape_of(name: str, config: dict[str, Any]) -> ModelShape:
    """The shape that the configuration of a model's text describes, one that does not need vLLM.

    Raises:
        ValueError: naming what is missing or not served.
    """
    config = text_of(config)
    other = "use --kv-cache-dtype auto"
    if refused := refusals(config):
        raise ValueError(f"plan: {name} must be a model that is served; {refused[0]}; {other}")
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
    windows, readers = _caches(windows[:num_layers], config.get("num_kv_shared_layers") or 0)
    return ModelShape(
        name=name,
        head_dim=config.get("head_dim") or config["hidden_size"] // num_q_heads,
        num_kv_heads=_num_kv_heads(config),
        windows=tuple(windows),
        max_context=max_context(config),
        heads=_layer_heads(config, windows),
        readers=readers,
    )


def _caches(windows: list[int], num_shared: int) -> tuple[list[int], tuple[int, ...]]:
    """Windows of the layers that have a cache, and whose cache each of the last `num_shared` reads:
    that of the last layer before them with the same window."""
    owners, readers = windows[: len(windows) - num_shared], windows[len(windows) - num_shared :]
    last = {window: index for index, window in enumerate(owners)}
    return owners, tuple(last[window] for window in readers if window in last)


def refusals(config: dict[str, Any]) -> list[str]:
    """What a start refuses of a model, as far as the configuration of its text shows it."""
    head_dim, value_dim = config.get("head_dim"), config.get("v_head_dim")
    (architecture, *_) = config.get("architectures") or [""]
    has_alibi = config.get("alibi") or config.get("model_type") == "bloom"
    has_alibi = has_alibi or (config.get("attn_config") or {}).get("alibi")  # MPT's
    found: list[str | bool] = [
        bool(head_dim and value_dim and head_dim != value_dim and not has_latents(config))
        and f"its values must be as long as its keys, got {value_dim} and {head_dim}",
        bool(config.get("is_encoder_decoder"))
        and "it must be decoder-only, got an encoder-decoder model",
        bool(has_alibi or config.get("position_embedding_type") == "alibi")
        and "positions must be in the keys (such as RoPE), got ALiBi",
        bool(POOLING.search(architecture)) and f"it must generate, got {architecture}",
        config.get("model_type") == "falcon"
        and "its layers must take their cache's dtype from --kv-cache-dtype, which vLLM ignores "
        "for those of Falcon",
    ]
    return [told for told in found if isinstance(told, str)]


def _num_kv_heads(config: dict[str, Any]) -> int:
    """KV heads of a layer, in the spelling of most models or that of Falcon and GPT-BigCode."""
    if config.get("multi_query") and not config.get("new_decoder_architecture"):
        return 1
    given = config.get("num_key_value_heads") or config.get("num_kv_heads")
    return given or config["num_attention_heads"]


def _layer_heads(config: dict[str, Any], windows: list[int]) -> tuple[tuple[int, int], ...]:
    """KV heads and head_dim per layer, where a configuration has others for some layers.

    Two spellings: global_head_dim, of layers with full attention, and per_layer_config.
    """
    heads = _num_kv_heads(config)
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
