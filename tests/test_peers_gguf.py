# SPDX-License-Identifier: Apache-2.0
"""One GGUF file of a model for all engines: small models of each architecture, written and read."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks.peers import gguf_model

gguf = pytest.importorskip("gguf", reason="writes and reads GGUF")
NUM_WORDS = 40


def model_of(kind, folder):
    """A small random model of transformers with a tokenizer of 30 words, in bfloat16."""
    import torch
    import transformers

    sizes = dict(
        vocab_size=NUM_WORDS, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    if kind == "llama":
        config = transformers.LlamaConfig(**sizes)
    elif kind == "qwen2":
        config = transformers.Qwen2Config(**sizes)
    else:
        layers = ["sliding_attention", "full_attention"]
        config = transformers.Gemma3TextConfig(
            **sizes, head_dim=16, sliding_window=8, layer_types=layers
        )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name, weight in model.named_parameters():
        if weight.dim() == 1:  # norms and biases begin as constants
            torch.nn.init.normal_(weight, std=300.0 if name.endswith("k_proj.bias") else 1.0)
    model.to(torch.bfloat16).save_pretrained(folder)
    words = {f"w{i}": i for i in range(30)}
    tokenizer = {"model": {"vocab": words, "merges": []}, "added_tokens": []}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return model


@pytest.fixture(scope="module", params=["llama", "qwen2", "gemma3"])
def written(request, tmp_path_factory):
    """The architecture, transformers' weights by name, and the file's fields and tensors."""
    folder = tmp_path_factory.mktemp(request.param)
    weights = {
        name: weight.detach().float().numpy()
        for name, weight in model_of(request.param, folder).named_parameters()
    }
    gguf_model.write(folder, folder / "model.gguf")
    reader = gguf.GGUFReader(folder / "model.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return request.param, weights, fields, {t.name: t.data for t in reader.tensors}


def test_rotated_pairs_lie_beside_each_other_in_gguf():
    """In transformers coordinate i is turned together with i + head_dim / 2."""
    rows = np.arange(2 * 6, dtype=np.float32)[:, None]  # two heads of 6
    got = gguf_model.pairs_beside(rows, 2)[:, 0].tolist()
    assert got == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


def test_every_tensor_is_there_once(written):
    """Named as llama.cpp's loader asks for it, with the values of transformers'."""
    arch, weights, _, tensors = written
    layer = {
        "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
        "post_attention_layernorm": "post_attention_norm" if arch == "gemma3" else "ffn_norm",
        "pre_feedforward_layernorm": "ffn_norm", "post_feedforward_layernorm": "post_ffw_norm",
        "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    }  # fmt: skip
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for i in range(2):
        names |= {f"model.layers.{i}.{old}": f"blk.{i}.{new}" for old, new in layer.items()}
    wanted = {}
    for name, weight in weights.items():
        stem, kind = name.rsplit(".", 1)
        if arch == "llama" and stem.endswith(("q_proj", "k_proj")):
            weight = gguf_model.pairs_beside(weight, 4 if "q_proj" in stem else 2)
        if arch == "gemma3" and stem.endswith("norm"):
            weight = weight + 1
        wanted[f"{names[stem]}.{kind}"] = weight
    assert tensors.keys() == wanted.keys()
    for name, weight in wanted.items():
        dtype = np.float32 if weight.ndim == 1 else np.float16
        assert tensors[name].dtype == dtype
        np.testing.assert_array_equal(tensors[name], weight.astype(dtype), err_msg=name)


def test_biases_are_written_for_qwen2_alone(written):
    arch, _, _, tensors = written
    biases = {name for name in tensors if name.endswith(".bias")}
    parts = ("q", "k", "v") if arch == "qwen2" else ()
    assert biases == {f"blk.{i}.attn_{part}.bias" for i in range(2) for part in parts}
    for name in biases:
        largest = np.abs(tensors[name]).max()
        assert largest > 100 if "attn_k" in name else largest < 100


def test_sizes_are_those_of_the_model(written):
    arch, _, fields, _ = written
    assert fields["general.architecture"] == arch
    about = {name.removeprefix(f"{arch}."): value for name, value in fields.items()}
    assert (
        about["attention.key_length"]
        == about["rope.dimension_count"]
        == (16 if arch == "gemma3" else 8)
    )
    assert (about["block_count"], about["attention.head_count_kv"]) == (2, 2)
    assert about["vocab_size"] == NUM_WORDS


def test_gemmas_windows_and_both_rotary_bases_are_written(written):
    arch, _, fields, _ = written
    names = ("attention.sliding_window", "attention.sliding_window_pattern", "rope.freq_base_swa")
    found = [fields.get(f"{arch}.{name}") for name in names]
    base = fields[f"{arch}.rope.freq_base"]
    assert (base, found) == (
        (1e6, [8, [True, False], 1e4]) if arch == "gemma3" else (1e4, [None] * 3)
    )


def test_every_row_of_the_embedding_has_a_word_where_there_is_a_vocabulary(written):
    arch, _, fields, _ = written
    if arch == "gemma3":
        assert fields["tokenizer.ggml.model"] == "none"
        return
    words = fields["tokenizer.ggml.tokens"]
    assert (words[0], words[29], len(set(words))) == ("w0", "w29", NUM_WORDS)
    assert fields["tokenizer.ggml.token_type"] == [1] * 30 + [5] * 10


def test_another_architecture_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(
        SystemExit, match="model_type must be one of llama, qwen2, gemma3_text, got m"
    ):
        gguf_model.write(tmp_path, tmp_path / "model.gguf")
