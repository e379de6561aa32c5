# SPDX-License-Identifier: Apache-2.0
"""The plan's numbers are vLLM's, block by block."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import pytest

from vllm_fibquant.cli import main, plan, sizes
from vllm_fibquant.cli.shape import shape_of
from vllm_fibquant.codec.config import PRESETS
from vllm_fibquant.engine import device_pool

GIB = 1 << 30
LLAMA = {
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "hidden_size": 576,
    "head_dim": 64,
    "max_position_embeddings": 8192,
}


def make_shape(**changes):
    return shape_of("model", {**LLAMA, **changes})


def by_name(capacities):
    return {c.kv_cache_dtype: c for c in capacities}


def test_known_block_counts():
    """Blocks that vLLM 0.32.0 logged for this model with VLLM_CPU_KVCACHE_SPACE=1."""
    found = by_name(plan.plan_capacities(make_shape(), GIB, 8192))
    assert found["bf16"].num_blocks == 364
    assert found["fibquant_2bit"].num_blocks == 2589
    assert found["fibquant_4bit"].num_blocks == 1370
    assert found["fibquant_2bit"].num_tokens == 2589 * 128
    assert found["fibquant_2bit"].num_tokens >= 7.0 * found["bf16"].num_tokens


@pytest.mark.parametrize(
    "kinds",
    [
        ["full_attention"] * 30,
        ["sliding_attention"] * 30,
        (["sliding_attention"] * 5 + ["full_attention"]) * 5,
        ["sliding_attention", "full_attention"] * 15,
        ["full_attention"] * 13 + ["sliding_attention"] * 17,
        ["full_attention"] * 20 + ["sliding_attention"] * 10,
    ],
    ids=["full", "sliding", "5:1", "1:1", "13:17", "2:1"],
)
@pytest.mark.parametrize("skip", [(), ("0", "1")], ids=["all", "skip"])
@pytest.mark.parametrize("context", [1, 100, 8192, 100_001])
def test_equals_vllm(kinds, skip, context):
    pytest.importorskip("vllm", reason="compares with vLLM's own functions")
    shape = make_shape(layer_types=kinds, sliding_window=1000)
    found = by_name(plan.plan_capacities(shape, GIB, context, skip_layers=skip))
    for name in plan.token_bytes(shape.head_dim):
        layers = plan.layer_specs(shape, name, plan.Settings(skip_layers=skip))
        layers = plan.fit_layers(layers) if name in PRESETS else layers
        expected = vllm_capacity(layers, context)
        assert (found[name].num_blocks, found[name].max_concurrency) == expected, name
        assert found[name].num_tokens == int(expected[1] * context)


@pytest.mark.parametrize("window", [0, 1000])
@pytest.mark.parametrize("skip", [(), ("5",)])
def test_layers_with_their_own_presets_equal_vllm(window, skip):
    pytest.importorskip("vllm", reason="compares with vLLM's own functions")
    shape = make_shape(sliding_window=window)
    presets = ((0, "fibquant_4bit"), (1, "fibquant_4bit"), (29, "fibquant_1bit"))
    found = by_name(
        plan.plan_capacities(shape, GIB, 8192, skip_layers=skip, layer_presets=presets)
    )["fibquant_2bit"]
    sizes = dict.fromkeys(range(30), 36) | {0: 68, 1: 68, 29: 20} | {int(n): 256 for n in skip}
    assert found.bytes_per_token == 3 * sum(sizes.values())
    coded = [size for size in sizes.values() if size < 256]
    assert found.effective_rate == pytest.approx(8 * sum(coded) / len(coded) / 128)
    block_size = plan.DEFAULT_BLOCK_SIZE
    layers = [plan.LayerSpec(window, 3 * sizes[n], block_size) for n in range(30)]
    assert (found.num_blocks, found.max_concurrency) == vllm_capacity(layers, 8192)


@pytest.mark.parametrize(
    "presets, shape, skip, reason",
    [
        ([(0, "fibquant_4bit"), (30, "fibquant_4bit")], {}, (), "must be below 30, got 30"),
        ([(3, "fibquant_4bit")], {}, ("3",), "among --kv-cache-dtype-skip-layers, got 3"),
        ([(3, "fibquant_1bit")], {"head_dim": 68}, (), "for head_dim 68, got fibquant_1bit"),
        ([(3, "fibquant_4bit")],
         {"sliding_window": 9, "layer_types": ["full_attention", "sliding_attention"] * 15},
         (), "must be left out for models that mix"),
    ],
)  # fmt: skip
def test_layers_that_are_refused(presets, shape, skip, reason):
    with pytest.raises(ValueError, match=reason):
        plan.plan_capacities(
            make_shape(**shape), GIB, 4096, skip_layers=skip, layer_presets=tuple(presets)
        )


def vllm_capacity(layers, context):
    """Blocks and concurrency as vLLM's functions give them for these layers."""
    import torch
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec
    from vllm.v1.kv_cache_layout import KVCacheLayout

    config = SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=context),
        cache_config=SimpleNamespace(
            num_gpu_blocks_override=None,
            prefix_cache_retention_interval=None,
            get_resolved_kv_cache_layout=lambda: KVCacheLayout.LBHNC,
        ),
        attention_config=SimpleNamespace(hisparse_config=None),
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        max_in_flight_tokens=plan.DEFAULT_BATCHED_TOKENS,
        speculative_config=None,
    )
    specs = {}
    for index, layer in enumerate(layers):
        common = {
            "block_size": layer.block_size,
            "num_kv_heads": 1,
            "head_size": 64,
            "dtype": torch.uint8,
            "state_content_bytes": layer.token_bytes,
            "page_size_padded": layer.page_size_padded,
        }
        specs[f"layers.{index}"] = (
            SlidingWindowSpec(sliding_window=layer.sliding_window, **common)
            if layer.sliding_window
            else FullAttentionSpec(**common)
        )
    groups = kv_cache_utils.get_kv_cache_groups(config, specs)
    cache = kv_cache_utils.get_kv_cache_config_from_groups(config, groups, GIB)
    concurrency = kv_cache_utils.get_max_concurrency_for_kv_cache_config(config, cache)
    return cache.num_blocks, concurrency


