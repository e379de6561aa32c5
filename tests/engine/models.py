# SPDX-License-Identifier: Apache-2.0
"""Tiny random-weight models in the shapes that matter, made on the fly."""

from __future__ import annotations

import json
from pathlib import Path

import torch

VOCAB_SIZE = 512
MAX_LEN = 2048

_COMMON = {
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": MAX_LEN,
    "num_hidden_layers": 2,
    "hidden_size": 192,
    "intermediate_size": 384,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}


def _llama(**changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64}
    return LlamaForCausalLM, LlamaConfig(**{**_COMMON, **heads, **changes})


def _mistral():
    """A sliding window on every layer."""
    from transformers import MistralConfig, MistralForCausalLM

    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64}
    return MistralForCausalLM, MistralConfig(**_COMMON, **heads, sliding_window=64)


def _gemma2():
    """Sliding window on every other layer, and a soft cap on scores."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    return Gemma2ForCausalLM, Gemma2Config(
        **_COMMON,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        sliding_window=64,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=30.0,
        query_pre_attn_scalar=64,
        tie_word_embeddings=True,
    )


def _gemma3():
    """Five sliding-window layers, then a global one; normalised queries and keys."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    return Gemma3ForCausalLM, Gemma3TextConfig(
        **{**_COMMON, "num_hidden_layers": 6},
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        sliding_window=64,
        query_pre_attn_scalar=256,
        tie_word_embeddings=True,
    )


def _gpt_oss():
    """Attention sinks, alternating sliding windows, mixture of experts."""
    from transformers import GptOssConfig, GptOssForCausalLM

    return GptOssForCausalLM, GptOssConfig(
        **_COMMON,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        sliding_window=64,
        num_local_experts=4,
        num_experts_per_tok=2,
    )


def _qwen2():
    """Projections with biases; those of keys are long, as in real models of this family."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    heads = {"num_attention_heads": 6, "num_key_value_heads": 2}
    return Qwen2ForCausalLM, Qwen2Config(**{**_COMMON, "hidden_size": 384}, **heads)


def _gemma4(head_dim: int = 128, global_head_dim: int = 256, **changes):
    """Records of two sizes: full attention has a head_dim of its own."""
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    settings = {"num_hidden_layers": 6, "num_key_value_heads": 2, **changes}
    return Gemma4ForCausalLM, Gemma4TextConfig(
        **{**_COMMON, **settings},
        num_attention_heads=4,
        head_dim=head_dim,
        global_head_dim=global_head_dim,
        sliding_window=64,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
        hidden_size_per_layer_input=0,
    )


def _of(name: str, **settings):
    """A model of transformers' class `name`, with 4 query and 2 KV heads of 64."""
    import transformers

    config = getattr(transformers, f"{name}Config")
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    return getattr(transformers, f"{name}ForCausalLM"), config(**{**_COMMON, **heads, **settings})


_SHAPES = {
    "gemma4": lambda: _gemma4(num_kv_shared_layers=0),
    "gemma4-112": lambda: _gemma4(112, num_kv_shared_layers=0),
    "gemma4-shared": lambda: _gemma4(num_kv_shared_layers=3),
    "qwen3": lambda: _of("Qwen3"),
    "qwen3-moe": lambda: _of(
        "Qwen3Moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64
    ),
    "granite": lambda: _of("Granite", hidden_size=256),
    "olmo2": lambda: _of("Olmo2", hidden_size=256),
    "llama": _llama,
    # As wide as SmolLM2-135M: products of 576 and 1,536 numbers.
    "llama-wide": lambda: _llama(
        hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3
    ),
    "llama-1layer": lambda: _llama(num_hidden_layers=1),
    "llama-4layers": lambda: _llama(num_hidden_layers=4),
    "mistral": _mistral,
    "llama-mha80": lambda: _llama(num_attention_heads=4, num_key_value_heads=4, head_dim=80),
    "llama-mqa128": lambda: _llama(num_attention_heads=4, num_key_value_heads=1, head_dim=128),
    "llama-d48": lambda: _llama(head_dim=48),
    "llama-d62": lambda: _llama(head_dim=62),
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "gpt-oss": _gpt_oss,
    "qwen2": _qwen2,
}


def make_model(shape: str, folder: Path) -> str:
    """Writes a random model of `shape` below `folder` (once) and returns its path."""
    path = folder / shape
    if (path / "config.json").exists():
        return str(path)
    model_class, config = _SHAPES[shape]()
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
