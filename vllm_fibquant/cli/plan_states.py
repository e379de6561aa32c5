# SPDX-License-Identifier: Apache-2.0
"""The plan of a model whose layers are not all attention to keys and values: vLLM itself is asked
(engine/planned)."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from vllm_fibquant.cli.plan import DENSE_BYTES, Capacity, effective_rate
from vllm_fibquant.cli.shape import ModelShape, has_latents, read_config
from vllm_fibquant.codec.config import PRESETS

if TYPE_CHECKING:
    from vllm_fibquant.engine.planned import Planned

DTYPE_NAMES = {"bf16": "auto", "fp8": "fp8"}
"""What vLLM calls the uncompressed caches."""


def plan_states(
    model: str,
    max_context: int,
    memory_bytes: int,
    context: int,
    options: dict,
    **settings: Any,
) -> tuple[ModelShape, list[Capacity]]:
    """What fits with bf16, fp8 and every preset that is not refused; and the model's shape.

    Args:
        model: directory with a config.json, or a Hugging Face name.
        max_context: tokens of a request that the model allows.
        memory_bytes: of every worker's cache.
        context: tokens of one request.
        options: ours, as under additional_config["fibquant"].
        settings: further arguments of vLLM's `EngineArgs`.

    Raises:
        ValueError: vLLM is missing, or refuses the model with every preset.
    """
    try:
        from vllm_fibquant.engine.planned import planned
    except ImportError as error:
        raise ValueError(
            f"plan: layers of {model} must all be attention to keys and values where vLLM is "
            f"missing ({error}), got others; install vLLM, which knows how large their cache is"
        ) from error

    # vLLM's CPU build keeps latents in 16 bits alone.
    is_latent = has_latents(read_config(model))
    found: dict[str, Planned] = {}
    refusals = {}
    for name in ["bf16", *PRESETS] if is_latent else [*DENSE_BYTES, *PRESETS]:
        try:
            found[name] = planned(
                model,
                DTYPE_NAMES.get(name, name),
                memory_bytes,
                options,
                max_model_len=context,
                **settings,
            )
        except ValueError as error:
            refusals[name] = reasons(str(error))
    if not found.keys() & PRESETS.keys() or "bf16" not in found:
        told = list(dict.fromkeys(told for name in refusals for told in refusals[name]))
        raise ValueError(f"plan: {model} must be a model that is served; " + "; ".join(told))
    layers = found["bf16"].layers
    heads = tuple((layer.num_kv_heads, layer.head_size) for layer in layers)
    shape = ModelShape(
        model,
        layers[0].head_size,
        layers[0].num_kv_heads,
        tuple(getattr(layer, "sliding_window", None) or 0 for layer in layers),
        max_context,
        heads if len(set(heads)) > 1 else (),
        found["bf16"].num_states,
    )
    return shape, [
        _capacity(name, plan, context, 1 if is_latent else 2) for name, plan in found.items()
    ]


def reasons(text: str) -> list[str]:
    """The reasons in a refusal, without what pydantic puts around them; of vLLM's own, its text."""
    text = re.sub(r" \[type=value_error.*", "", text, flags=re.DOTALL)
    _, is_refusal, told = text.partition("cannot be used here:")
    if not is_refusal:
        return [text.strip()]
    return [reason.strip() for reason in told.split("\n  - ") if reason.strip()]


def _capacity(name: str, plan: Planned, context: int, num_vectors: int) -> Capacity:
    def token_bytes(layers: list[Any]) -> int:
        return sum(layer.real_page_size_bytes // layer.block_size for layer in layers)

    coded = plan.coded or plan.layers
    coordinates = sum(num_vectors * layer.num_kv_heads * layer.head_size for layer in coded)
    return Capacity(
        kv_cache_dtype=name,
        bytes_per_token=token_bytes(plan.layers),
        effective_rate=effective_rate(token_bytes(coded), coordinates, plan.num_copies, context),
        num_blocks=plan.num_blocks,
        num_tokens=int(plan.max_concurrency * context),
        max_concurrency=plan.max_concurrency,
        copy_bytes=plan.copy_bytes,
    )
