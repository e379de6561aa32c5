# SPDX-License-Identifier: Apache-2.0
"""What a user is told who asks for something we do not serve."""

from __future__ import annotations

import re

import pytest

from vllm_fibquant.codec import codec
from vllm_fibquant.engine.planned import planned

from .harness import engine, generate, varied_prompts
from .models import VOCAB_SIZE, make_config_only, make_model

MLA_MODEL = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 64,
    "q_lora_rank": None,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "max_position_embeddings": 512,
    "first_k_dense_replace": 1,
}
ALIBI_MODEL = {
    "architectures": ["BloomForCausalLM"],
    "model_type": "bloom",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 256,
    "n_layer": 1,
    "n_head": 4,
}
EMBEDDING_MODEL = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "max_position_embeddings": 512,
}


HEAD_DIM_68 = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 272,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}


def refusal_of(model: str, kv_cache_dtype: str = "fibquant_2bit", **settings) -> str:
    """What the user is told, before any process is started."""
    from vllm.engine.arg_utils import EngineArgs

    settings = {"skip_tokenizer_init": True, "max_model_len": 512, **settings}
    with pytest.raises(ValueError) as caught:
        EngineArgs(model=model, kv_cache_dtype=kv_cache_dtype, **settings).create_engine_config()
    return str(caught.value)


def test_unknown_preset(model_folder):
    told = refusal_of(make_model("llama", model_folder), "fibquant_5bit")
    assert "fibquant_2bit" in told
    assert "fibquant_5bit" in told


@pytest.mark.parametrize(
    "settings",
    [
        {"kv_cache_dtype_skip_layers": ["0"]},
        {"additional_config": {"fibquant": {"layers": {"0": "fibquant_4bit"}}}},
    ],
    ids=["skipped", "presets"],
)
def test_single_layers_of_a_model_with_chunks(model_folder, settings):
    told = refusal_of(make_model("llama4", model_folder), **settings)
    assert "must be empty for a model with chunked local attention" in told


def test_chunks_that_blocks_do_not_divide(model_folder):
    text = {"architectures": ["Llama4ForCausalLM"], "model_type": "llama4_text"}
    shape = {**HEAD_DIM_68, **text, "hidden_size": 256, "attention_chunk_size": 64, "head_dim": 64}
    model = make_config_only("llama4-alone", shape, model_folder)
    told = refusal_of(model, block_size=96)
    assert "--block-size: must be a divisor of 64, one chunk of this model's local" in told


def test_values_shorter_than_keys(model_folder):
    """MiMo-V2: vLLM's backends for it are for GPUs."""
    shape = {"architectures": ["MiMoV2FlashForCausalLM"], "model_type": "mimo_v2_flash"}
    shape |= {"num_key_value_heads": 2, "head_dim": 192, "v_head_dim": 128}
    shape |= {"layer_types": ["full_attention"], "mlp_layer_types": ["dense"]}
    told = refusal_of(make_config_only("mimo-v2", {**HEAD_DIM_68, **shape}, model_folder))
    assert "model: must be one whose values are as long as its keys, got 128 and 192" in told


def test_embedding_model(model_folder):
    told = refusal_of(make_config_only("bert", EMBEDDING_MODEL, model_folder))
    assert "runner: must be generate, got pooling" in told


def test_head_dim_without_a_codebook(model_folder):
    told = refusal_of(make_model("llama-d48", model_folder))
    assert "48" in told
    assert "codebook build" in told


def test_head_dim_that_cannot_be_cut(model_folder):
    told = refusal_of(make_model("llama-d62", model_folder))
    assert "subvec_dim must divide head_dim, got subvec_dim 4 and head_dim 62" in told


def test_unknown_option(model_folder):
    told = refusal_of(
        make_model("llama", model_folder), additional_config={"fibquant": {"window": 64}}
    )
    assert "got 'window'" in told
    assert "prefill" in told


def test_options_one_level_too_high(model_folder):
    told = refusal_of(make_model("llama", model_folder), additional_config={"mode": "quality"})
    assert 'options must be under "fibquant", got mode in its place' in told


