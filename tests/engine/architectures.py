# SPDX-License-Identifier: Apache-2.0
"""Configurations of popular architectures, tiny, and of other shapes that matter.

Every setting that changes attention or the cache is there (heads, head_dims, windows, soft caps,
sinks, norms, which layers attend at all); sizes are about the smallest vLLM's CPU build accepts.
`models.make_model` gives them random weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

VOCAB_SIZE = 512
MAX_LEN = 2048

COMMON = {
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": MAX_LEN,
    "num_hidden_layers": 2,
    "hidden_size": 256,
    "intermediate_size": 384,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}

Made = tuple[type, Any]
"""transformers' class of a model, and its configuration."""


def of(name: str, config_name: str | None = None, **settings: Any) -> Callable[[], Made]:
    """A model of transformers' class `name`, with 4 query and 2 KV heads of 64.

    A setting of None leaves out what COMMON and HEADS would give.
    """

    def make() -> Made:
        import transformers

        config = getattr(transformers, f"{config_name or name}Config")
        model = getattr(transformers, f"{name}ForCausalLM")
        fields = {**COMMON, **HEADS, **settings}
        return model, config(**{name: x for name, x in fields.items() if x is not None})

    return make


def llama(**settings: Any) -> Callable[[], Made]:
    """As `of`, with 3 query heads for each KV head."""
    return of("Llama", **{"hidden_size": 192, "num_attention_heads": 6, **settings})


def gemma4(head_dim: int = 128, global_head_dim: int = 256, **settings: Any) -> Callable[[], Made]:
    """Records of two sizes: full attention has a head_dim of its own."""
    return of(
        "Gemma4",
        "Gemma4Text",
        head_dim=head_dim,
        global_head_dim=global_head_dim,
        sliding_window=64,
        num_hidden_layers=6,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
        hidden_size_per_layer_input=0,
        **{"num_kv_shared_layers": 0, **settings},
    )