def test_tensor_parallel_divides_heads_and_replicates_the_last():
    shape = make_shape(num_key_value_heads=8)
    one, two, sixteen = (
        by_name(plan.plan_capacities(shape, GIB, 4096, tensor_parallel_size=size))["fibquant"]
        for size in (1, 2, 16)
    )
    assert two.bytes_per_token * 2 == one.bytes_per_token
    assert sixteen.bytes_per_token * 8 == one.bytes_per_token


def test_does_not_fit():
    found = by_name(plan.plan_capacities(make_shape(), 30 << 20, 8192))
    assert found["bf16"].num_users == 0
    assert found["fibquant_1bit"].num_users == 2
    assert "none" in plan.render(make_shape(), 30 << 20, 8192, list(found.values()))


def test_head_dim_that_some_codes_do_not_divide():
    found = by_name(plan.plan_capacities(make_shape(head_dim=68), GIB, 4096))
    assert "fibquant_4bit" in found
    assert "fibquant_1bit" not in found


@pytest.mark.parametrize(
    "config, windows",
    [
        ({"sliding_window": 512}, {512}),
        ({"sliding_window": 512, "use_sliding_window": False}, {0}),
        ({"sliding_window": None}, {0}),
        (
            {"sliding_window": 512, "layer_types": ["full_attention", "sliding_attention"] * 15},
            {0, 512},
        ),
        ({"text_config": {**LLAMA, "sliding_window": 7}}, {7}),
    ],
)
def test_windows(config, windows):
    assert set(make_shape(**config).windows) == windows


def test_layers_that_read_anothers_cache():
    """Gemma 3n's: the last of them have none, and read the last one before of their own kind."""
    kinds = ["sliding_attention", "full_attention"] * 15
    shape = make_shape(sliding_window=512, layer_types=kinds, num_kv_shared_layers=3)
    assert len(shape.windows) == 27 and shape.readers == (25, 26, 25)


