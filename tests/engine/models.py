# SPDX-License-Identifier: Apache-2.0
"""Tiny models with random weights, made on the fly."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from .architectures import SHAPES, VOCAB_SIZE


def make_model(shape: str, folder: Path) -> str:
    """Writes a random model of `shape` below `folder` (once) and returns its path."""
    path = folder / shape
    if (path / "config.json").exists():
        return str(path)
    model_class, config = SHAPES[shape]()
    torch.manual_seed(0)
    model = model_class(config).to(torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Scores of a freshly initialised model are so flat that attention to the wrong
            # tokens would go unnoticed.
            if "q_proj.weight" in name or "k_proj.weight" in name:
                parameter.normal_(0, 0.3)
            elif "sinks" in name:
                parameter.normal_(0, 2.0)
            elif "k_proj.bias" in name:
                parameter.normal_(0, 1.0)
                # Long where the rotary embedding turns slowly: scores see it as a constant.
                parameter.view(-1, 64)[:, 24:32] += 40.0
            elif parameter.dim() > 1:
                parameter.normal_(0, 0.08)
    model.save_pretrained(path)
    _write_tokenizer(path)
    return str(path)


def _write_tokenizer(path: Path) -> None:
    """One word per token id, so that a server can be asked in token ids and in words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = {f"w{number}": number for number in range(VOCAB_SIZE)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="w0", eos_token="w1", unk_token="w0"
    ).save_pretrained(path)


def make_config_only(name: str, config: dict, folder: Path) -> str:
    """Writes a model folder that holds a config alone: enough to be refused."""
    path = folder / name
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    return str(path)
