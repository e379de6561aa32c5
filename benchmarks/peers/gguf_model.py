# SPDX-License-Identifier: Apache-2.0
"""A Llama model saved by transformers, as one GGUF file: what llama.cpp and OpenVINO GenAI read.

    python -m benchmarks.peers.gguf_model FOLDER FILE

Runs in the peers' environment, with numpy and gguf alone. Weights are stored in float16, which
holds bfloat16 weights of usual sizes as they are; norms in float32.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np


def weights_of(folder: Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file, float32."""
    raw = np.memmap(folder / "model.safetensors", np.uint8, "r")
    begin = 8 + int(raw[:8].view(np.uint64)[0])
    found = {}
    for name, about in json.loads(raw[8:begin].tobytes()).items():
        if name == "__metadata__":
            continue
        first, last = (begin + offset for offset in about["data_offsets"])
        if about["dtype"] == "BF16":  # the upper half of a float32
            values = (raw[first:last].view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        else:
            values = raw[first:last].view({"F16": np.float16, "F32": np.float32}[about["dtype"]])
        found[name] = values.astype(np.float32).reshape(about["shape"])
    return found


def pairs_beside(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of a query or key projection `[num_heads * head_dim, hidden]` in llama.cpp's order: two
    coordinates that the rotary embedding turns together lie beside each other."""
    halves = weight.reshape(num_heads, 2, -1, weight.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)


def write(folder: Path, target: Path) -> None:
    """Writes the model in `folder` to the file `target`."""
    import gguf

    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] != "llama":
        sys.exit(
            f"gguf_model: model_type must be llama, got {config['model_type']}; give another model"
        )
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    rope = config.get("rope_parameters") or config
    writer = gguf.GGUFWriter(str(target), "llama")
    writer.add_name(folder.name)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(1)  # mostly float16
    add_vocabulary(writer, json.loads((folder / "tokenizer.json").read_text()), config)
    for name, weight in weights_of(folder).items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weight = pairs_beside(weight, heads if "q_proj" in name else kv_heads)
        writer.add_tensor(
            gguf_name(name), weight if weight.ndim == 1 else weight.astype(np.float16)
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gguf_name(name: str) -> str:
    """GGUF's name of one of transformers' tensors."""
    outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem = name.removesuffix(".weight")
    if stem in outer:
        return f"{outer[stem]}.weight"
    number, part = stem.removeprefix("model.layers.").split(".", 1)
    return f"blk.{number}.{NAMES[part]}.weight"


def add_vocabulary(writer: Any, tokenizer: dict[str, Any], config: dict[str, Any]) -> None:
    """The tokenizer: tokens are given by number here, but readers want one."""
    vocabulary = dict(tokenizer["model"]["vocab"])
    special = {added["id"] for added in tokenizer["added_tokens"]}
    vocabulary |= {added["content"]: added["id"] for added in tokenizer["added_tokens"]}
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    merges = tokenizer["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if i in special else 1 for i in range(len(tokens))])
    writer.add_token_merges([x if isinstance(x, str) else " ".join(x) for x in merges])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]))