def test_decode_context_parallel(model_folder):
    """Ranks would need each other's softmax sums, which attention does not return. (For prefill
    vLLM itself refuses: its runner for CPUs has none.)"""
    told = refusal_of(
        make_model("llama-mqa128", model_folder),
        tensor_parallel_size=2,
        distributed_executor_backend="mp",
        decode_context_parallel_size=2,
    )
    assert "decode_context_parallel_size: must be 1, got 2; use tensor, pipeline or data" in told


@pytest.mark.parametrize("block_size", [8, 24, 100])
def test_block_size(model_folder, block_size):
    told = refusal_of(make_model("llama", model_folder), block_size=block_size)
    assert f"--block-size: must be a multiple of 16, got {block_size}; give another" in told


def test_a_drafts_head_dim_is_told_as_the_drafts(model_folder):
    draft = make_model("llama-d62", model_folder)
    settings = {"method": "draft_model", "model": draft, "num_speculative_tokens": 2}
    told = refusal_of(make_model("llama", model_folder), speculative_config=settings)
    assert re.search(rf"draft model {draft}: .*must divide head_dim, got .* head_dim 62", told)
    assert '"kv_cache_dtype": "auto" in --speculative-config' in told
    assert told.count("\n  - ") == 1


def test_a_draft_whose_own_cache_is_in_16_bits_is_served(model_folder):
    speculation = {
        "method": "draft_model",
        "model": make_model("llama-d48", model_folder),
        "num_speculative_tokens": 2,
        "kv_cache_dtype": "auto",
    }
    model, prompts = make_model("llama", model_folder), varied_prompts(4, VOCAB_SIZE)
    with engine(model, "fibquant_2bit", speculative_config=speculation) as llm:
        answers = generate(llm, prompts)
    with engine(model, "fibquant_2bit") as llm:
        expected = generate(llm, prompts)
    assert [a.tokens for a in answers] == [a.tokens for a in expected]


def test_a_refusals_hint_leads_to_a_server(model_folder, tmp_path, monkeypatch):
    """Every codebook that is missing is named at once; with those built nothing is refused."""
    from vllm_fibquant.cli.main import main

    monkeypatch.setenv("FIBQUANT_CACHE_DIR", str(tmp_path))
    model = make_model("llama-d48", model_folder)
    told = refusal_of(model, "fibquant_k5v3")
    commands = re.findall(r"python -m vllm_fibquant (codebook build [^;\n\[]*)", told)
    assert len(commands) == 2
    quick = ["--restarts", "1", "--samples", "4096", "--iterations", "2"]
    for command in commands:
        assert main([*command.split(), *quick]) == 0
    codec._kv_codec.cache_clear()
    with engine(model, "fibquant_k5v3") as llm:
        assert len(generate(llm, [[3, 4, 5]])[0].tokens) == 8
    codec._kv_codec.cache_clear()


def test_layers_where_they_cannot_have_their_own_presets(model_folder):
    told = refusal_of(
        make_model("gemma2", model_folder),
        additional_config={"fibquant": {"layers": {"0-2": "fibquant_4bit"}}},
        kv_cache_dtype_skip_layers=["0"],
        kv_transfer_config={"kv_connector": "ExampleConnector", "kv_role": "kv_both"},
        disable_hybrid_kv_cache_manager=False,
        speculative_config={
            "method": "draft_model",
            "model": make_model("llama", model_folder),
            "num_speculative_tokens": 2,
        },
    )
    for part in (
        "layers: they must not be among --kv-cache-dtype-skip-layers, got 0 there",
        "layers: speculative decoding must be off or ngram, got draft_model",
        "layers: KV connectors and offloading must be off",
        "layers: they must be from 0 to 1 for this model, got 2",
        "layers: pages must be equally large in models that mix",
    ):
        assert part in told
    assert told.count("\n  - ") == 5


def test_layers_whose_preset_the_head_dim_does_not_allow(model_folder):
    told = refusal_of(
        make_config_only("d68", {**HEAD_DIM_68}, model_folder),
        additional_config={"fibquant": {"layers": {"0": "fibquant_1bit"}}},
    )
    assert "subvec_dim must divide head_dim, got subvec_dim 8 and head_dim 68" in told


