# SPDX-License-Identifier: Apache-2.0
"""Checkpoints whose weights are quantised, and those that bring scales for an fp8 cache.

Weights are random, so what they stand for does not matter: with the same ones, a fresh prompt whose
tokens are read as computed must give what vLLM's own cache gives.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from .architectures import VOCAB_SIZE
from .harness import engine, generate, largest_difference, varied_prompts
from .models import make_model

GROUP = 32

INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
FORMATS: dict[str, dict[str, Any]] = {
    "gptq": {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": GROUP,
        "desc_act": False,
        "sym": True,
    },
    "awq": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True},
    "compressed-tensors": {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**INT8, "strategy": "channel"},
                "input_activations": {**INT8, "strategy": "token", "dynamic": True},
            }
        },
    },
}


def packed(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    """Random numbers of 4 bits, 8 in an int32."""
    ends = torch.iinfo(torch.int32)
    return torch.randint(
        ends.min, ends.max, (rows, columns), dtype=torch.int32, generator=generator
    )


def quantised(method: str, weight: torch.Tensor, generator: torch.Generator) -> dict[str, Any]:
    """Tensors of a linear layer like `weight` [out, in], about as large as its numbers."""
    out, into = weight.shape
    size = float(weight.std())
    groups = into // GROUP
    scales = torch.full((groups, out), size / 4.6, dtype=torch.float16)
    if method == "gptq":
        return {
            "qweight": packed(into // 8, out, generator),
            "qzeros": torch.full((groups, out // 8), 0x77777777, dtype=torch.int32),
            "scales": scales,
            "g_idx": torch.arange(into, dtype=torch.int32) // GROUP,
        }
    if method == "awq":
        return {
            "qweight": packed(into, out // 8, generator),
            "qzeros": torch.full((groups, out // 8), 0x77777777, dtype=torch.int32),
            "scales": scales,
        }
    scale = weight.abs().amax(1, keepdim=True) / 127
    return {"weight": (weight / scale).round().to(torch.int8), "weight_scale": scale}


def checkpoint(method: str, folder: Path, **more: Any) -> str:
    """The random Llama model with its linear layers' weights quantised."""
    source, path = Path(make_model("llama", folder)), folder / f"llama-{method}"
    if path.exists():
        return str(path)
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name, weight in load_file(source / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            stem = name.removesuffix("weight")
            made = quantised(method, weight, generator)
            tensors |= {stem + part: tensor.contiguous() for part, tensor in made.items()}
        else:
            tensors[name] = weight
    path.mkdir()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {**FORMATS[method], **more}
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


@pytest.mark.parametrize("method", FORMATS)
def test_quantised_weights(model_folder, method):
    prompts, answers = varied_prompts(6, VOCAB_SIZE), []
    for name, options in (("auto", None), ("fibquant_2bit", {"prefill": "raw"})):
        with engine(
            checkpoint(method, model_folder),
            name,
            fibquant=options,
            dtype="bfloat16",
            max_num_batched_tokens=2048,
        ) as llm:
            answers.append(generate(llm, prompts, 1))
    other_tokens, _, largest = largest_difference(*answers)
    assert (other_tokens, largest < 0.1) == (0, True), largest


def test_scales_of_an_fp8_cache_are_left_alone(model_folder, caplog):
    """They are of another format: with them and without, the same bits, and the log says so."""
    plain = Path(checkpoint("compressed-tensors", model_folder))
    path = model_folder / "llama-kv-scales"
    path.mkdir(exist_ok=True)
    tensors = load_file(plain / "model.safetensors")
    for name in [n for n in tensors if n.endswith("k_proj.weight")]:
        for scale in ("k_proj.k_scale", "v_proj.v_scale"):
            tensors[name.replace("k_proj.weight", scale)] = torch.tensor(0.25)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}
    config["quantization_config"]["kv_cache_scheme"] = {**scheme, "dynamic": False}
    (path / "config.json").write_text(json.dumps(config))
    prompts, answers = varied_prompts(6, VOCAB_SIZE), []
    for model, is_told in ((plain, False), (path, True)):
        caplog.clear()
        with (
            caplog.at_level(logging.INFO),
            engine(str(model), "fibquant_2bit", dtype="bfloat16") as llm,
        ):
            answers.append([answer.bits for answer in generate(llm, prompts, 4)])
        told = "does not use what this checkpoint says of an fp8 cache: kv_cache_scheme"
        assert (told in caplog.text) == is_told
    assert answers[0] == answers[1]
