# SPDX-License-Identifier: Apache-2.0
"""What is asked of a configuration on a GPU beside what is asked everywhere (`support`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from vllm_fibquant.codec.codec import KVCodec
from vllm_fibquant.engine.head_dims import Row, features_on, head_dim_of, head_dim_problem
from vllm_fibquant.ops import cuda_tables, gpu

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_fibquant.options import Options


def gpu_rows(vllm_config: VllmConfig, options: Options) -> Iterator[Row]:
    """What GPUs need."""
    model = vllm_config.model_config
    yield (not _is_rocm(), "device", "an NVIDIA GPU", "an AMD GPU (ROCm)",
           "use --kv-cache-dtype auto for this model")  # fmt: skip
    yield (model is None or model.dtype != torch.float32, "dtype",
           "bfloat16 or float16 on a GPU, whose kernels multiply in float16", "float32",
           "give --dtype bfloat16")  # fmt: skip
    if not options.triton and (why := _why_triton(vllm_config, options)):
        yield triton_row(why)
    for feature, name, asked in (
        ("copies", "recent_window", options.recent_window),
        ("keep_first", "retain", options.retain),
        ("monitor", "monitor", options.monitor),
        # "auto" asks for no more than a device has.
        ("means", "calibrate", options.calibrate not in ("none", "auto") and options.calibrate),
        ("layers", "layers", dict(options.layers)),
    ):
        hint = 'use "mode": "exact" without it'
        is_met = not asked or feature in features_on(vllm_config)
        if name == "recent_window":
            hint = 'give "prefill": "raw", which GPUs have, in the place of "mode": "quality"'
            why = copies_problem(vllm_config) or gpu.why_no_maps(head_dim_of(vllm_config))
            hint = f"{why}; {hint}" if why else hint
            is_met = is_met and not (asked and copies_problem(vllm_config))
        if name in ("calibrate", "retain") and (why := gpu.why_no_maps(head_dim_of(vllm_config))):
            hint = f"{why}; leave it out"
        yield is_met, name, "left out on a GPU", asked, hint
    yield (not (options.monitor and vllm_config.parallel_config.use_ubatching), "monitor",
           "left out with microbatches on a GPU, one of which does not see what another writes",
           options.monitor, "leave it or --enable-dbo out")  # fmt: skip
    yield (options.first_tokens <= cuda_tables.TILE, "first_tokens",
           f"at most {cuda_tables.TILE} on a GPU", options.first_tokens, "give fewer")  # fmt: skip


def triton_row(why: str) -> Row:
    """A GPU that Triton's kernels would serve, for a reason, unasked."""
    return (False, "kernels", "the CUDA library's on a GPU",
            f"Triton's, which are slower than --kv-cache-dtype auto, because {why}",
            'use --kv-cache-dtype auto, or give "triton": true to be served by them all the same'
            )  # fmt: skip


def _why_triton(vllm_config: VllmConfig, options: Options) -> str | None:
    """Why the CUDA library cannot serve the model's layers, or None; asks no device."""
    why, head_dim = gpu.why_no_cuda_kernels(), head_dim_of(vllm_config)
    for preset in options.presets if head_dim else ():
        if not why and not head_dim_problem(preset, head_dim, "cuda"):
            why = gpu.why_no_cuda_kernels(KVCodec.from_preset(preset, head_dim))
    return why


def copies_problem(vllm_config: VllmConfig) -> str | None:
    """Why tokens cannot be copied on a GPU in this run, where a plan is carried out by all layers
    before the next one is made; or None."""
    if vllm_config.parallel_config.use_ubatching:
        return "with microbatches one plan of copies would overtake another"
    speculation = vllm_config.speculative_config
    if speculation is not None and speculation.method not in ("ngram", "suffix"):
        return f"a draft model ({speculation.method}) plans copies that the model's layers lack"
    return None


def _is_rocm() -> bool:
    """Whether vLLM runs on AMD GPUs, which it calls "cuda" as well."""
    from vllm.platforms import current_platform

    return current_platform.is_rocm()


def key_bias_problem(biased: dict[str, str], why: str | None) -> str:
    """Why a model whose layers `biased` have a bias on keys is not served on a GPU.

    Args:
        biased: what `key_bias.found_bias` says of each.
        why: what there is instead of kernels that read such keys.
    """
    first, told = next(iter(biased.items()))
    return (
        f"model: must have no bias on keys on a GPU, got {told} in {len(biased)} layers, the first "
        f"{first}; codes lose such keys unless their mean is subtracted, as the CUDA library "
        f"does, and {why}; or use --kv-cache-dtype auto for this model"
    )
