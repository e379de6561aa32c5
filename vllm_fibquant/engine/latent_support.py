# SPDX-License-Identifier: Apache-2.0
"""Which models with latent attention (MLA) and which settings of theirs are served: docs/mla.md."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_fibquant.codec.codebook import load_codebook
from vllm_fibquant.ops.latent import unsupported_dims
from vllm_fibquant.options import Options

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_fibquant.engine.latent import FibQuantLatentImpl

NO_COPIES = "latent attention keeps none; a prompt's own tokens are read as computed"
UNMEASURED = "latents are not measured yet"


def is_latent(vllm_config: VllmConfig) -> bool:
    """Whether a model's layers have latent attention."""
    return vllm_config.model_config is not None and vllm_config.model_config.use_mla


def latent_layers(vllm_config: VllmConfig) -> dict[str, FibQuantLatentImpl]:
    """The layers of this process that store codes of latents, by name; none for other models."""
    if not is_latent(vllm_config):
        return {}
    from vllm.config import get_layers_from_vllm_config
    from vllm.model_executor.layers.attention.mla_attention import MLAAttention

    from vllm_fibquant.engine.latent import FibQuantLatentImpl

    layers = get_layers_from_vllm_config(vllm_config, MLAAttention)
    impls = {name: layer.impl for name, layer in layers.items()}
    return {name: impl for name, impl in impls.items() if isinstance(impl, FibQuantLatentImpl)}


def latent_dims(vllm_config: VllmConfig) -> tuple[int, int]:
    """Coordinates of a model's latents and of its rotary keys."""
    config = vllm_config.model_config.hf_text_config
    return config.kv_lora_rank, config.qk_rope_head_dim


def latent_problems(vllm_config: VllmConfig, options: Options) -> list[str]:
    """Every reason why latents cannot be stored as this configuration asks."""
    model, cache = vllm_config.model_config, vllm_config.cache_config
    other = "use --kv-cache-dtype auto for this model"
    if vllm_config.device_config.device_type != "cpu":
        return [
            "attention: must be of keys and values on a GPU, got latent attention (MLA), of which "
            f"there is no GPU kernel; {other}"
        ]
    left_out = "must be left out with latent attention; leave it out"
    speculation = vllm_config.speculative_config
    found = [
        (
            getattr(model.hf_text_config, "index_topk", None) is not None,
            f"attention: must be dense, got sparse attention to latents; {other}",
        ),
        (
            model.is_hybrid,
            f"layers: must all be latent attention, got {model.architecture}; {other}",
        ),
        (
            _takes_amx(vllm_config),
            "--attention-backend: must be CPU_MLA on a processor with AMX, where vLLM else cuts "
            "prompts and reads the first part from dense pages; give --attention-backend CPU_MLA",
        ),
        (
            options.prefill != "raw" or options.recent_window > 0,
            "mode: must be left out with latent attention, whose prompts vLLM reads as computed "
            'and which has no copies; leave out mode, recent_window and "prefill": "codes"',
        ),
        (options.calibrate != "none", f"calibrate: must be none, {UNMEASURED}; leave it out"),
        (options.retain is not None, f"retain: {left_out}"),
        (options.monitor is not None, f"monitor: {left_out}"),
        (bool(options.layers), f"layers: {left_out}"),
        (
            bool(cache.kv_cache_dtype_skip_layers),
            "--kv-cache-dtype-skip-layers: must be empty with latent attention; leave it out",
        ),
        (
            speculation is not None,
            "speculative decoding: must be off with latent attention, whose records are read for "
            "one new token of a request; leave --speculative-config out",
        ),
        (
            vllm_config.kv_transfer_config is not None or cache.kv_offloading_size is not None,
            "KV connectors and offloading: must be off with latent attention; leave them out",
        ),
    ]  # fmt: skip
    problems = [told for is_so, told in found if is_so]
    if told := unsupported_dims(*latent_dims(vllm_config)):
        problems.append(told)
    try:
        load_codebook(options.preset.value, latent_dims(vllm_config)[0])
    except (ValueError, OSError) as error:
        problems.append(str(error))
    return problems


def _takes_amx(vllm_config: VllmConfig) -> bool:
    """Whether vLLM would take its backend for AMX: not if it is told to take the other."""
    asked = vllm_config.attention_config.backend
    is_told = asked is not None and asked.name == "CPU_MLA"
    return torch.cpu._is_amx_tile_supported() and not is_told
