# SPDX-License-Identifier: Apache-2.0
"""Layers with latent attention (MLA) on CPUs: vLLM's CPU_MLA with records in the place of latents.

vLLM expands latents to keys and values for a prompt's own tokens, which are read as computed, and
calls `forward_mqa` for every request with one new token, which reads records. Its CPU build
cuts no such prompt and caches no prefix, so a prompt never meets records.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any, ClassVar

import torch
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backends.mla.cpu_mla import CPUMLABackend, CPUMLAImpl
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_fibquant.codec.config import PRESETS
from vllm_fibquant.codec.latent import LatentCodec
from vllm_fibquant.engine import non_finite
from vllm_fibquant.engine.support import BACKEND_NAME, run_options
from vllm_fibquant.ops.latent import attend_latents, write_latents
from vllm_fibquant.options import Options


class FibQuantLatentImpl(CPUMLAImpl):
    """Latent attention of one layer over its pages of codes."""

    calibration: ClassVar[str] = "none"
    """As `FibQuantImpl.calibration`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.options = run_options(get_current_vllm_config())
        self.codec = LatentCodec.from_preset(
            self.options.preset, self.kv_lora_rank, self.qk_rope_head_dim
        )

    def do_kv_cache_update(
        self,
        kv_c_normed: torch.Tensor,
        k_pe: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        kv_cache_dtype: str,
        k_scale: torch.Tensor,
    ) -> None:
        """Encodes a step's latents `[num_tokens, kv_lora_rank]` and rotary keys
        `[num_tokens, 1, qk_rope_head_dim]` into uint8 `[num_blocks, block_size, record_bytes]`."""
        if kv_cache.numel() == 0:
            return
        count = write_latents(self.codec, kv_c_normed, k_pe.squeeze(1), kv_cache, slot_mapping)
        if count:
            non_finite.counter.add(count)

    def forward_mqa(
        self,
        q: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        kv_c_and_k_pe_cache: torch.Tensor,
        attn_metadata: Any,
        layer: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attends absorbed queries `[num_reqs, num_heads, kv_lora_rank + qk_rope_head_dim]`, one
        of each request, to its records."""
        query = torch.cat(q, dim=-1) if isinstance(q, tuple) else q
        decode = attn_metadata.decode
        out = attend_latents(
            self.codec,
            query,
            kv_c_and_k_pe_cache,
            decode.block_table,
            decode.seq_lens,
            self.scale,
        )
        return out, None


class FibQuantLatentBackend(CPUMLABackend):
    """`latent_backend_for` makes one subclass per set of options."""

    options: ClassVar[Options]
    codec: ClassVar[LatentCodec]

    supported_kv_cache_dtypes: ClassVar[list[Any]] = list(PRESETS)

    @staticmethod
    def get_name() -> str:
        return BACKEND_NAME

    @staticmethod
    def get_impl_cls() -> type[FibQuantLatentImpl]:
        return FibQuantLatentImpl

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return True  # `latent_problems` has asked for the codebook

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Replaces the dense content size by that of a record."""
        if spec.dtype != torch.uint8 or spec.state_content_bytes is not None:
            return spec
        return replace(spec, state_content_bytes=cls.codec.record_bytes)


@functools.cache
def latent_backend_for(
    options: Options, latent_dim: int, rotary_dim: int
) -> type[FibQuantLatentBackend]:
    """The backend class of `options`; the same options give the same class."""
    name = f"FibQuantLatentBackend_{options.preset.name}_{options.digest}"
    codec = LatentCodec.from_preset(options.preset, latent_dim, rotary_dim)
    fields = {"options": options, "codec": codec, "__module__": __name__}
    return type(name, (FibQuantLatentBackend,), fields)