@pytest.mark.parametrize(
    "config, num_kv_heads",
    [({}, 9), ({"num_kv_heads": 3}, 3), ({"multi_query": True}, 1),
     ({"multi_query": True, "new_decoder_architecture": True, "num_kv_heads": 3}, 3)],
)  # fmt: skip
def test_other_spellings(config, num_kv_heads):
    shape = make_shape(head_dim=None, num_key_value_heads=None, **config)
    assert (shape.head_dim, shape.num_kv_heads) == (64, num_kv_heads)


@pytest.mark.parametrize(
    "config, reason",
    [
        ({"layer_types": ["chunked_attention"] * 30}, "got chunked_attention"),
        ({"v_head_dim": 32}, "as long as its keys, got 32 and 64"),
        ({"is_encoder_decoder": True}, "decoder-only"),
        ({"alibi": True}, "got ALiBi"),
        ({"attn_config": {"alibi": True}}, "got ALiBi"),
        ({"position_embedding_type": "alibi"}, "got ALiBi"),
        ({"model_type": "falcon"}, "which vLLM ignores for those of Falcon"),
        ({"architectures": ["BertModel"]}, "must generate, got BertModel"),
        ({"architectures": ["XForSequenceClassification"]}, "must generate"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
    ],
)
def test_refusals(config, reason):
    with pytest.raises(ValueError, match=reason):
        make_shape(**config)


@pytest.mark.parametrize(
    "architecture",
    ["GPT2LMHeadModel", "ChatGLMModel", "InternLM2ChatModel", "Qwen2_5OmniModel", "UltravoxModel",
     "MossAudioModel"],
)  # fmt: skip
def test_models_that_generate(architecture):
    """Their names end like those of models that do not."""
    assert make_shape(architectures=[architecture]).head_dim == 64


@pytest.mark.parametrize(
    "arguments, reason",
    [
        ({"block_size": 100}, "multiple of 32, got 100"),
        ({"tensor_parallel_size": 0}, "got 0"),
        ({"batched_tokens": 0}, "--max-num-batched-tokens must be at least 1"),
    ],
)
def test_bad_arguments(arguments, reason):
    with pytest.raises(ValueError, match=reason):
        plan.plan_capacities(make_shape(), GIB, 4096, **arguments)


def test_memory_that_holds_not_even_a_copy():
    found = plan.plan_capacities(make_shape(), 1, 4096, num_copies=132)
    assert {c.num_tokens for c in found} == {0}


def test_an_empty_size_is_refused_by_the_commands(capsys):
    for command in (["plan", "--memory", "1GiB"], ["doctor"]):
        assert main.main([*command, "model", "--context", ""]) == 1
        assert "--context must be a number of tokens" in capsys.readouterr().err
    assert main.main(["doctor", "model", "--memory", ""]) == 1
    assert "--memory must be a size" in capsys.readouterr().err


def test_unknown_skip_layers():
    with pytest.raises(ValueError, match="below 30 or sliding_window, got 30, first"):
        plan.plan_capacities(make_shape(), GIB, 4096, skip_layers=("0", "30", "first"))


@pytest.mark.parametrize(
    "text, size",
    [("8GiB", 8 * GIB), ("500 MB", 500 * 10**6), ("1.5GiB", 3 * GIB // 2), ("4096", 4096),
     ("2g", 2 * 10**9), ("64KiB", 65536)],
)  # fmt: skip
def test_sizes(text, size):
    assert sizes.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "8 apples", "-1GiB", "1.5", "0"])
def test_bad_sizes(text):
    with pytest.raises(ValueError, match="--memory must be"):
        sizes.parse_size(text)


def test_contexts():
    assert sizes.parse_tokens("32k") == 32768
    assert sizes.parse_tokens("4096") == 4096
    for text in ("", "0", "k", "1.5k", "-4"):
        with pytest.raises(ValueError, match="--context must be"):
            sizes.parse_tokens(text)


