# SPDX-License-Identifier: Apache-2.0
"""What a cache format does to keys and values, and which tokens it leaves as they are.

A format is a frozen dataclass: its `repr` is part of what a result is filed under.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from vllm_fibquant.codec.codebook import Codebook
from vllm_fibquant.codec.codec import KVCodec, VectorCodec
from vllm_fibquant.codec.config import CodeSpec, Preset
from vllm_fibquant.codec.layout import preset_layout
from vllm_fibquant.codec.rotation import make_rotation
from vllm_fibquant.options import Options

Layer = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Queries float32 `[num_q_heads, num_tokens, d]`, keys and values `[num_kv_heads, num_tokens, d]`,
all after the rotary embedding."""

Rotate = Callable[[torch.Tensor, bool], torch.Tensor]
"""Applies the rotary embedding to float32 `[..., num_tokens, d]`, or undoes it (True)."""


@dataclass(frozen=True)
class Format:
    """Keeps everything as it is; base of all formats.

    A query at position p reads the key of a token at j uncompressed where j >= key_start(p) or
    j < num_first, and as `roundtrip` returns it elsewhere; values likewise.
    """

    num_first: ClassVar[int] = 0

    def bits(self, head_dim: int, context: int) -> float:
        """Stored bits per coordinate, keys and values together and all included, of a request of
        `context` tokens."""
        return 32.0

    def fit(self, layers: Sequence[Layer], rotations: Sequence[Rotate]) -> None:
        """Sees keys and values of the calibration text, and how each layer turns keys; by default
        unused."""

    def roundtrip(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor, rotate: Rotate
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What a cache returns: float32 `[num_kv_heads, num_tokens, d]` in and out.

        No token's result may depend on a later token, unless every query that reads it comes
        after both.
        """
        return keys, values

    def key_start(self, positions: torch.Tensor) -> torch.Tensor:
        """int64 `[num_queries]` positions to the first of the newest keys read uncompressed."""
        return positions + 1

    def value_start(self, positions: torch.Tensor) -> torch.Tensor:
        """As `key_start`, of values."""
        return self.key_start(positions)


@dataclass(frozen=True)
class Rounded(Format):
    """Another float type with a scale of 1, saturating: bfloat16, or e4m3 as vLLM's fp8 cache."""

    dtype: str

    def bits(self, head_dim, context):
        return 8.0 * getattr(torch, self.dtype).itemsize

    def roundtrip(self, layer, keys, values, rotate):
        dtype = getattr(torch, self.dtype)
        most = torch.finfo(dtype).max
        return tuple(x.clamp(-most, most).to(dtype).float() for x in (keys, values))


@dataclass(frozen=True)
class FibQuant(Format):
    """Our codes, by the codec that is the kernels' oracle.

    Attributes:
        preset: the codes.
        window, first: newest and first tokens that are also kept in 16 bits; read as they were.
        step: tokens of a step, which read each other uncompressed, or 0 when they read codes.
            The window lies before the step, as in the engine.
    """

    preset: Preset
    window: int = 0
    first: int = 0
    step: int = 0

    @classmethod
    def from_options(cls, options: Options, step: int) -> FibQuant:
        """What the engine does with these options when it prefills `step` tokens at once.

        Raises:
            ValueError: layers have presets of their own.
        """
        if options.layers:
            raise ValueError(
                f"FibQuant: layers must have one preset, got {options.layers}; leave layers out"
            )
        step = step if options.prefill == "raw" else 0
        return cls(options.preset, options.recent_window, options.num_copied_first, step)

    @property
    def num_first(self) -> int:  # type: ignore[override]
        return self.first

    def bits(self, head_dim, context):
        copies = min(self.window + self.first, context)
        return preset_layout(self.preset, head_dim).effective_rate + 16 * copies / context

    def codec(self, head_dim: int) -> KVCodec:
        return KVCodec.from_preset(self.preset, head_dim)

    def roundtrip(self, layer, keys, values, rotate):
        codec = self.codec(keys.shape[-1])
        return tuple(
            side.decode(*side.encode(x)) for side, x in ((codec.key, keys), (codec.value, values))
        )

    def key_start(self, positions):
        if not self.step:
            return positions + 1
        return (positions // self.step * self.step - self.window).clamp(min=0)


@dataclass(frozen=True)
class Perturbed(FibQuant):
    """With keys and values changed by a millionth before they are coded.

    Two computations that agree to rounding, such as engine and simulation, may differ by as much
    as this one differs from `FibQuant`: a coordinate on the border of two cells decides for
    another code, which all later tokens and layers see.
    """

    seed: int = 0

    def roundtrip(self, layer, keys, values, rotate):
        generator = torch.Generator().manual_seed(1000 * self.seed + layer)
        keys, values = (
            x * (1 + 1e-6 * torch.randn(x.shape, generator=generator)) for x in (keys, values)
        )
        return super().roundtrip(layer, keys, values, rotate)


class BuiltFibQuant(FibQuant):
    """With codebooks made on the spot, for codes that do not ship; kept in memory alone."""

    def codec(self, head_dim):
        return _built_codec(self.preset, head_dim)


@functools.lru_cache(maxsize=4)
def _built_codec(preset: Preset, head_dim: int) -> KVCodec:
    rotation = make_rotation(head_dim, preset.rotation_seed)
    key, value = (
        VectorCodec(spec, head_dim, _built_codebook(replace(spec, gain="norm"), head_dim), rotation)
        for spec in (preset.key, preset.value)
    )
    return KVCodec(key, value, preset)


@functools.lru_cache(maxsize=4)
def _built_codebook(spec: CodeSpec, head_dim: int) -> Codebook:
    """One Lloyd run: within 0.02 dB of several at these rates."""
    from vllm_fibquant.codec.codebook_build import BuildOptions, build_codebook

    return build_codebook(spec, head_dim, BuildOptions(restarts=1, samples=1 << 17, iterations=15))[
        0
    ]