def test_every_reason_is_given_at_once(model_folder):
    told = refusal_of(
        make_config_only("mla", MLA_MODEL, model_folder),
        kv_sharing_fast_prefill=True,
        kv_transfer_config={"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both"},
    )
    for part in ("latent attention", "--kv-sharing-fast-prefill", "LMCacheConnectorV1"):
        assert part in told
    assert told.count("\n  - ") == 3


@pytest.mark.parametrize(
    "settings",
    [
        {"kv_transfer_config": {"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both"}},
        {"kv_transfer_config": {"kv_connector": "LMCacheMPConnector", "kv_role": "kv_both"}},
        {
            "kv_transfer_config": {
                "kv_connector": "MultiConnector",
                "kv_role": "kv_both",
                "kv_connector_extra_config": {
                    "connectors": [
                        {"kv_connector": "ExampleConnector", "kv_role": "kv_both"},
                        {"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both"},
                    ]
                },
            }
        },
        {"kv_offloading_size": 1, "kv_offloading_backend": "lmcache"},
    ],
    ids=["in process", "its server", "among several", "--kv-offloading-backend"],
)
def test_lmcache(model_folder, settings, monkeypatch):
    from vllm.distributed.kv_transfer.kv_connector import factory

    # The connector to LMCache's server cannot be imported where LMCache is not installed.
    registry = factory.KVConnectorFactory._registry
    monkeypatch.setitem(registry, "LMCacheMPConnector", registry["ExampleConnector"])
    told = refusal_of(make_model("llama", model_folder), **settings)
    assert "LMCache sizes its buffers wrongly for packed pages" in told


@pytest.mark.parametrize(
    "settings",
    [
        {"kv_offloading_size": 1},
        {"kv_transfer_config": {"kv_connector": "OffloadingConnector", "kv_role": "kv_both"}},
        {"kv_transfer_config": {"kv_connector": "SimpleCPUOffloadConnector", "kv_role": "kv_both"}},
    ],
    ids=["--kv-offloading-size", "OffloadingConnector", "SimpleCPUOffloadConnector"],
)
def test_offloading_to_host_memory(model_folder, settings):
    """vLLM's own needs a GPU, and says so only when the model is loaded."""
    told = refusal_of(make_model("llama", model_folder), **settings)
    assert "KV offloading: must be off on CPUs" in told
    assert "--kv-cache-memory-bytes" in told


def test_damaged_codebook(model_folder, tmp_path, monkeypatch):
    """A flipped bit in a codebook is found before anything is started."""
    from vllm_fibquant.codec import codebook

    name = next(p for p in codebook.SHIPPED_DIR.iterdir() if p.name.startswith("d64-k4n256-"))
    content = bytearray(name.read_bytes())
    content[-40] ^= 1
    (tmp_path / name.name).write_bytes(content)
    monkeypatch.setattr(codebook, "SHIPPED_DIR", tmp_path)
    codec._kv_codec.cache_clear()
    try:
        told = refusal_of(make_model("llama", model_folder))
    finally:
        codec._kv_codec.cache_clear()
    assert name.name in told
    assert "cannot be used here" in told


def test_alibi_is_refused_when_the_layer_is_built(model_folder):
    """Known of the layer alone; the message still names what to do."""
    model = make_config_only("alibi", ALIBI_MODEL, model_folder)
    with (
        pytest.raises(ValueError, match="must be in the keys .such as RoPE., got ALiBi"),
        engine(model, "fibquant_2bit", load_format="dummy"),
    ):
        pass


def test_layers_that_take_no_notice_of_the_cache_dtype(model_folder):
    """They would keep 16 bits, whatever was asked for."""
    model = make_model("falcon", model_folder)
    with (
        pytest.raises(ValueError, match="FalconForCausalLM, for whose 2 layers vLLM ignores it"),
        engine(model, "fibquant_2bit"),
    ):
        pass
    with pytest.raises(ValueError, match="vLLM ignores it"):
        planned(model, "fibquant_2bit", 64 << 20, max_model_len=512)


def test_not_enough_memory_for_one_sequence(model_folder):
    """vLLM's own message, with our page size in it: it names a length that would fit."""
    model = make_model("llama", model_folder)
    with (
        pytest.raises(ValueError, match="(?s)max seq len .512.*estimated maximum model length"),
        engine(model, "fibquant_2bit", kv_cache_memory_bytes=50_000),
    ):
        pass