def test_copies_are_taken_from_pages_and_counted_in_the_rate():
    exact, quality = (
        by_name(plan.plan_capacities(make_shape(), GIB, 4096, num_copies=n, max_num_seqs=8))
        for n in (0, 68)
    )
    assert quality["bf16"] == exact["bf16"]
    small, large = quality["fibquant_2bit"], exact["fibquant_2bit"]
    assert small.copy_bytes == 8 * 68 * 30 * 3 * 2 * 64 * 2
    block_bytes = 128 * 30 * 3 * 36
    assert small.num_blocks == (GIB - small.copy_bytes) // block_bytes < large.num_blocks
    assert small.effective_rate == pytest.approx(2.25 + 16 * 68 / 4096)
    # However many requests, copies take at most a tenth.
    crowd = plan.plan_capacities(make_shape(), GIB, 4096, num_copies=68, max_num_seqs=10**6)
    assert 0.099 * GIB < by_name(crowd)["fibquant_2bit"].copy_bytes <= 0.1 * GIB
    skipped = tuple(map(str, range(30)))
    dense = plan.plan_capacities(make_shape(), GIB, 4096, num_copies=68, skip_layers=skipped)
    assert by_name(dense)["fibquant_2bit"].copy_bytes == 0


def test_copies_are_counted_by_the_rule_of_the_device():
    """On a GPU a row follows from a slot alone, which takes more rows than tokens; layers that read
    another's pages read its copies, too."""
    copies = {"num_copies": 68, "num_copied_first": 4, "max_num_seqs": 8}
    found = by_name(plan.plan_capacities(make_shape(), GIB, 4096, device="cuda", **copies))
    found = found["fibquant_2bit"]
    num_rows = 8 * device_pool.rows_of_a_request("cuda", 4, 64)
    assert num_rows > 8 * device_pool.rows_of_a_request("cpu", 4, 64) == 8 * 68
    assert found.copy_bytes == num_rows * 30 * 3 * 2 * 64 * 2
    assert found.effective_rate == pytest.approx(2.25 + 16 * 68 / 4096)
    shape = dataclasses.replace(make_shape(), readers=(5, 7))
    counted = {
        device: by_name(plan.plan_capacities(shape, GIB, 4096, device=device, **copies))
        for device in ("cpu", "cuda")
    }
    assert counted["cuda"]["fibquant_2bit"].copy_bytes == found.copy_bytes
    assert counted["cpu"]["fibquant_2bit"].copy_bytes == 8 * 68 * 32 * 3 * 2 * 64 * 2
    with pytest.raises(ValueError, match="--device must be cpu or cuda, got tpu"):
        plan.plan_capacities(make_shape(), GIB, 4096, device="tpu")
    assert plan.plan_capacities(make_shape(), GIB, 4096, block_size=16, device="cuda")


