# SPDX-License-Identifier: Apache-2.0
"""Whether vectors of a head_dim can be stored, by the model's layers and by its draft's, and what
kernels can do with them."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from vllm_fibquant import ops
from vllm_fibquant.codec.codebook import load_codebook
from vllm_fibquant.codec.codec import KVCodec
from vllm_fibquant.codec.config import HEAD_DIMS, PRESETS, Preset
from vllm_fibquant.ops import gpu
from vllm_fibquant.ops.cpu_library import unsupported_head_dim
from vllm_fibquant.ops.features import features_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_fibquant.options import Options

Row = tuple[bool, str, str, Any, str]
"""What is required of a run: whether it is met, what it is about, what that must be, what it is,
and a remedy."""


def problem_of(row: Row) -> str:
    """The sentence of a requirement that is not met."""
    _, what, must, got, remedy = row
    return f"{what}: must be {must}, got {got}; {remedy}"


def features_on(vllm_config: VllmConfig) -> frozenset[str]:
    """The features (`ops.features.FEATURES`) of the kernels that would serve this run."""
    if vllm_config.device_config.device_type == "cpu":
        return features_of("cpu")
    return gpu.features(head_dim_of(vllm_config))


def head_dim_of(vllm_config: VllmConfig) -> int:
    """The model's head_dim, 0 where there is none to be told."""
    model = vllm_config.model_config
    return 0 if model is None or model.use_mla else model.get_head_size()


def head_dim_problem(preset: Preset, head_dim: int, device_type: str = "cpu") -> str | None:
    """Why vectors of `head_dim` cannot be stored on a device, or None. Loads the codebooks.

    What building a codebook would not help comes first; then every codebook that is missing, so
    that whoever follows the advice is served.
    """
    specs = list(dict.fromkeys((preset.key, preset.value)))
    try:
        for spec in specs:
            spec.num_subvecs(head_dim)
    except ValueError as error:
        return str(error)
    if device_type == "cpu" and (reason := unsupported_head_dim(head_dim)):
        return f"{reason}; use --kv-cache-dtype auto for this model"
    problems = []
    for spec in specs:
        try:
            load_codebook(spec, head_dim)
        except (ValueError, OSError) as error:
            problems.append(str(error))
    if problems:
        return "; and ".join(dict.fromkeys(problems))
    return ops.unsupported_codec(KVCodec.from_preset(preset, head_dim), device_type)


def refused_presets(head_dims: Collection[int], device_type: str) -> dict[str, str]:
    """Presets that a start refuses for layers of these head_dims, and why: for those that ship
    none, unless they are beyond a GPU's kernels."""
    on_gpu = device_type != "cpu"
    odd = sorted(d for d in head_dims if d not in HEAD_DIMS or (on_gpu and d > gpu.MAX_HEAD_DIM))
    found = {
        name: [told for d in odd if (told := head_dim_problem(preset, d, device_type))]
        for name, preset in PRESETS.items()
    }
    return {name: told[0] for name, told in found.items() if told}


def draft_problems(vllm_config: VllmConfig, options: Options, device_type: str) -> list[str]:
    """Why the cache of a speculative draft model cannot be stored as the target's is.

    vLLM gives the draft the target's --kv-cache-dtype, unless --speculative-config names another,
    and builds it when the target is loaded: said here, it is said before.
    """
    speculation, model = vllm_config.speculative_config, vllm_config.model_config
    draft = getattr(speculation, "draft_model_config", None)
    if draft is None or draft is model or draft.use_mla or not draft.get_head_size():
        return []  # the last: heads without attention (Medusa)
    name = speculation.kv_cache_dtype
    presets = options.presets if name is None else [PRESETS[name]] if name in PRESETS else []
    found = (head_dim_problem(preset, draft.get_head_size(), device_type) for preset in presets)
    return [
        f"draft model {draft.model}: {problem}; or keep the draft's own cache in 16 bits, with "
        '"kv_cache_dtype": "auto" in --speculative-config'
        for problem in dict.fromkeys(found)
        if problem
    ]
