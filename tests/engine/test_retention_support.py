# SPDX-License-Identifier: Apache-2.0
"""Which models and settings a bounded cache goes with."""

from __future__ import annotations

import pytest

from .harness import generate, varied_prompts
from .models import VOCAB_SIZE, make_config_only, make_model
from .test_retention import RETAIN, retaining


def refusal_of(model: str, **settings) -> str:
    from vllm.engine.arg_utils import EngineArgs

    with pytest.raises(ValueError) as caught:
        EngineArgs(
            model=model, kv_cache_dtype="fibquant_2bit", skip_tokenizer_init=True,
            max_model_len=512, additional_config={"fibquant": {"retain": RETAIN}}, **settings,
        ).create_engine_config()  # fmt: skip
    return str(caught.value)


def test_every_reason_is_given_at_once(model_folder):
    told = refusal_of(
        make_model("gemma3", model_folder),
        kv_cache_dtype_skip_layers=["0"],
        kv_transfer_config={"kv_connector": "ExampleConnector", "kv_role": "kv_both"},
        speculative_config={
            "method": "draft_model",
            "model": make_model("llama", model_folder),
            "num_speculative_tokens": 2,
        },
    )  # fmt: skip
    for part in (
        "retain: model must be one of",
        "got Gemma3ForCausalLM",
        "retain: layers must all have full attention",
        "retain: --kv-cache-dtype-skip-layers must be empty, got 0",
        "retain: speculative decoding must be off or ngram, got draft_model",
        "retain: KV connectors and offloading must be off",
    ):
        assert part in told
    assert told.count("\n  - ") == 5


COMMON = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 256, "intermediate_size": 256,
    "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
}  # fmt: skip
GPTJ = {
    "vocab_size": VOCAB_SIZE, "n_embd": 256, "n_layer": 1, "n_head": 4, "rotary_dim": 32,
    "n_positions": 512,
}  # fmt: skip
CONFIGS = {
    "GPTJForCausalLM": {**GPTJ, "model_type": "gptj"},
    "GemmaForCausalLM": {**COMMON, "model_type": "gemma"},
    "GraniteForCausalLM": {**COMMON, "model_type": "granite"},
    "MistralForCausalLM": {**COMMON, "model_type": "mistral", "sliding_window": None},
    "Qwen2ForCausalLM": {**COMMON, "model_type": "qwen2"},
    "Qwen3ForCausalLM": {**COMMON, "model_type": "qwen3"},
    "StableLmForCausalLM": {**COMMON, "model_type": "stablelm"},
}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", CONFIGS)
def test_architectures(architecture, model_folder):
    """Random weights: each model's embedding is found beside its layers, and turns."""
    config = {"architectures": [architecture], **CONFIGS[architecture]}
    model = make_config_only(architecture, config, model_folder)
    with retaining(model, max_model_len=512, load_format="dummy") as llm:
        (answer,) = generate(llm, varied_prompts(1, VOCAB_SIZE, 300, 300), 8)
    assert len(answer.tokens) == 8


def test_a_layer_with_a_window_of_its_own():
    """Should a model have one that its configuration does not tell of."""
    from vllm.config import VllmConfig, set_current_vllm_config

    from vllm_fibquant.engine import attention

    config = VllmConfig(additional_config={"fibquant": {"retain": RETAIN}})
    config.cache_config.cache_dtype = "fibquant"
    with (
        set_current_vllm_config(config),
        pytest.raises(ValueError, match="full attention, got a window of 64"),
    ):
        attention.FibQuantImpl(4, 64, 0.125, 2, sliding_window=64)


def test_positions_the_model_does_not_know(model_folder):
    """Found when the model is built, before anything is served: the remedy is in the message."""
    model = make_model("llama", model_folder)
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(ValueError, match="know all 4096 positions .*got 2048.*hf-overrides"),
    ):
        patch.setenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
        with retaining(model, max_model_len=4096):
            pass
    longer = {"max_position_embeddings": 4096}
    with retaining(model, max_model_len=4096, hf_overrides=longer) as llm:
        (answer,) = generate(llm, varied_prompts(1, VOCAB_SIZE, longest=2100, shortest=2100), 4)
    assert len(answer.tokens) == 4
