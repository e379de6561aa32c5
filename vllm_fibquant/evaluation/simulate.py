# SPDX-License-Identifier: Apache-2.0
"""The model in plain PyTorch, float32, whose attention reads what a cache format returns.

One forward pass scores a whole text: every query reads each earlier token, and its own, as it
would if the tokens before it had been cached and it came next. No engine and no pages: what is
simulated is what a format does to the numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from vllm_fibquant.evaluation.formats import Format, Layer

_QUERIES = 256  # queries of one block of scores: bounds what a window has to read twice


def rotary(x: torch.Tensor, base: float, inverse: bool = False) -> torch.Tensor:
    """Rotary embedding of tokens at positions 0, 1, ...; pair i is coordinates i and i + d/2.

    Args:
        x: float32 `[..., num_tokens, d]`.
        base: the model's rope_theta.
        inverse: undo it.
    """
    half = x.shape[-1] // 2
    frequency = base ** (-torch.arange(half, dtype=torch.float32) / half)
    angle = torch.arange(x.shape[-2], dtype=torch.float32).unsqueeze(-1) * frequency
    cos, sin = angle.cos(), -angle.sin() if inverse else angle.sin()
    low, high = x[..., :half], x[..., half:]
    return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)


def attend(
    query: torch.Tensor,
    raw: tuple[torch.Tensor, torch.Tensor],
    coded: tuple[torch.Tensor, torch.Tensor],
    scale: float,
    cache_format: Format | None = None,
    window: int = 0,
) -> torch.Tensor:
    """Causal attention that reads each token from one of two sets of keys and values.

    Args:
        query: float32 `[num_q_heads, num_tokens, d]`.
        raw, coded: keys and values, float32 `[num_kv_heads, num_tokens, d]` each.
        scale: of the scores.
        cache_format: says which are read raw (see `Format`); None: all are coded.
        window: newest tokens, its own included, that a query reads at all; 0: every one.

    Returns:
        float32 `[num_q_heads, num_tokens, d]`.
    """
    num_kv_heads, num_tokens, _ = coded[0].shape
    positions = torch.arange(num_tokens)
    num_first = cache_format.num_first if cache_format else 0
    key_start = cache_format.key_start(positions) if cache_format else positions + 1
    value_start = cache_format.value_start(positions) if cache_format else positions + 1
    window = window or num_tokens
    plain = num_first == 0 and window >= num_tokens
    if plain and (torch.minimum(key_start, value_start) > positions).all():
        keys, values = (x.repeat_interleave(query.shape[0] // num_kv_heads, 0) for x in coded)
        return scaled_dot_product_attention(query, keys, values, is_causal=True, scale=scale)

    grouped = query.unflatten(0, (num_kv_heads, -1)) * scale  # [kv heads, group, tokens, d]
    outputs = []
    for begin in range(0, num_tokens, _QUERIES):
        end = min(begin + _QUERIES, num_tokens)
        p, j = positions[begin:end].unsqueeze(-1), positions[:end]
        q = grouped[:, :, begin:end].flatten(1, 2)
        group = (-1, end - begin)
        # Tokens that some query of this block reads raw; scored both ways.
        oldest = int(torch.minimum(key_start[begin:end], value_start[begin:end]).min())
        near = torch.cat([j[: min(num_first, oldest)], j[oldest:end]])
        raw_key = (near >= key_start[begin:end].unsqueeze(-1)) | (near < num_first)
        raw_value = (near >= value_start[begin:end].unsqueeze(-1)) | (near < num_first)

        scores = (q @ coded[0][:, :end].mT).unflatten(1, group)
        raw_scores = (q @ raw[0][:, near].mT).unflatten(1, group)
        scores[..., near] = torch.where(raw_key, raw_scores, scores[..., near])
        weights = scores.masked_fill_((j > p) | (j <= p - window), -torch.inf).softmax(-1)
        out = weights.flatten(1, 2) @ coded[1][:, :end]
        swapped = (weights[..., near] * raw_value).flatten(1, 2)
        out += swapped @ (raw[1][:, near] - coded[1][:, near])
        outputs.append(out.unflatten(1, group).flatten(0, 1))
    return torch.cat(outputs, 1)


class Simulator:
    """A model whose attention can be given a cache format.

    Attributes:
        model: in float32.
        rotations: of every layer, how its keys are turned (`formats.Rotate`).
        windows, scales: of every layer's attention, known once it has run; a window of 0 is none.
    """

    def __init__(self, folder: str) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        config = self.model.config
        self.rotations = [
            functools.partial(_rotate, base=_rope_base(config, layer))
            for layer in range(config.num_hidden_layers)
        ]
        self.windows = [0] * config.num_hidden_layers
        self.scales = [0.0] * config.num_hidden_layers
        self._attend: Callable[..., torch.Tensor] | None = None
        name = f"fibquant_simulator_{id(self)}"
        ALL_ATTENTION_FUNCTIONS.register(name, self._attention)
        config._attn_implementation = name

    def _attention(self, module, query, key, value, mask, scaling=None, **given: Any):
        """What transformers calls: `[batch, heads, tokens, d]` in, heads and tokens swapped out."""
        for name in ("softcap", "s_aux"):
            if given.get(name) is not None:
                raise ValueError(
                    f"Simulator: the model's attention must be plain, got {name} "
                    f"{given[name]!r}; measure its engine rows alone"
                )
        layer = module.layer_idx
        self.scales[layer] = scaling or query.shape[-1] ** -0.5
        self.windows[layer] = given.get("sliding_window") or 0
        read = self._attend or self._uncompressed
        return read(layer, query[0], key[0], value[0]).unsqueeze(0).transpose(1, 2), None

    def _uncompressed(self, layer, query, key, value):
        return self.attend(layer, query, (key, value), (key, value))

    def attend(self, layer, query, raw, coded, cache_format=None) -> torch.Tensor:
        """`attend` with a layer's scale and window."""
        return attend(query, raw, coded, self.scales[layer], cache_format, self.windows[layer])

    @torch.no_grad()
    def _forward(self, tokens: list[int], attend: Callable[..., torch.Tensor] | None):
        self._attend = attend
        try:
            return self.model.model(torch.tensor([tokens]), use_cache=False).last_hidden_state[0]
        finally:
            self._attend = None

    def hidden(self, tokens: list[int], cache_format: Format | None = None) -> torch.Tensor:
        """What the model's head reads, float32 `[num_tokens, hidden_size]`; None: uncompressed."""
        if cache_format is None:
            return self._forward(tokens, None)

        def read(layer, query, key, value):
            coded = cache_format.roundtrip(layer, key, value, self.rotations[layer])
            return self.attend(layer, query, (key, value), coded, cache_format)

        return self._forward(tokens, read)

    @torch.no_grad()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 `[n, hidden_size]` to `[n, vocabulary]`."""
        logits = self.model.lm_head(hidden)
        cap = getattr(self.model.config, "final_logit_softcapping", None)
        return cap * torch.tanh(logits / cap) if cap else logits

    @functools.lru_cache(maxsize=2)  # noqa: B019 - a simulator lives as long as the process
    def capture(self, tokens: tuple[int, ...]) -> list[Layer]:
        """Queries, keys and values of every layer of the uncompressed model."""
        layers: list[Layer] = []

        def keep(layer, query, key, value):
            layers.append((query, key, value))
            return self._uncompressed(layer, query, key, value)

        self._forward(list(tokens), keep)
        return layers


def _rotate(x: torch.Tensor, inverse: bool, base: float) -> torch.Tensor:
    return rotary(x, base, inverse)


def _rope_base(config: Any, layer: int) -> float:
    """The base of a layer's rotary embedding, a plain one over all coordinates.

    Raises:
        ValueError: the model has another one.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    if "rope_theta" not in rope and "rope_type" not in rope:  # of each type of layer
        rope = rope.get((getattr(config, "layer_types", None) or [""] * (layer + 1))[layer]) or {}
    kind = rope.get("rope_type", "default")
    part = rope.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1
    if kind != "default" or part != 1 or "rope_theta" not in rope:
        raise ValueError(
            f"Simulator: the model must have a plain rotary embedding, got {rope}; "
            "measure its engine rows alone"
        )
    return float(rope["rope_theta"])
