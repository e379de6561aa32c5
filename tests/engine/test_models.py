# SPDX-License-Identifier: Apache-2.0
"""Shapes of models: heads, head_dim, sliding windows, soft caps, sinks."""

from __future__ import annotations

import pytest
import torch

from vllm_fibquant import ops
from vllm_fibquant.ops import reference

from .harness import engine, generate, in_batches, largest_difference, varied_prompts
from .models import VOCAB_SIZE, make_model

SHAPES = ("llama", "llama-mha80", "llama-mqa128", "gemma2", "gemma3", "gpt-oss")


def shapes(*quick: str):
    """Every shape; those not in `quick` are for the slow run."""
    return pytest.mark.parametrize(
        "shape",
        [s if s in quick else pytest.param(s, marks=pytest.mark.slow) for s in SHAPES],
    )


@shapes("llama-mha80", "gemma2", "gpt-oss")
def test_raw_prefill_is_stock_attention(model_folder, shape):
    """A fresh prompt in `raw` mode never reads a code, so it must give what stock vLLM gives.

    This is the test of scale, window, soft cap and sinks: each changes the answer by far more
    than the bound (float32 sums in another order).
    """
    prompts = varied_prompts(8, VOCAB_SIZE)
    model = make_model(shape, model_folder)
    answers = []
    for name, options in (("auto", None), ("fibquant_2bit", {"prefill": "raw"})):
        with engine(model, name, fibquant=options, max_num_batched_tokens=2048) as llm:
            answers.append(generate(llm, prompts, 1))
    other_tokens, _, largest = largest_difference(*answers)
    assert (other_tokens, largest < 1e-4) == (0, True), largest


@shapes("llama-mqa128", "gemma3")
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


def test_sinks_follow_weights_that_are_updated(model_folder):
    """In place: captured CUDA graphs go on reading where they are."""
    prompts = varied_prompts(4, VOCAB_SIZE)
    with engine(make_model("gpt-oss", model_folder), "fibquant_4bit") as llm:
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