MIXED = {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
SHARED_EXPERT = {**EXPERTS, "shared_expert_intermediate_size": 64}
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_state": 16, "mamba_n_groups": 1}
LINEAR = {
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
}

FAMILIES: dict[str, Callable[[], Made]] = {
    "apertus": of("Apertus"),
    "arcee": of("Arcee"),
    "cohere": of("Cohere"),
    "cohere2": of("Cohere2", **MIXED),
    "ernie45": of("Ernie4_5"),
    "exaone4": of("Exaone4", **MIXED),
    "gemma": of("Gemma", tie_word_embeddings=True),
    # Sliding window on every other layer, and a soft cap on scores.
    "gemma2": of(
        "Gemma2",
        hidden_size=192,
        sliding_window=64,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=30.0,
        query_pre_attn_scalar=64,
        tie_word_embeddings=True,
    ),
    # Five sliding-window layers, then a global one; normalised queries and keys.
    "gemma3": of(
        "Gemma3",
        "Gemma3Text",
        hidden_size=192,
        num_hidden_layers=6,
        num_key_value_heads=1,
        head_dim=256,
        sliding_window=64,
        query_pre_attn_scalar=256,
        tie_word_embeddings=True,
    ),
    # Its last two layers read the pages of the two before them.
    "gemma3n": of(
        "Gemma3n",
        "Gemma3nText",
        num_hidden_layers=6,
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 3,
        sliding_window=64,
        hidden_size_per_layer_input=32,
        vocab_size_per_layer_input=VOCAB_SIZE,
        laurel_rank=16,
        altup_num_inputs=2,
        altup_active_idx=0,
        intermediate_size=384,
        activation_sparsity_pattern=[0.0] * 6,
    ),
    "gemma4": gemma4(),
    "gemma4-shared": gemma4(num_kv_shared_layers=3),
    "glm4": of("Glm4"),
    "glm4-moe": of(
        "Glm4Moe",
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        n_shared_experts=1,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
    ),
    # Attention sinks, alternating sliding windows, mixture of experts.
    "gpt-oss": of(
        "GptOss", hidden_size=192, num_attention_heads=8, sliding_window=64, **LOCAL_EXPERTS
    ),
    "gpt-neox": of("GPTNeoX"),
    "granite": of("Granite"),
    "granite-moe": of("GraniteMoe", **LOCAL_EXPERTS),
    "hunyuan": of("HunYuanDenseV1"),
    "llama": llama(),
    # Chunked local attention; a layer without it or rotation.
    "llama4": of(
        "Llama4",
        "Llama4Text",
        attention_chunk_size=128,
        no_rope_layers=[1, 0],
        interleave_moe_layer_step=1,
        intermediate_size_mlp=384,
        attn_temperature_tuning=True,
        floor_scale=64,
        num_local_experts=4,
        num_experts_per_tok=1,
    ),
    "minimax-m2": of("MiniMaxM2", rotary_dim=64, scoring_func="sigmoid", **LOCAL_EXPERTS),
    "ministral3": of("Ministral3"),
    # A sliding window on every layer.
    "mistral": of("Mistral", hidden_size=192, num_attention_heads=6, sliding_window=64),
    "mixtral": of("Mixtral", **LOCAL_EXPERTS),
    "nemotron": of("Nemotron"),
    "olmo": of("Olmo"),
    "olmo2": of("Olmo2"),
    "olmo3": of("Olmo3", **MIXED),
    "olmoe": of("Olmoe", **EXPERTS),
    "opt": of("OPT", num_key_value_heads=4, ffn_dim=384, word_embed_proj_dim=256),
    "phi": of("Phi"),
    "phi3": of("Phi3"),
    "phimoe": of("Phimoe", **LOCAL_EXPERTS),
    # Projections with biases; those of keys are long, as in real models of this family.
    "qwen2": of("Qwen2", hidden_size=384, num_attention_heads=6),
    "qwen2-moe": of("Qwen2Moe", **SHARED_EXPERT),
    "qwen3": of("Qwen3"),
    "qwen3-moe": of("Qwen3Moe", **EXPERTS),
    "seed-oss": of("SeedOss"),
    "smollm3": of("SmolLM3", no_rope_layers=[1, 0]),
    "stablelm": of("StableLm"),
    "starcoder2": of("Starcoder2"),
}
"""Every layer is attention."""

HYBRIDS: dict[str, Callable[[], Made]] = {
    "falcon-h1": of("FalconH1", mamba_d_ssm=256, mamba_d_head=32, **MAMBA2),
    "granite-hybrid": of(
        "GraniteMoeHybrid",
        num_hidden_layers=4,
        layer_types=["mamba", "attention"] * 2,
        mamba_d_head=64,
        shared_intermediate_size=64,
        **LOCAL_EXPERTS,
        **MAMBA2,
    ),
    "lfm2": of(
        "Lfm2",
        num_hidden_layers=4,
        layer_types=["conv", "full_attention"] * 2,
        conv_dim=256,
        conv_dim_out=256,
        block_dim=256,
        block_ff_dim=384,
        block_multiple_of=64,
    ),
    "nemotron-h": of(
        "NemotronH",
        num_hidden_layers=4,
        layers_block_type=["mamba", "attention", "mamba", "mlp"],
        mamba_num_heads=8,
        mamba_head_dim=64,
        ssm_state_size=16,
        n_groups=1,
    ),
    "qwen3-next": of("Qwen3Next", **SHARED_EXPERT, **LINEAR),
}
"""Layers beside attention keep a state."""

# vLLM's kernel for CPUs knows latents of 512 with rotary keys of 64.
LATENT = {
    "num_key_value_heads": 4,
    "head_dim": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 64,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
LATENTS: dict[str, Callable[[], Made]] = {
    "deepseek-v2": of("DeepseekV2", q_lora_rank=None, **LATENT),
    "deepseek-v3": of(
        "DeepseekV3",
        q_lora_rank=128,
        num_nextn_predict_layers=0,
        topk_method="noaux_tc",
        scoring_func="sigmoid",
        **LATENT,
    ),
}
"""Layers whose cache is one latent vector for all heads."""

QUICK = {"gemma2", "gemma4-shared", "gpt-oss", "mistral", "phi3", "lfm2", "qwen3-next"}
"""Of both, those that the fast tests are about."""


def quickly(shapes: Iterable[str]) -> list[Any]:
    """Parameters of a test: those not in QUICK are for the slow run."""
    import pytest

    slow = pytest.mark.slow
    return [name if name in QUICK else pytest.param(name, marks=slow) for name in shapes]


SHAPES: dict[str, Callable[[], Made]] = {
    **FAMILIES,
    **HYBRIDS,
    **LATENTS,
    # Its layers take no notice of --kv-cache-dtype.
    "falcon": of(
        "Falcon",
        head_dim=None,
        num_key_value_heads=None,
        num_kv_heads=2,
        new_decoder_architecture=True,
        alibi=False,
    ),
    "gemma4-112": gemma4(112),
    # As wide as SmolLM2-135M: products of 576 and 1,536 numbers.
    "llama-wide": llama(
        hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3
    ),
    "llama-1layer": llama(num_hidden_layers=1),
    "llama-4layers": llama(num_hidden_layers=4),
    "llama-mha80": llama(num_attention_heads=4, num_key_value_heads=4, head_dim=80),
    "llama-mqa128": llama(num_attention_heads=4, num_key_value_heads=1, head_dim=128),
    "llama-d48": llama(head_dim=48),
    "llama-d62": llama(head_dim=62),
}
HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
SHAPES |= {f"head-dim-{head_dim}": llama(head_dim=head_dim) for head_dim in HEAD_DIMS}
