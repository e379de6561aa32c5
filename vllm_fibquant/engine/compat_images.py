# SPDX-License-Identifier: Apache-2.0
"""Images that cannot be read right: refused request by request, under the rules of `compat`.

The masks of our kernels are causal. A model whose image tokens see each other both ways (Gemma 3
and 4, PaliGemma, Molmo 2) is served all the same: requests without images are causal.

A mean of keys turns by a token's place in its request. With M-RoPE text behind an image stands
nearer to it than that: by the image's tokens, less its longer side. Scores stay exact, but a code
then holds k - R_place c in the place of k - R_position c, and where c is as long as Qwen2's biases
there is a distance from which codes lose the key (docs/calibration.md).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import ModelConfig

CAUSAL_MODALITIES = ("audio",)
"""vLLM's model runner lets the tokens of all others see each other both ways."""
MAX_SHIFT = 16384
"""How far positions may lie behind places, in tokens, with keys that have a long bias."""
BIASED = "qwen2", "glm4v"
"""Beginnings of the `model_type` of text models whose keys have one and which may have M-RoPE."""

BOTH_WAYS = "tokens of one see each other both ways in this model, and our masks are causal"
MOVED = (
    "positions behind one lag behind tokens' places, by up to --max-model-len, and beyond "
    f"{MAX_SHIFT:,} codes would lose keys with biases as long as this model's; give "
    f"--max-model-len {MAX_SHIFT} for images"
)


def two_way_modalities(model: ModelConfig) -> list[str]:
    """What a request may bring whose tokens see each other both ways, by vLLM's names: nothing
    where the model is the text part alone."""
    if not model.is_mm_prefix_lm or model.multimodal_config is None:
        return []
    return [name for name in _supported(model) if name not in CAUSAL_MODALITIES]


def moving_modalities(model: ModelConfig) -> list[str]:
    """What a request may bring that would move the positions behind it too far."""
    if not model.uses_mrope or model.max_model_len <= MAX_SHIFT:
        return []
    config, text = model.multimodal_config, model.hf_text_config
    if config is None or config.language_model_only:
        return []
    return _supported(model) if text.model_type.startswith(BIASED) else []


def _supported(model: ModelConfig) -> list[str]:
    from vllm.multimodal import MULTIMODAL_REGISTRY

    return list(MULTIMODAL_REGISTRY.get_processing_info(model).supported_mm_limits)


def _refused(model: ModelConfig) -> tuple[list[str], str]:
    """What is refused, and why."""
    if modalities := two_way_modalities(model):
        return modalities, BOTH_WAYS
    return moving_modalities(model), MOVED


def images_problems(model: ModelConfig) -> list[str]:
    """Why requests with images cannot be refused one by one: they are asked for by name."""
    modalities, why = _refused(model)
    if not modalities or (config := model.multimodal_config) is None:
        return []
    problems = []
    other = "or use --kv-cache-dtype auto, which reads them"
    for name in modalities:
        given = config.limit_per_prompt.get(name)
        if given is not None and given.count:
            problems.append(
                f"--limit-mm-per-prompt: {name} must be 0 or left out, got {given.count}: {why}; "
                f"leave it out, {other}"
            )
    if config.enable_mm_embeds:
        problems.append(
            f"--enable-mm-embeds: must be off, got on: {why}; leave the flag out, {other}"
        )
    return problems


def refuse_images(model: ModelConfig) -> tuple[list[str], str]:
    """Has vLLM refuse requests that bring what cannot be read right. Returns what, and why.

    What: sets the model's `limit_per_prompt` of these to 0, as --limit-mm-per-prompt does, and
        clears `is_mm_prefix_lm`, as no request that is left needs it.
    Why: vLLM's answer to such a request is then a plain one (status 400), and the vision tower is
        not loaded; vLLM asks no attention backend about a request.
        A text part alone, which reads no images, has the property cleared.
    Range: 0.32.0 and, as read, 0.33.0.
    Delete when: our kernels have the mask, and take positions beside places.
    """
    modalities, why = _refused(model)
    if modalities:
        from vllm.config.multimodal import BaseDummyOptions

        for name in modalities:
            model.multimodal_config.limit_per_prompt[name] = BaseDummyOptions(count=0)
    if model.is_mm_prefix_lm:
        architecture = model.model_arch_config
        model.model_arch_config = dataclasses.replace(architecture, is_mm_prefix_lm=False)
        # A cached property, and so for good: a model makes copies of its configuration for its
        # parts.
        vars(model)["is_mm_prefix_lm"] = False
    return modalities, why
