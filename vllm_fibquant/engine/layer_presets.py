# SPDX-License-Identifier: Apache-2.0
"""Presets for single layers, of as many bytes together as one preset for all of them.

What codes cost a model differs a hundredfold between its layers. So the model reads a short text
once for every layer and each of two presets, that layer alone attending to codes, in the way of the
fidelity gate. The two tell what the layer's keys cost and what its values cost; other rates cost
multiples of it (KEY_COST, VALUE_COST). Costs of layers about add up, so that the cheapest presets
for so many bytes are found exactly, one layer after another.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger

from vllm_fibquant import files
from vllm_fibquant.codec.codec import KVCodec
from vllm_fibquant.codec.config import PRESETS
from vllm_fibquant.codec.layout import preset_layout
from vllm_fibquant.engine import calibrate, gate, measure, reading
from vllm_fibquant.engine.layers import our_layers
from vllm_fibquant.keys.calibration import Calibration, cache_name, parse_calibration
from vllm_fibquant.keys.key_map import KeyMap
from vllm_fibquant.observe.loss import LayerReading, NextTokens
from vllm_fibquant.ops import Attend
from vllm_fibquant.options import Options

logger = init_logger(f"vllm.{__name__}")

NUM_TEXTS, NUM_TOKENS = 2, 768
"""Of the texts that keys are measured on: one of prose, one of code."""

KEY_COST = {1: 5.0, 2: 1.0, 3: 0.33, 4: 0.2, 5: 0.03}
VALUE_COST = {1: 4.2, 2: 1.0, 3: 0.22, 4: 0.1}
"""KL by bits a coordinate over that at 2, on SmolLM2-135M in mode quality (docs/evaluation.md)."""

LEAST = 0.02
"""Share of a layer's cost that its keys, and its values, have at least."""

EVEN, UNEVEN = "fibquant_2bit", "fibquant_k3v1"
"""What layers are measured with: keys and values of 2 bits; keys of 3 and values of 1."""


def bits_of(preset: str) -> tuple[int, int]:
    """Bits a coordinate of its keys and of its values."""
    return round(PRESETS[preset].key.rate), round(PRESETS[preset].value.rate)


def costs_of(even: float, uneven: float) -> dict[str, float]:
    """What every preset costs in a layer in which EVEN and UNEVEN cost so much."""
    key, value = KEY_COST[3], VALUE_COST[1]
    # even = k + v, uneven = key k + value v; neither side is for nothing.
    v = (uneven - key * even) / (value - key)
    v = min(max(v, LEAST * even), (1 - LEAST) * even)
    k = even - v
    rates = {name: bits_of(name) for name in PRESETS}
    return {name: KEY_COST[a] * k + VALUE_COST[b] * v for name, (a, b) in rates.items()}


def cheapest(
    costs: Sequence[Mapping[str, float]], sizes: Mapping[str, int], budget: int
) -> list[str]:
    """The preset of each layer, so that their costs add up to least and sizes to `budget` at most.

    Args:
        costs: of each layer, by preset.
        sizes: of each preset that may be chosen; the least of them, in every layer, must fit.
    """
    best: dict[int, tuple[float, tuple[str, ...]]] = {0: (0.0, ())}
    for index, of_layer in enumerate(costs):
        left = min(sizes.values()) * (len(costs) - index - 1)
        grown: dict[int, tuple[float, tuple[str, ...]]] = {}
        for used, (cost, chosen) in best.items():
            for name, size in sizes.items():
                total = used + size
                found = cost + of_layer[name], (*chosen, name)
                if total + left <= budget and (total not in grown or found < grown[total]):
                    grown[total] = found
        best = grown
    return list(min(best.values())[1])


def as_options(chosen: Sequence[str]) -> tuple[str, dict[str, str]]:
    """The preset for --kv-cache-dtype and the option `layers`, of each layer's preset in order."""
    names = sorted(set(chosen))
    base = max(names, key=chosen.count)
    return base, {_ranges(chosen, name): name for name in names if name != base}


def _ranges(chosen: Sequence[str], name: str) -> str:
    """Numbers of the layers with this preset, as in 0-1,29."""
    parts, begin = [], 0
    for found, run in itertools.groupby(chosen):
        end = begin + len(list(run))
        if found == name:
            parts.append(str(begin) if end == begin + 1 else f"{begin}-{end - 1}")
        begin = end
    return ",".join(parts)


