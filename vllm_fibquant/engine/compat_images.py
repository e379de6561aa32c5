# SPDX-License-Identifier: Apache-2.0
"""Images whose tokens see each other both ways: refused request by request, under the rules of
`compat`.

The masks of our kernels are causal. A model that reads images in this way (Gemma 3 and 4,
PaliGemma, Molmo 2) is served all the same: requests without images are causal.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import ModelConfig

CAUSAL_MODALITIES = ("audio",)
"""vLLM's model runner lets the tokens of all others see each other both ways."""


def two_way_modalities(model: ModelConfig) -> list[str]:
    """What a request may bring whose tokens see each other both ways, by vLLM's names: nothing
    where the model is the text part alone."""
    if not model.is_mm_prefix_lm or model.multimodal_config is None:
        return []
    from vllm.multimodal import MULTIMODAL_REGISTRY

    info = MULTIMODAL_REGISTRY.get_processing_info(model)
    return [name for name in info.supported_mm_limits if name not in CAUSAL_MODALITIES]


def images_problems(model: ModelConfig) -> list[str]:
    """Why requests with images cannot be refused one by one: they are asked for by name."""
    modalities, config = two_way_modalities(model), model.multimodal_config
    if not modalities or config is None:
        return []
    problems = []
    other = "or use --kv-cache-dtype auto, which reads them"
    for name in modalities:
        given = config.limit_per_prompt.get(name)
        if given is not None and given.count:
            problems.append(
                f"--limit-mm-per-prompt: {name} must be 0 or left out, got {given.count}: the "
                f"tokens of one see each other both ways in this model; leave it out, {other}"
            )
    if config.enable_mm_embeds:
        problems.append(
            "--enable-mm-embeds: must be off, got on: the tokens of an image see each other both "
            f"ways in this model; leave the flag out, {other}"
        )
    return problems


def refuse_images(model: ModelConfig) -> list[str]:
    """Has vLLM refuse requests that bring what `two_way_modalities` names, which is returned.

    What: sets the model's `limit_per_prompt` of these to 0, as --limit-mm-per-prompt does, and
        clears `is_mm_prefix_lm`, as no request that is left needs it.
    Why: vLLM's answer to such a request is then a plain one (status 400), and the vision tower is
        not loaded; vLLM asks no attention backend about a request.
        A text part alone, which reads no images, has the property cleared.
    Range: 0.32.0 and, as read, 0.33.0.
    Delete when: our kernels have the mask.
    """
    if not model.is_mm_prefix_lm:
        return []
    from vllm.config.multimodal import BaseDummyOptions

    modalities = two_way_modalities(model)
    for name in modalities:
        model.multimodal_config.limit_per_prompt[name] = BaseDummyOptions(count=0)
    architecture = model.model_arch_config
    model.model_arch_config = dataclasses.replace(architecture, is_mm_prefix_lm=False)
    # A cached property, and so for good: a model makes copies of its configuration for its parts.
    vars(model)["is_mm_prefix_lm"] = False
    return modalities
