# SPDX-License-Identifier: Apache-2.0
"""Shapes of models: heads, head_dim, sliding windows, soft caps, sinks."""

from __future__ import annotations

import pytest
import torch

from vllm_fibquant import ops
from vllm_fibquant.ops import reference

from .architectures import FAMILIES, HEAD_DIMS, HYBRIDS, VOCAB_SIZE, quickly
from .harness import (
    engine,
    generate,
    in_batches,
    largest_difference,
    varied_prompts,
)
from .models import make_model


def dtype_of(shape: str) -> str:
    """vLLM's linear attention for CPUs computes in bfloat16 alone."""
    return "bfloat16" if shape == "qwen3-next" else "float32"


HEAD_DIM_SHAPES = [f"head-dim-{head_dim}" for head_dim in HEAD_DIMS]
# vLLM's CPU build runs neither of these two as transformers writes them, with any cache.
SERVED = [name for name in FAMILIES if name not in ("minimax-m2", "phimoe")]


@pytest.mark.parametrize("shape", ["llama-mha80", *quickly([*SERVED, *HYBRIDS, *HEAD_DIM_SHAPES])])
def test_raw_prefill_is_stock_attention(model_folder, shape):
    """A fresh prompt in `raw` mode never reads a code, so it must give what stock vLLM gives.

    This is the test of scale, window, soft cap and sinks: each changes the answer by far more
    than the bound (float32 sums in another order).
    """
    prompts = varied_prompts(8, VOCAB_SIZE)
    model = make_model(shape, model_folder)
    settings = {"max_num_batched_tokens": 2048, "dtype": dtype_of(shape)}
    answers = []
    for name, options in (("auto", None), ("fibquant_2bit", {"prefill": "raw"})):
        with engine(model, name, fibquant=options, **settings) as llm:
            answers.append(generate(llm, prompts, 1))
    other_tokens, _, largest = largest_difference(*answers)
    # Qwen2's biases make keys, and so scores and what rounding makes of them, ten times as large.
    bound = {"qwen2": 1e-3}.get(shape, 1e-4 if dtype_of(shape) == "float32" else 0.1)
    assert (other_tokens, largest < bound) == (0, True), largest


@pytest.mark.parametrize("shape", ["llama-mqa128", "gemma3", "gemma4-shared"])
def test_kernels_equal_the_oracle_through_the_engine(model_folder, shape, monkeypatch):
    """The same engine on the plain PyTorch oracle: same tokens, nearly the same bits."""
    prompts = varied_prompts(6, VOCAB_SIZE, longest=150)
    model = make_model(shape, model_folder)
    options = {"self_check": False}
    with engine(model, "fibquant_3bit", fibquant=options, max_num_batched_tokens=64) as llm:
        kernel = in_batches(llm, prompts, 3)
    monkeypatch.setattr(ops, "encode_kv", reference.encode_kv)
    monkeypatch.setattr(ops, "paged_attention", reference.paged_attention)
    with engine(model, "fibquant_3bit", fibquant=options, max_num_batched_tokens=64) as llm:
        oracle = in_batches(llm, prompts, 3)
    other_tokens, _, largest = largest_difference(kernel, oracle)
    # A codeword on the border between two may flip with the last bit of its input.
    assert other_tokens == 0
    assert largest < 0.05


@pytest.mark.parametrize("shape", ["llama4", *quickly(["gemma3n", "gemma4-shared"])])
def test_copies_serve_layers_that_read_anothers_pages(model_folder, shape):
    """Tokens within the window are read from copies in 16 bits by every layer, those that write
    no pages too, and by those that attend within a chunk: what is left is their rounding, where
    codes of 2 bits would change the text."""
    longest, window = (250, 256) if shape == "llama4" else (100, 128)  # beyond one chunk
    prompts = varied_prompts(6, VOCAB_SIZE, longest=longest)
    model = make_model(shape, model_folder)
    answers = []
    options = {"mode": "quality", "calibrate": "auto", "recent_window": window}
    for name, given in (("auto", None), ("fibquant_2bit", options), ("fibquant_2bit", {})):
        with engine(model, name, fibquant=given, max_num_batched_tokens=64) as llm:
            answers.append(generate(llm, prompts, 6))
    auto, copied, coded = answers
    other_tokens, _, largest = largest_difference(auto, copied)
    assert (other_tokens, largest < 0.1) == (0, True), largest
    assert largest_difference(auto, coded)[2] > 5 * largest


def test_sinks_follow_weights_that_are_updated(model_folder):
    """In place: captured CUDA graphs go on reading where they are."""
    prompts = varied_prompts(4, VOCAB_SIZE)
    # In float32 sinks would be the parameter itself, and follow by that alone.
    with engine(make_model("gpt-oss", model_folder), "fibquant_4bit", dtype="bfloat16") as llm:
        model_of = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        model = model_of.model_runner.get_model()
        layers = [m for m in model.modules() if hasattr(m, "impl")]
        places = [layer.impl.attend.sinks.data_ptr() for layer in layers]
        before = generate(llm, prompts, 4)
        parameters = [p for name, p in model.named_parameters() if name.endswith("sinks")]
        assert len(parameters) == len(layers)
        with torch.no_grad():
            for parameter in parameters:  # as weights in a kernel's format are reloaded
                parameter.copy_(torch.linspace(-1, 5, len(parameter)))
        updated = generate(llm, prompts, 4)
        assert updated != before
        for parameter, layer in zip(parameters, layers, strict=True):
            assert torch.equal(layer.impl.attend.sinks, parameter.float())
            parameter.data.fill_(7.0)  # as vLLM copies a checkpoint's: no version is counted
            layer.impl.process_weights_after_loading(torch.float32)
            assert (layer.impl.attend.sinks == 7.0).all()
        assert [layer.impl.attend.sinks.data_ptr() for layer in layers] == places