@dataclass
class _Layer:
    """A layer as it would be with another preset (`loss.Layer`)."""

    options: Options
    codec: KVCodec
    attend: Attend
    num_kv_heads: int
    key_map: KeyMap | None


class _Reading(LayerReading):
    """Attends to codes or to what the model computed, and compares nothing."""

    def __call__(self, query, key, value, output):
        (self.from_codes if self.reads_codes else self.exact)(query, key, value, output)
        return output


class LayerCosts:
    """Measures what presets of layers cost a loaded model, in KL of next tokens.

    Args:
        model, vllm_config: of an engine in this process, on one rank.

    Attributes:
        num_layers, num_tokens: that are measured, and that are read.
    """

    def __init__(self, model: Any, vllm_config: VllmConfig) -> None:
        self._model, self._vllm_config = model, vllm_config
        layers = our_layers(vllm_config)
        self._layers = dict(sorted(layers.items(), key=lambda item: gate.number_of(item[0])))
        self.num_layers = len(layers)
        self._known = _calibration(model, vllm_config)
        self._made: dict[tuple[str, str], _Layer] = {}
        texts = measure.text_sequences(vllm_config.model_config).sequences[:NUM_TEXTS]
        device = next(model.parameters()).device
        self._texts = [torch.tensor(text[:NUM_TOKENS], device=device) for text in texts]
        self.num_tokens = sum(map(len, self._texts))
        self._exact = [self._read(text, {}) for text in self._texts]

    def __call__(self, presets: Mapping[int, str]) -> float:
        """Mean KL where these layers, by their place in the model, have codes of these presets."""
        total = NextTokens()
        for text, exact in zip(self._texts, self._exact, strict=True):
            with torch.inference_mode():
                gate.compare(self._model, exact, self._read(text, presets), text, total)
        return total.kl_sum / total.num_tokens

    def choose(self, sizes: Mapping[str, int], budget: int) -> list[str]:
        """The preset of each layer; see `cheapest`."""
        costs = []
        for place in range(len(self._layers)):
            even, uneven = self({place: EVEN}), self({place: UNEVEN})
            logger.info(
                "FibQuant layer %d of %d: KL %.5f with %s, %.5f with %s",
                place + 1, self.num_layers, even, EVEN, uneven, UNEVEN,
            )  # fmt: skip
            costs.append(costs_of(even, uneven))
        return cheapest(costs, sizes, budget)

    def _read(self, text: torch.Tensor, presets: Mapping[int, str]) -> torch.Tensor:
        stand_ins = {}
        for place, (name, impl) in enumerate(self._layers.items()):
            stand_ins[impl] = one = _Reading(self._as(name, presets.get(place, EVEN)), 0)
            one.reads_codes = place in presets
        config = self._vllm_config
        with reading.attending(self._model, config, stand_ins), torch.inference_mode():
            states = reading.read(
                reading.language_model(self._model), config, config.model_config, text[None]
            )
        if states is None:
            raise ValueError("LayerCosts: the engine must have one rank, got pipeline stages")
        return states

    def _as(self, name: str, preset: str) -> _Layer:
        made = self._made.get((name, preset))
        if made is None:
            impl, options = self._layers[name], self._layers[name].options.for_layer(preset)
            codec = KVCodec.from_preset(options.preset, impl.head_size)
            key_map = calibrate.key_map_of(
                self._known,
                name,
                impl,
                codec,
                options.transforms_keys,
                self._vllm_config.model_config,
            )
            made = _Layer(options, codec, impl.attend, impl.num_kv_heads, key_map)
            self._made[name, preset] = made
        return made


def _calibration(model: Any, vllm_config: VllmConfig) -> Calibration:
    """What this start has measured or read."""
    fingerprint = measure.model_fingerprint(model, vllm_config.model_config)
    path = files.find(cache_name(fingerprint))
    if path is None or not path.is_file():
        raise ValueError(
            "calibrate: --layers must have a cache that the measurement is kept in, got none; set "
            f"{files.CACHE_VARIABLE} to a folder that can be written"
        )
    return parse_calibration(path.read_bytes(), str(path))


def record_sizes(head_dim: int) -> dict[str, int]:
    """Bytes of a token and KV head, by preset."""
    names = (name for name in PRESETS if name != "fibquant")
    return {name: preset_layout(PRESETS[name], head_dim).record_bytes for name in names}
