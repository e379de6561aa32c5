# SPDX-License-Identifier: Apache-2.0
"""Models with latent attention (MLA), served by codes of their latents."""

from __future__ import annotations

import json

import pytest
import torch

from vllm_fibquant import ops
from vllm_fibquant.cli import plan
from vllm_fibquant.cli.main import main
from vllm_fibquant.codec.latent import LatentCodec
from vllm_fibquant.engine import capacity, latent_support, self_checks
from vllm_fibquant.engine.report import worker_report
from vllm_fibquant.ops import latent

from .architectures import LATENTS, VOCAB_SIZE, quickly
from .harness import DEFAULTS, engine, generate, largest_difference, varied_prompts
from .models import make_model
from .test_refusals import refusal_of

SETTINGS = {"fibquant": DEFAULTS, "block_size": 16}
RECORD_BYTES = {"fibquant_4bit": 512 // 2 + 2 + 128, "fibquant_2bit": 512 // 4 + 2 + 128}


@pytest.mark.parametrize("shape", ["deepseek-v2", *quickly(x for x in LATENTS if x[-1] != "2")])
def test_a_fresh_prompt_is_stock_attention(model_folder, shape):
    """Its own tokens, unless it is but one, are read as computed; those after it from records."""
    model, answers = make_model(shape, model_folder), []
    prompts = varied_prompts(8, VOCAB_SIZE, shortest=2)
    for name in ("auto", "fibquant_4bit", "fibquant_1bit"):
        with engine(model, name, **SETTINGS) as llm:
            answers.append(generate(llm, prompts, 1) + generate(llm, prompts, 8))
    stock, fine, coarse = answers
    for coded in (fine, coarse):
        other_tokens, _, largest = largest_difference(stock[:8], coded[:8])
        assert (other_tokens, largest < 1e-4) == (0, True), largest
        # Records are read: what comes after differs.
        assert all(a.bits != b.bits for a, b in zip(stock[8:], coded[8:], strict=True))


def test_with_latents_switched_off_it_is_attention(model_folder, monkeypatch):
    """vLLM pads the values to the length of keys, whatever the configuration says of theirs."""
    monkeypatch.setenv("VLLM_MLA_DISABLE", "1")
    answers, prompts = [], varied_prompts(6, VOCAB_SIZE)
    model = make_model("deepseek-v2", model_folder)
    for name, options in (("auto", None), ("fibquant_2bit", {"prefill": "raw"})):
        with engine(model, name, fibquant=options, max_num_batched_tokens=2048) as llm:
            assert not latent_support.latent_layers(llm.llm_engine.vllm_config)
            answers.append(generate(llm, prompts, 1))
    other_tokens, _, largest = largest_difference(*answers)
    assert (other_tokens, largest < 1e-4) == (0, True), largest


def test_what_is_served_is_the_codec(model_folder, monkeypatch):
    """vLLM's own kernel over latents that went through the codec gives the same answers."""
    from vllm.v1.attention.backends.mla import cpu_mla

    prompts, model = varied_prompts(6, VOCAB_SIZE), make_model("deepseek-v2", model_folder)
    with engine(model, "fibquant_2bit", **SETTINGS) as llm:
        impls = list(latent_support.latent_layers(llm.llm_engine.vllm_config).values())
        coded = generate(llm, prompts, 8)
    codec: LatentCodec = impls[0].codec
    update = cpu_mla.CPUMLAImpl.do_kv_cache_update

    def through_codec(self, kv_c_normed, k_pe, *rest):
        records = codec.encode_records(kv_c_normed, k_pe.squeeze(1))
        rotated, rotary = codec.decode_records_rotated(records)
        update(self, codec.latent.rotation.inverse(rotated), rotary[:, None], *rest)

    monkeypatch.setattr(cpu_mla.CPUMLAImpl, "do_kv_cache_update", through_codec)
    with engine(model, "auto", **SETTINGS) as llm:
        dense = generate(llm, prompts, 8)
    other_tokens, _, largest = largest_difference(dense, coded)
    assert (other_tokens, largest < 1e-4) == (0, True), largest


@pytest.mark.parametrize("preset", RECORD_BYTES)
def test_pages_hold_records_alone(model_folder, preset):
    model = make_model("deepseek-v2", model_folder)
    with engine(model, preset, **SETTINGS) as llm:
        config = llm.llm_engine.vllm_config
        layers = config.compilation_config.static_forward_context
        caches = [layers[name].kv_cache for name in latent_support.latent_layers(config)]
        report = worker_report(config)
        num_tokens = config.cache_config.kv_cache_size_tokens
        fits = capacity.what_fits(config, 64 << 20)
    assert [(c.dtype, *c.shape[1:]) for c in caches] == [
        (torch.uint8, 16, RECORD_BYTES[preset])
    ] * 2
    assert report["token_bytes"]["stored"] == 2 * RECORD_BYTES[preset]
    assert report["kernel"] == ops.CPU.name
    assert [check["kernel"] for check in report["self_checks"]][-1:] == [ops.CPU.name]
    assert report["token_bytes"]["16bit"] == 2 * 2 * 576
    assert (report["num_layers"], report["num_coded_layers"]) == (2, 2)
    assert report["codes"][0]["record_bytes"] == RECORD_BYTES[preset]
    assert num_tokens == fits["stored"].num_tokens == (64 << 20) // (32 * RECORD_BYTES[preset]) * 16
    assert fits["16bit"].num_tokens == (64 << 20) // (32 * 1152) * 16


def test_plan_is_the_engines_capacity(model_folder, capsys):
    model, found = make_model("deepseek-v2", model_folder), {}
    for name in ("auto", "fibquant_2bit"):
        with engine(model, name, dtype="bfloat16", **SETTINGS) as llm:
            cache = llm.llm_engine.vllm_config.cache_config
            found[name] = cache.num_gpu_blocks, cache.kv_cache_max_concurrency
    shape, _, capacities = plan.plan_model(model, 64 << 20, 512, block_size=16, max_num_seqs=8)
    planned = {c.kv_cache_dtype: c for c in capacities}
    assert "fp8" not in planned
    for name, told in (("auto", planned["bf16"]), ("fibquant_2bit", planned["fibquant_2bit"])):
        assert (told.num_blocks, told.max_concurrency) == found[name]
    assert planned["fibquant_2bit"].effective_rate == 8 * RECORD_BYTES["fibquant_2bit"] / 576
    assert "fibquant_2bit" in plan.render(shape, 64 << 20, 512, capacities)
    # The commands say the same, without being told of modes, which latents have not.
    asked = [model, "--memory", "64MiB", "--context", "512", "--json"]
    capsys.readouterr()  # what the engines have logged
    assert main(["plan", *asked, "--block-size", "16", "--max-num-seqs", "8"]) == 0
    told = json.loads(capsys.readouterr().out)["capacities"]
    assert {c["kv_cache_dtype"]: c["num_blocks"] for c in told}["bf16"] == found["auto"][0]
    assert main(["doctor", *asked]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["no_capacity"] is None and report["capacity"][-1]["num_tokens"] > 0


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"additional_config": {"fibquant": {"mode": "exact"}}}, "mode: must be left out"),
        ({"additional_config": {"fibquant": {"mode": "quality"}}}, "mode: must be left out"),
        ({"additional_config": {"fibquant": {"calibrate": "means"}}}, "calibrate: must be none"),
        ({"additional_config": {"fibquant": {"monitor": True}}}, "monitor: must be left out"),
        (
            {"additional_config": {"fibquant": {"layers": {"0": "fibquant_4bit"}}}},
            "layers: must be left out",
        ),
        ({"kv_cache_dtype_skip_layers": ["0"]}, "--kv-cache-dtype-skip-layers: must be empty"),
        ({"hf_overrides": {"index_topk": 64}}, "got sparse attention to latents"),
        ({"hf_overrides": {"kv_lora_rank": 48}}, "codebook build"),
        ({"hf_overrides": {"kv_lora_rank": 56}}, "kv_lora_rank: must be a multiple of 16"),
    ],
)  # fmt: skip
def test_what_is_refused(model_folder, settings, told):
    assert told in refusal_of(make_model("deepseek-v2", model_folder), **settings)


def test_kernels_that_disagree_with_the_oracle_do_not_serve(model_folder, monkeypatch):
    write = latent.write_latents
    monkeypatch.setattr(
        latent, "write_latents", lambda codec, x, *rest: write(codec, x * 1.05, *rest)
    )
    self_checks._check_latents.cache_clear()
    with (
        pytest.raises(RuntimeError, match="run_latent_check: .* refusing to serve"),
        engine(make_model("deepseek-v2", model_folder), "fibquant_2bit", **SETTINGS),
    ):
        pass


def test_a_processor_with_amx_is_told_what_helps(model_folder, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    told = refusal_of(make_model("deepseek-v2", model_folder))
    assert "give --attention-backend CPU_MLA" in told