def test_command(tmp_path, capsys):
    pytest.importorskip("transformers", reason="reads the model's configuration")
    config = {**LLAMA, "model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    arguments = ["plan", str(tmp_path), "--memory", "1GiB", "--context", "8k", "--mode", "exact"]
    assert main.main(arguments) == 0
    table = capsys.readouterr().out
    assert "331,392" in table and "7.11x" in table
    assert main.main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {c["kv_cache_dtype"] for c in report["capacities"]} == {"bf16", "fp8", *PRESETS}
    capsys.readouterr()
    shown = []
    for more in ([], ["--block-size", "16"], ["--block-size", "128"]):
        assert main.main([*arguments, "--device", "cuda", "--json", *more]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] != shown[2], "blocks are vLLM's, of the device"
    assert main.main([*arguments, "--mode", "quality", "--max-num-seqs", "4"]) == 0
    assert "MiB of it are for copies in 16 bits" in capsys.readouterr().out
    assert (
        main.main([*arguments, "--json", "--layers", "0-1,29=fibquant_4bit", "2=fibquant_k5v3"])
        == 0
    )
    report = json.loads(capsys.readouterr().out)
    found = {c["kv_cache_dtype"]: c["bytes_per_token"] for c in report["capacities"]}
    assert found["fibquant_2bit"] == 3 * (26 * 36 + 4 * 68)
    assert found["bf16"] == 3 * 30 * 256
    assert main.main([*arguments, "--layers", "0-1"]) == 1
    assert "layers must have presets among" in capsys.readouterr().err


def test_command_refuses_what_is_no_model(tmp_path, capsys):
    pytest.importorskip("transformers", reason="reads the model's configuration")
    assert main.main(["plan", str(tmp_path / "missing"), "--memory", "1GiB"]) == 1
    assert "model must be a directory with a config.json" in capsys.readouterr().err
    shape = {"model_type": "llama", "hidden_size": 256, "num_attention_heads": 0}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    assert main.main(["plan", str(tmp_path), "--memory", "1GiB"]) == 1
    told = capsys.readouterr().err
    assert "by zero; see that its numbers are above 0" in told


def test_a_head_dim_is_planned_once_its_codebooks_are_built(tmp_path, monkeypatch):
    """As a start: refused with the command that builds one, then served with what there is."""
    pytest.importorskip("transformers", reason="reads the model's configuration")
    pytest.importorskip("scipy", reason="builds a codebook")
    monkeypatch.setenv("FIBQUANT_CACHE_DIR", str(tmp_path / "cache"))
    config = {**LLAMA, "model_type": "llama", "head_dim": 144}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="run: .* codebook build --head-dim 144"):
        plan.plan_model(str(tmp_path), GIB)
    shape = ["--head-dim", "144", "--subvec-dim", "4", "--num-codewords", "256"]
    quick = ["--restarts", "1", "--samples", "4096", "--iterations", "2"]
    assert main.main(["codebook", "build", *shape, *quick]) == 0
    for device in ("cpu", "cuda"):
        found = by_name(plan.plan_model(str(tmp_path), GIB, device=device)[2])
        assert found.keys() == {"bf16", "fp8", "fibquant_2bit"}


def test_head_dims_beyond_a_gpus_kernels_are_planned_on_cpus_alone(tmp_path):
    """But for layers that are not coded."""
    pytest.importorskip("transformers", reason="reads the model's configuration")
    config = {**LLAMA, "model_type": "llama", "num_hidden_layers": 2, "head_dim": 512}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert plan.plan_model(str(tmp_path), GIB)[2]
    with pytest.raises(ValueError, match="must be from 16 to 256 on a GPU, got 512"):
        plan.plan_model(str(tmp_path), GIB, device="cuda")
    assert plan.plan_model(str(tmp_path), GIB, device="cuda", skip_layers=("0", "1"))[2]


def test_a_model_is_told_by_its_own_architecture_not_by_its_texts():
    text = {**LLAMA, "architectures": ["LlamaModel"]}
    whole = {"architectures": ["LlavaForConditionalGeneration"], "text_config": text}
    assert shape_of("model", whole).head_dim == 64
    whole = {"architectures": ["LlavaForSequenceClassification"], "text_config": LLAMA}
    with pytest.raises(ValueError, match="must generate, got LlavaForSequenceClassification"):
        shape_of("model", whole)


def test_numbers_that_no_model_can_have_are_refused_before_vllm_is_asked(tmp_path):
    config = {"model_type": "llama4_text", "attention_chunk_size": 128, "hidden_size": 256}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="--max-num-seqs must be at least 1, got 0; leave it out"):
        plan.plan_model(str(tmp_path), GIB, max_num_seqs=0)


@pytest.mark.parametrize(
    "config",
    [
        {"global_head_dim": 128, "attention_k_eq_v": True, "num_global_key_value_heads": 1},
        {"per_layer_config": {"1": {"head_dim": 128, "num_key_value_heads": 1}}},
    ],
)
def test_full_attention_with_heads_of_its_own(config):
    kinds = ["sliding_attention", "full_attention"]
    found = make_shape(num_hidden_layers=2, layer_types=kinds, sliding_window=64, **config)
    assert [found.layer_heads(i) for i in range(2)] == [(3, 64), (1, 128)]
    assert found.head_dims == (64, 128)
    capacities = by_name(plan.plan_capacities(found, GIB, 4096))
    assert capacities["bf16"].bytes_per_token == 4 * (3 * 64 + 128)
