# SPDX-License-Identifier: Apache-2.0
"""Chunked local attention (Llama 4): requests of several chunks, whose oldest pages vLLM frees.

What they answer beside `auto` is in test_models.py.
"""

from __future__ import annotations

import shutil
import statistics
from types import SimpleNamespace

import pytest
import torch

from tests.ops.test_raw_states import flash_attn_varlen_func
from vllm_fibquant import ops
from vllm_fibquant.codec.codec import KVCodec
from vllm_fibquant.codec.config import get_preset
from vllm_fibquant.engine import device_pool, layers, measure, raw_library, reading
from vllm_fibquant.engine.layers import our_layers
from vllm_fibquant.ops import Attend, raw_states

from .harness import engine, generate, num_preemptions, random_text, varied_prompts
from .models import VOCAB_SIZE, make_model
from .test_emulated_gpu import NUM_ROWS, calls, differences_of  # noqa: F401

CHUNK, SHORT_CHUNK = 128, 32
GPU_OPTIONS = {
    "codes": {"prefill": "codes", "calibrate": "transform"},
    "raw": {"prefill": "raw", "calibrate": "none"},
    "quality": {"mode": "quality", "recent_window": 24, "calibrate": "transform"},
}


def attends_of(llm) -> list:
    """How each layer attends."""
    return [layer.attend for layer in our_layers(llm.llm_engine.vllm_config).values()]


@pytest.mark.versions
def test_steps_and_cached_prefixes_do_not_matter(model_folder):
    """Chunks begin where the request's positions say, however it is cut into steps, and are found
    again by the prefix cache; the tokens before them are forgotten."""
    model = make_model("llama4", model_folder)
    prompts = varied_prompts(6, VOCAB_SIZE, longest=300, shortest=100)
    answers = []
    for settings in (
        {"max_num_batched_tokens": 2048},
        {"max_num_batched_tokens": 96},
        {"max_num_batched_tokens": 2048, "enable_prefix_caching": True},
    ):
        with engine(model, "fibquant_2bit", **settings) as llm:
            assert sorted(attend.chunk for attend in attends_of(llm)) == [0, CHUNK]
            answers.append(generate(llm, prompts, 4))
            if "enable_prefix_caching" in settings:
                answers.append(generate(llm, prompts, 4))
    assert any(answer.num_cached >= CHUNK for answer in answers[-1])
    assert all([a.bits for a in x] == [a.bits for a in answers[0]] for x in answers)


def test_a_limit_of_one_chunk_needs_no_mask(model_folder):
    """Nor what it costs."""
    model = make_model("llama4", model_folder)
    with engine(model, "fibquant_2bit", max_model_len=CHUNK) as llm:
        assert not any("chunk" in attend.asked for attend in attends_of(llm))


def answers(model, prompts, settings) -> list:
    """Of requests together, of which one is preempted, and of the first once more."""
    with engine(model, "fibquant_3bit", **settings) as llm:
        assert sorted(attend.chunk for attend in attends_of(llm)) == [0, SHORT_CHUNK]
        found = generate(llm, prompts, 20) + generate(llm, prompts[:1], 20)
        assert num_preemptions(llm) > 0
    return found


@pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator needs g++")
@pytest.mark.parametrize("name", GPU_OPTIONS)
def test_gpus_answer_as_cpus(name, model_folder, calls, monkeypatch, tmp_path):  # noqa: F811
    """The emulated CUDA kernels; with "raw" the new tokens by a library, which gets them cut."""
    monkeypatch.setenv("FIBQUANT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(measure, "text_sequences", random_text)
    monkeypatch.setattr(layers, "num_copy_rows", lambda *args: NUM_ROWS)
    model, prompts = make_model("llama4", model_folder), [list(range(2, 72)), [5, 7] * 21]
    options = {**GPU_OPTIONS[name], "fidelity_gate": False, "self_check": False}
    settings = {
        "block_size": 16, "enable_prefix_caching": True, "max_model_len": 96, "max_num_seqs": 2,
        "max_num_batched_tokens": 40, "num_gpu_blocks_override": 14, "fibquant": options,
        "hf_overrides": {"attention_chunk_size": SHORT_CHUNK},
    }  # fmt: skip
    lengths: list[int] = []

    def counted(q, *args, **kwargs):
        lengths.extend(kwargs["cu_seqlens_q"].diff().tolist())
        return flash_attn_varlen_func(q, *args, **kwargs)

    library = raw_states.flash_attention(counted, 2) if name == "raw" else None
    found = []
    with monkeypatch.context() as on_a_gpu:
        on_a_gpu.setattr(device_pool, "serves", lambda device_type: name == "quality")
        on_a_gpu.setattr(raw_library, "library_for", lambda head_dim, soft_cap: library)
        on_a_gpu.setattr(raw_states, "LIBRARY_DTYPES", (torch.float32,))
        on_a_gpu.setattr(raw_states, "MIN_NEW_TOKENS", 0)
        found.append(answers(model, prompts, settings))
    monkeypatch.setattr(ops, "choose", lambda codec, cache: ops.CPU)
    found.append(answers(model, prompts, settings))
    assert calls["attend"] > 0 and calls["mapped"] == (name != "raw") * calls["attend"]
    assert (calls["copies"] > 0) == (name == "quality")
    # A step's new tokens in the layer with chunks: one of 40 is cut, one of the other layer is not.
    assert (SHORT_CHUNK in lengths and max(lengths) > SHORT_CHUNK) == (name == "raw")
    differences = differences_of(*found)
    assert len(differences) > 20 and statistics.median(differences) < 1e-2


class OnGpu(torch.Tensor):
    """A tensor that takes itself for one of a GPU."""

    is_cpu = False


def test_keys_are_measured_within_chunks():
    """On a GPU, before there are pages, by plain PyTorch; on a CPU by the kernels."""
    codec = KVCodec.from_preset(get_preset("fibquant"), 64)
    impl = SimpleNamespace(num_kv_heads=2, head_size=64, codec=codec, attend=Attend(0.3, chunk=11))
    new = torch.randn(3, 40, 2, 64, generator=torch.Generator().manual_seed(0))
    outs = []
    for given in (new, new.as_subclass(OnGpu)):
        collector = measure.LayerCollector(impl, None)
        collector.num_seqs = 2
        outs.append(collector(*given, torch.full_like(new[0], torch.nan)))
    assert torch.allclose(*outs, atol=1e-5)
    impl.attend = Attend(0.3)
    assert not torch.allclose(measure.LayerCollector(impl, None)(*new, outs[1].clone()), outs[0])


def test_layers_that_are_not_ours_are_read_within_chunks():
    """As `reading.attending` has vLLM's own layers attend."""
    impl = SimpleNamespace(num_heads=2, num_kv_heads=2, head_size=64, scale=0.3)
    layer = SimpleNamespace(attention_chunk_size=11)
    new = torch.randn(3, 40, 2, 64, generator=torch.Generator().manual_seed(0))
    attend = reading._stock_attention(impl, lambda: 2)
    got = attend(layer, *new, output=torch.empty_like(new[0]))
    assert torch.allclose(got, reading.attend_dense(*new, 20, 0.3, chunk=11))
    assert not torch.allclose(got, reading.attend_dense(*new, 20, 0.3), atol=1e-3)
