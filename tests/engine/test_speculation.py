# SPDX-License-Identifier: Apache-2.0
"""Drafts change nothing in mode `exact`: verified rows read the same codes as decoded ones.

Drafters have random weights, so few drafts are accepted; every step verifies some all the same.
(N-grams: test_features.py.)
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from .architectures import VOCAB_SIZE
from .harness import cache_tensors, engine, generate, one_by_one, varied_prompts
from .models import make_model


def eagle_head(folder: Path) -> str:
    """A head of one layer that also reads the target's last hidden state."""
    draft = Path(make_model("llama-1layer", folder))
    path = folder / "eagle"
    if not path.exists():
        path.mkdir()
        weights = load_file(draft / "model.safetensors")
        head = {name.removeprefix("model."): x for name, x in weights.items() if ".layers." in name}
        del head["layers.0.input_layernorm.weight"]  # such heads have none
        hidden = weights["model.embed_tokens.weight"].shape[1]
        head["fc.weight"] = torch.randn(hidden, 2 * hidden) * 0.08
        save_file(head, path / "model.safetensors")
        (path / "config.json").write_text((draft / "config.json").read_text())
    return str(path)


def eagle3_head(folder: Path) -> str:
    """A head of one layer that reads a token's embedding and three layers of the target."""
    draft, path = Path(make_model("llama-1layer", folder)), folder / "eagle3"
    if path.exists():
        return str(path)
    weights = load_file(draft / "model.safetensors")
    layer = "model.layers.0."
    head = {
        f"midlayer.{name.removeprefix(layer)}": x
        for name, x in weights.items()
        if name.startswith(layer)
    }
    hidden = weights["model.embed_tokens.weight"].shape[1]
    generator = torch.Generator().manual_seed(0)
    for name in ("q_proj", "k_proj", "v_proj"):  # of an embedding and a state, side by side
        key = f"midlayer.self_attn.{name}.weight"
        head[key] = torch.randn(len(head[key]), 2 * hidden, generator=generator) * 0.08
    head["midlayer.hidden_norm.weight"] = head["norm.weight"] = torch.ones(hidden)
    head["fc.weight"] = torch.randn(hidden, 3 * hidden, generator=generator) * 0.08
    head["lm_head.weight"] = torch.randn(VOCAB_SIZE, hidden, generator=generator) * 0.08
    config = json.loads((draft / "config.json").read_text())
    config |= {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": VOCAB_SIZE}
    config["eagle_config"] = {"eagle_aux_hidden_state_layer_ids": [1, 2, 3]}
    config["eagle_aux_hidden_state_layer_ids"] = [1, 2, 3]
    return written(path, head, config)


def llama4_eagle_head(folder: Path) -> str:
    """An EAGLE head for Llama 4: a layer without experts that attends within chunks."""
    target, path = Path(make_model("llama4", folder)), folder / "llama4-eagle"
    if path.exists():
        return str(path)
    weights, layer = load_file(target / "model.safetensors"), "model.layers.0."
    head = {
        name.removeprefix("model.").replace("shared_expert.", ""): x
        for name, x in weights.items()
        if name.startswith(layer) and ".experts." not in name and ".router." not in name
    }
    hidden = weights["model.norm.weight"].shape[0]
    generator = torch.Generator().manual_seed(0)
    head["fc.weight"] = torch.randn(hidden, 2 * hidden, generator=generator) * 0.08
    head["norm.weight"] = torch.ones(hidden)
    head["lm_head.weight"] = weights["lm_head.weight"]
    config = json.loads((target / "config.json").read_text())
    del config["layer_types"]
    config |= {"num_hidden_layers": 1, "no_rope_layers": [1], "moe_layers": []}
    config |= {"interleave_moe_layer_step": 0, "draft_vocab_size": VOCAB_SIZE}
    config |= {"yoco_global_kv_layer": None, "yoco_local_kv_layer": None}
    return written(path, head, config)


def medusa_heads(folder: Path) -> str:
    """Two heads that each read the target's last state. They have no attention, and no cache."""
    path = folder / "medusa"
    if path.exists():
        return str(path)
    hidden = json.loads(Path(make_model("llama", folder), "config.json").read_text())["hidden_size"]
    generator = torch.Generator().manual_seed(0)
    shapes = {"blocks.{}.layers.0.weight": hidden, "lm_heads.{}.weight": VOCAB_SIZE}
    heads = {
        name.format(head): torch.randn(rows, hidden, generator=generator) * 0.08
        for head in range(2)
        for name, rows in shapes.items()
    }
    config = {"model_type": "medusa", "hidden_size": hidden, "vocab_size": VOCAB_SIZE,
              "num_heads": 2, "num_hidden_layers": 1}  # fmt: skip
    return written(path, heads, config)


def written(path: Path, weights: dict[str, torch.Tensor], config: dict) -> str:
    path.mkdir()
    save_file({name: x.clone() for name, x in weights.items()}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


def mtp_model(folder: Path) -> str:
    """A MiMo model: Qwen2's layers, and one more that reads their last state to draft a token."""
    source, path = Path(make_model("qwen2", folder)), folder / "mimo"
    if path.exists():
        return str(path)
    weights = load_file(source / "model.safetensors")
    layer, head = "model.layers.0.", "model.mtp_layers.0."
    weights |= {
        head + name.removeprefix(layer): x.clone()
        for name, x in weights.items()
        if name.startswith(layer)
    }
    hidden = weights["model.norm.weight"].shape[0]
    for norm in ("token_layernorm", "hidden_layernorm", "final_layernorm"):
        weights[f"{head}{norm}.weight"] = torch.ones(hidden)
    generator = torch.Generator().manual_seed(0)
    weights[f"{head}input_proj.weight"] = torch.randn(hidden, 2 * hidden, generator=generator) / 20
    path.mkdir()
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config |= {"architectures": ["MiMoForCausalLM"], "num_nextn_predict_layers": 1}
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


def drafted(llm) -> int:
    (count,) = [m.value for m in llm.get_metrics() if m.name == "vllm:spec_decode_num_draft_tokens"]
    return count


def answers_as_without(model, prompts, speculation) -> list[tuple[int, ...]]:
    """Drafts, and answers to the bit as an engine that does not: requests alone and in a batch.
    Returns the shapes of its caches' blocks."""
    with engine(model, "fibquant_2bit") as llm:
        expected = [answer.bits for answer in one_by_one(llm, prompts, 12)]
    with engine(model, "fibquant_2bit", speculative_config=speculation) as llm:
        alone = [answer.bits for answer in one_by_one(llm, prompts, 12)]
        together = [answer.bits for answer in generate(llm, prompts, 12)]
        assert drafted(llm) > 0
        shapes = [tuple(cache.shape[1:]) for cache in cache_tensors(llm)]
    assert alone == expected
    assert together == expected
    return shapes


@pytest.mark.parametrize("method", ["draft_model", "eagle"])
def test_drafts_do_not_matter(model_folder, method):
    prompts, model = varied_prompts(8, VOCAB_SIZE), make_model("llama", model_folder)
    draft = make_model("llama-1layer", model_folder)
    speculation = {
        "method": method,
        "model": draft if method == "draft_model" else eagle_head(model_folder),
        "num_speculative_tokens": 2,
    }
    answers_as_without(model, prompts, speculation)


@pytest.mark.parametrize(("method", "head"), [("eagle3", eagle3_head), ("medusa", medusa_heads)])
def test_heads_on_several_layers_and_heads_without_a_cache_do_not_matter(
    model_folder, method, head
):
    prompts, model = varied_prompts(8, VOCAB_SIZE), make_model("llama-4layers", model_folder)
    speculation = {"method": method, "model": head(model_folder), "num_speculative_tokens": 2}
    layers = {"eagle3": 5, "medusa": 4}[method]
    assert len(answers_as_without(model, prompts, speculation)) == layers


def test_mtp_does_not_matter(model_folder):
    """Its head is a layer with pages of its own, written and read as the model's."""
    prompts, model = varied_prompts(8, VOCAB_SIZE), mtp_model(model_folder)
    speculation = {"method": "mtp", "num_speculative_tokens": 1}
    assert answers_as_without(model, prompts, speculation) == [(2, 32, 36)] * 3


def test_an_eagle_head_that_attends_within_chunks_does_not_matter(model_folder):
    """Of Llama 4: requests of several chunks, whose tokens are drafted and verified on both sides
    of where a chunk begins."""
    prompts = varied_prompts(6, VOCAB_SIZE, longest=300, shortest=100)
    prompts += [(prompts[0] * 3)[:n] for n in (124, 250)]
    speculation = {
        "method": "eagle",
        "model": llama4_eagle_head(model_folder),
        "num_speculative_tokens": 2,
    }
    assert len(answers_as_without(make_model("llama4", model_folder), prompts, speculation)) == 3
