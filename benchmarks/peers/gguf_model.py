# SPDX-License-Identifier: Apache-2.0
"""A Llama, Qwen2 or Gemma 3 saved by transformers, as one GGUF file: what llama.cpp and OpenVINO
GenAI read.

    python -m benchmarks.peers.gguf_model FOLDER FILE

Runs in the peers' environment, with numpy and gguf alone. Weights are stored in float16, which
holds bfloat16 weights of usual sizes as they are; norms and biases in float32.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "gemma3_text": "gemma3"}
"""GGUF's name of each model type of transformers that is written here."""


def weights_of(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Name and values, float32, of each tensor of a model's safetensors files."""
    for path in sorted(folder.glob("*.safetensors")):
        raw = np.memmap(path, np.uint8, "r")
        begin = 8 + int(raw[:8].view(np.uint64)[0])
        for name, about in json.loads(raw[8:begin].tobytes()).items():
            if name == "__metadata__":
                continue
            first, last = (begin + offset for offset in about["data_offsets"])
            if about["dtype"] == "BF16":  # the upper half of a float32
                values = (raw[first:last].view(np.uint16).astype(np.uint32) << 16).view(np.float32)
            else:
                values = raw[first:last].view(
                    {"F16": np.float16, "F32": np.float32}[about["dtype"]]
                )
            yield name, values.astype(np.float32).reshape(about["shape"])


def pairs_beside(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of a Llama's query or key projection `[num_heads * head_dim, hidden]` in llama.cpp's
    order: two coordinates that the rotary embedding turns together lie beside each other. Of the
    other architectures llama.cpp turns the coordinates that transformers does."""
    halves = weight.reshape(num_heads, 2, -1, weight.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)


def write(folder: Path, target: Path) -> None:
    """Writes the model in `folder` to the file `target`."""
    import gguf

    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] not in ARCHITECTURES:
        sys.exit(
            f"gguf_model: model_type must be one of {', '.join(ARCHITECTURES)}, got "
            f"{config['model_type']}; give another model"
        )
    arch = ARCHITECTURES[config["model_type"]]
    # Tensors wait on disk until all are known.
    writer = gguf.GGUFWriter(str(target), arch, use_temp_file=True)
    writer.add_name(folder.name)
    add_sizes(writer, config)
    add_vocabulary(writer, json.loads((folder / "tokenizer.json").read_text()), config)
    names = gguf.get_tensor_name_map(
        next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch),
        config["num_hidden_layers"],
    )
    for name, weight in weights_of(folder):
        new_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if new_name is None:
            sys.exit(f"gguf_model: tensors must have names known of {arch}, got {name}")
        writer.add_tensor(new_name, converted(name, weight, config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def converted(name: str, weight: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    """One of transformers' tensors as GGUF has it: matrices float16, vectors float32."""
    if config["model_type"] == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
        heads = "num_attention_heads" if "q_proj" in name else "num_key_value_heads"
        weight = pairs_beside(weight, config[heads])
    if config["model_type"] == "gemma3_text" and name.endswith("norm.weight"):
        weight = weight + 1  # transformers adds it when the model runs
    return weight if weight.ndim == 1 else weight.astype(np.float16)


def add_sizes(writer: Any, config: dict[str, Any]) -> None:
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    rope = config.get("rope_parameters") or config
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    writer.add_rope_dimension_count(head_dim)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(1)  # mostly float16
    if config["model_type"] == "gemma3_text":
        writer.add_sliding_window(config["sliding_window"])
        writer.add_sliding_window_pattern(
            [kind == "sliding_attention" for kind in config["layer_types"]]
        )
        local = rope.get("sliding_attention", {"rope_theta": config.get("rope_local_base_freq")})
        writer.add_rope_freq_base_swa(local["rope_theta"])


PRE_TOKENIZERS = {"llama": "smollm", "qwen2": "qwen2"}
"""llama.cpp's names of what comes before byte pairs. Gemma's tokenizer has none such."""


def add_vocabulary(writer: Any, tokenizer: dict[str, Any], config: dict[str, Any]) -> None:
    """The tokenizer: tokens are given by number here, but OpenVINO GenAI's reader wants one. Rows
    of the embedding beyond it get a name each."""
    if config["model_type"] not in PRE_TOKENIZERS:
        writer.add_tokenizer_model("none")
        return
    vocabulary = dict(tokenizer["model"]["vocab"])
    special = {added["id"] for added in tokenizer["added_tokens"]}
    vocabulary |= {added["content"]: added["id"] for added in tokenizer["added_tokens"]}
    words = {number: word for word, number in vocabulary.items()}
    numbers = range(config["vocab_size"])
    merges = tokenizer["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(PRE_TOKENIZERS[config["model_type"]])
    writer.add_token_list([words.get(i, f"[PAD{i}]") for i in numbers])
    writer.add_token_types([3 if i in special else 1 if i in words else 5 for i in numbers])
    writer.add_token_merges([x if isinstance(x, str) else " ".join(x) for x in merges])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]))
