# SPDX-License-Identifier: Apache-2.0
"""A model whose class vLLM imports with an image processor, given texts alone.

    PYTHONPATH=tests/engine/stand_in python -m tests.engine.text_alone NAME FOLDER

Prints how far answers to fresh prompts, whose new tokens are read as computed, are from vLLM's own.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from .architectures import COMMON, HEADS, LINEAR, SHAPES, VOCAB_SIZE, Made
from .harness import engine, generate, largest_difference, varied_prompts
from .models import make_model


def gemma3_images() -> Made:
    """Tokens of an image see each other both ways: requests that bring one are refused."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    vision = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1,
              "num_attention_heads": 2, "image_size": 28, "patch_size": 14}  # fmt: skip
    text = {**COMMON, **HEADS, "sliding_window": 64, "sliding_window_pattern": 2,
            "query_pre_attn_scalar": 64}  # fmt: skip
    config = Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=5,
        boi_token_index=6, eoi_token_index=7,
    )  # fmt: skip
    return Gemma3ForConditionalGeneration, config


def qwen25_vl() -> Made:
    """Rotations by three positions, which a text's tokens have alike."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = {"depth": 2, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2,
              "out_hidden_size": 256, "fullatt_block_indexes": [1]}  # fmt: skip
    turns = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 12, 12]}
    text = {**COMMON, "num_attention_heads": 4, "num_key_value_heads": 2, "rope_parameters": turns}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **TOKENS)
    return Qwen2_5_VLForConditionalGeneration, config


def qwen35() -> Made:
    """Three layers of linear attention to one of gated attention; partial rotations."""
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    vision = {"depth": 2, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2,
              "out_hidden_size": 256, "num_position_embeddings": 16}  # fmt: skip
    turns = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5,
             "mrope_section": [6, 5, 5], "mrope_interleaved": True}  # fmt: skip
    text = {**COMMON, **HEADS, **LINEAR, "rope_parameters": turns}
    config = Qwen3_5Config(text_config=text, vision_config=vision, **TOKENS)
    return Qwen3_5ForConditionalGeneration, config


TOKENS = {"image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 7,
          "vision_end_token_id": 8}  # fmt: skip
NO_PROCESSOR = {"language_model_only": True}
"""A processor of images would be asked for otherwise, of which there is none here."""
LINEAR_DTYPE = {"dtype": "bfloat16", "block_size": None}

MADE: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "gemma3-images": (gemma3_images, {}, {}),
    "qwen2.5-vl": (qwen25_vl, {}, NO_PROCESSOR),
    "qwen3.5": (qwen35, LINEAR_DTYPE, NO_PROCESSOR),
}
"""The model, what both engines are given, and what ours is given."""


def refused_with_an_image(llm: Any, prompt: list[int]) -> None:
    from PIL import Image

    image = {"image": Image.new("RGB", (28, 28))}
    try:
        llm.generate({"prompt_token_ids": prompt, "multi_modal_data": image}, use_tqdm=False)
    except ValueError as refusal:
        print("REFUSED", refusal)
    else:
        raise AssertionError("an image was read")


def main(name: str, folder: str) -> None:
    SHAPES[name], settings, ours = MADE[name]
    model = make_model(name, Path(folder))
    prompts = varied_prompts(6, VOCAB_SIZE)
    answers = []
    for dtype, options in (("auto", None), ("fibquant_2bit", {"prefill": "raw"})):
        given = {**settings, **(NO_PROCESSOR if dtype == "auto" else ours)}
        with engine(model, dtype, fibquant=options, max_num_batched_tokens=2048, **given) as llm:
            refused_with_an_image(llm, prompts[0])
            answers.append(generate(llm, prompts, 1))
    other_tokens, _, largest = largest_difference(*answers)
    print(f"\nDIFFERENCE {other_tokens} {largest}")


if __name__ == "__main__":
    main(*sys.argv[1:])
