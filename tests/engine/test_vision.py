# SPDX-License-Identifier: Apache-2.0
"""Images whose tokens are causal, as in most vision models: requests with and without one.

A small random Idefics3 (SmolVLM's architecture): 16 tokens of an image among a text's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from vllm_fibquant.engine import measure

from .architectures import COMMON, HEADS, SHAPES, VOCAB_SIZE, Made
from .harness import Answer, engine, generate, largest_difference, random_text, varied_prompts
from .models import make_model

IMAGE_SIZE, PATCH_SIZE, SCALE = 64, 8, 2
NUM_IMAGE_TOKENS = (IMAGE_SIZE // PATCH_SIZE // SCALE) ** 2
SPECIAL = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
SPECIAL += [f"<row_{i + 1}_col_{j + 1}>" for i in range(6) for j in range(6)]
FIRST_SPECIAL = VOCAB_SIZE - len(SPECIAL)
IMAGE = FIRST_SPECIAL


def idefics3() -> Made:
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration, LlamaConfig

    vision = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
              "num_attention_heads": 2, "image_size": IMAGE_SIZE,
              "patch_size": PATCH_SIZE}  # fmt: skip
    config = Idefics3Config(
        text_config=LlamaConfig(**COMMON, **HEADS).to_dict(), vision_config=vision,
        image_token_id=IMAGE, scale_factor=SCALE, tie_word_embeddings=False, pad_token_id=1,
    )  # fmt: skip
    return Idefics3ForConditionalGeneration, config


def vision_model(folder: Path) -> str:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    with mock.patch.dict(SHAPES, {"idefics3": idefics3}):
        path = Path(make_model("idefics3", folder))
    if (path / "preprocessor_config.json").exists():
        return str(path)
    words = [f"w{number}" for number in range(FIRST_SPECIAL)] + SPECIAL
    tokenizer = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="w0", eos_token="w1", unk_token="w0",
        additional_special_tokens=SPECIAL,
    ).save_pretrained(path)  # fmt: skip
    edge = {"longest_edge": IMAGE_SIZE}
    image = {"image_processor_type": "Idefics3ImageProcessor", "do_image_splitting": False,
             "size": edge, "max_image_size": edge}  # fmt: skip
    (path / "preprocessor_config.json").write_text(json.dumps(image))
    processor = {"processor_class": "Idefics3Processor", "image_seq_len": NUM_IMAGE_TOKENS}
    (path / "processor_config.json").write_text(json.dumps(processor))
    return str(path)


def requests() -> list[Any]:
    """Texts, and texts around one image or two, each another one."""
    from PIL import Image

    generator = torch.Generator().manual_seed(1)
    asked: list[Any] = []
    for number, prompt in enumerate(varied_prompts(6, FIRST_SPECIAL, longest=60)):
        images = []
        for _ in range(number % 3):
            size = (IMAGE_SIZE, IMAGE_SIZE, 3)
            pixels = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
            images.append(Image.fromarray(pixels.numpy()))
            prompt = [*prompt[: len(prompt) // 2], IMAGE, *prompt[len(prompt) // 2 :]]
        one = {"prompt_token_ids": prompt}
        asked.append({**one, "multi_modal_data": {"image": images}} if images else one)
    return asked


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return vision_model(tmp_path_factory.mktemp("vision"))


SETTINGS = {"skip_tokenizer_init": False, "max_num_batched_tokens": 2048}


def answers(model, dtype, num_tokens, **settings):
    with engine(model, dtype, **SETTINGS, **settings) as llm:
        return generate(llm, requests(), num_tokens)


def test_images_are_read_as_by_stock_attention(model, monkeypatch):
    """New tokens are read as computed; in mode quality those after them, up to its window, from
    copies in bfloat16, although keys are calibrated on texts."""
    monkeypatch.setattr(measure, "text_sequences", random_text)
    expected = answers(model, "auto", 6)
    found = answers(model, "fibquant_2bit", 6, fibquant={"mode": "quality", "calibrate": "auto"})
    assert largest_difference(first(expected), first(found))[::2] == (0, pytest.approx(0, abs=1e-4))
    other_tokens, _, largest = largest_difference(expected, found)
    assert (other_tokens, largest < 0.1) == (0, True), largest
    exact = answers(model, "fibquant_2bit", 6)
    assert largest_difference(expected, exact)[2] > 3 * largest  # what codes cost


def first(all_answers):
    """The first token alone, of which no code was read."""
    return [Answer(answer.tokens[:1], answer.logprobs[:1]) for answer in all_answers]
