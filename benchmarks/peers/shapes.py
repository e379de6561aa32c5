# SPDX-License-Identifier: Apache-2.0
"""Small Llamas with random weights that show what attention over a long cache costs.

A step of SmolLM2-135M is mostly weights, and three of its query heads share a KV head. These have
few weights and few layers, so that a step is mostly attention, and four or eight query heads to a
KV head. What they answer means nothing: only their speed is measured.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

NUM_LAYERS, HIDDEN, NUM_WORDS = 2, 512, 2048


@dataclass(frozen=True)
class Shape:
    num_kv_heads: int
    group_size: int
    head_dim: int
    contexts: tuple[int, ...]


SHAPES = {
    "random-8x4x64": Shape(8, 4, 64, (1024, 8192, 32768)),
    "random-8x8x128": Shape(8, 8, 128, (1024, 8192)),
}
"""By name: KV heads x query heads of each x coordinates of each."""


def make(name: str, folder: Path, room: int) -> Path:
    """The model of a shape, written below `folder` once: transformers' files, bfloat16 weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    path, shape = folder / name, SHAPES[name]
    if (path / "config.json").exists():
        return path
    config = LlamaConfig(
        vocab_size=NUM_WORDS, hidden_size=HIDDEN, intermediate_size=2 * HIDDEN,
        num_hidden_layers=NUM_LAYERS, head_dim=shape.head_dim,
        num_attention_heads=shape.num_kv_heads * shape.group_size,
        num_key_value_heads=shape.num_kv_heads, max_position_embeddings=room,
        rope_theta=100_000.0, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    scratch = path.with_suffix(".part")
    shutil.rmtree(scratch, ignore_errors=True)
    model.save_pretrained(scratch)
    write_tokenizer(scratch)
    scratch.rename(path)
    return path


def write_tokenizer(path: Path) -> None:
    """Every byte and pairs of bytes: tokens are given by number, but readers of GGUF want one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(a, b) for a in letters for b in letters][: NUM_WORDS - len(letters) - 1]
    words = ["<end>", *letters, *(a + b for a, b in pairs)]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<end>", eos_token="<end>"
    ).save_pretrained(path)
