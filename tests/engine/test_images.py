# SPDX-License-Identifier: Apache-2.0
"""Models whose images are not read right: texts are served, and requests with an image are refused
one by one. Without an engine; with one: test_text_alone.py."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="asks vLLM's configuration")

from vllm_fibquant.engine import compat_images

NEEDS_ENGINE = False


@dataclasses.dataclass
class Architecture:
    is_mm_prefix_lm: bool


class Model:
    """What is asked of vLLM's ModelConfig, whose answer is cached as well."""

    def __init__(self, two_ways: bool, limits: dict[str, Any], embeddings: bool) -> None:
        from vllm.config.multimodal import MultiModalConfig

        self.model_arch_config = Architecture(two_ways)
        self.is_mm_prefix_lm = two_ways
        self.uses_mrope, self.max_model_len = False, 512
        self.multimodal_config = MultiModalConfig(
            limit_per_prompt=limits, enable_mm_embeds=embeddings
        )


@pytest.fixture
def make(monkeypatch):
    from vllm.multimodal import MULTIMODAL_REGISTRY

    info = SimpleNamespace(supported_mm_limits={"image": None, "audio": None, "video": None})
    monkeypatch.setattr(MULTIMODAL_REGISTRY, "get_processing_info", lambda model: info)

    def made(two_ways: bool = True, embeddings: bool = False, **limits: int) -> Any:
        return Model(two_ways, {name: {"count": n} for name, n in limits.items()}, embeddings)

    return made


def test_images_are_limited_to_none(make):
    model = make()
    assert compat_images.images_problems(model) == []
    assert compat_images.refuse_images(model)[0] == ["image", "video"]
    limits = model.multimodal_config
    assert [limits.get_limit_per_prompt(name) for name in ("image", "video")] == [0, 0]
    assert limits.get_limit_per_prompt("audio") == 999  # causal: vLLM makes no such mask of it
    assert model.model_arch_config.is_mm_prefix_lm is False
    assert vars(model)["is_mm_prefix_lm"] is False
    assert compat_images.refuse_images(model)[0] == []  # its parts' configurations are copies of it


def test_a_text_part_alone_is_causal(make, monkeypatch):
    """As gemma4_text, whose class has no processor that could be asked."""
    from vllm.multimodal import MULTIMODAL_REGISTRY

    monkeypatch.setattr(MULTIMODAL_REGISTRY, "get_processing_info", None)
    model = make()
    model.multimodal_config = None
    assert compat_images.images_problems(model) == []
    assert compat_images.refuse_images(model)[0] == []
    assert model.is_mm_prefix_lm is model.model_arch_config.is_mm_prefix_lm is False


def test_images_asked_for_by_name_are_refused_at_start(make):
    (problem,) = compat_images.images_problems(make(image=2, video=0))
    assert "--limit-mm-per-prompt: image must be 0 or left out, got 2" in problem
    (problem,) = compat_images.images_problems(make(embeddings=True))
    assert "--enable-mm-embeds: must be off, got on" in problem
    assert "use --kv-cache-dtype auto, which reads them" in problem


def test_images_whose_tokens_are_causal_are_left_alone(make):
    model = make(two_ways=False, image=2, embeddings=True)
    assert compat_images.images_problems(model) == []
    assert compat_images.refuse_images(model)[0] == []
    assert model.multimodal_config.get_limit_per_prompt("image") == 2


@pytest.mark.parametrize(
    ("text", "max_model_len", "is_refused"),
    [
        ("qwen2_5_vl_text", 16385, True),
        ("qwen2_vl_text", 128000, True),
        ("qwen2_5_vl_text", 16384, False),
        ("qwen3_vl_text", 128000, False),
    ],
)
def test_images_that_move_positions_too_far(make, text, max_model_len, is_refused):
    """With M-RoPE and long biases of keys, which codes would lose behind so many places."""
    models = [make(two_ways=False), make(two_ways=False, image=2)]
    for model in models:
        model.uses_mrope, model.max_model_len = True, max_model_len
        model.hf_text_config = SimpleNamespace(model_type=text)
    problems = compat_images.images_problems(models[1])
    assert compat_images.images_problems(models[0]) == []
    modalities, why = compat_images.refuse_images(models[0])
    limit = models[0].multimodal_config.get_limit_per_prompt("image")
    assert (modalities != [], limit == 0, problems != []) == (is_refused,) * 3
    if is_refused:
        assert "give --max-model-len 16384 for images" in why
        assert "image must be 0 or left out, got 2: positions behind one lag" in problems[0]
    models[0].multimodal_config.language_model_only = True
    assert compat_images.moving_modalities(models[0]) == []
