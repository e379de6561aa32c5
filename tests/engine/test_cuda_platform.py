# SPDX-License-Identifier: Apache-2.0
"""What vLLM's CUDA platform makes of our configurations: decided before any GPU is asked."""

from __future__ import annotations

import functools
import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm_fibquant.codec.config import PRESETS
from vllm_fibquant.codec.layout import preset_layout
from vllm_fibquant.engine import backend
from vllm_fibquant.options import Options

from .architectures import HYBRIDS, SHAPES
from .models import VOCAB_SIZE, make_config_only

pytestmark = pytest.mark.versions

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
HEAD_DIM, NUM_KV_HEADS = 64, 4


@pytest.fixture
def platform(monkeypatch):
    """vLLM's class. Importing it loads compiled operations that a CPU build has under other names;
    none is called here."""
    monkeypatch.setitem(sys.modules, "vllm._C_stable_libtorch", ModuleType("stand-in"))
    monkeypatch.delitem(sys.modules, "vllm.platforms.cuda", raising=False)
    from vllm.platforms.cuda import NonNvmlCudaPlatform

    yield NonNvmlCudaPlatform
    sys.modules.pop("vllm.platforms.cuda", None)


@pytest.mark.parametrize("block_size", [16, 64, 256])
@pytest.mark.parametrize("name", ["fibquant_2bit", "fibquant_k5v3", "fibquant_1bit"])
def test_skipped_layers_share_pages(platform, tmp_path, name: str, block_size: int) -> None:
    """A CPU's platform leaves this out: blocks grow until a page of codes holds a dense one."""
    from vllm.engine.arg_utils import EngineArgs

    config = EngineArgs(
        model=make_config_only("llama", CONFIG, tmp_path), kv_cache_dtype=name, max_model_len=512,
        skip_tokenizer_init=True, kv_cache_dtype_skip_layers=["0"],
        additional_config={"fibquant": {"mode": "exact", "calibrate": "none"}},
    ).create_engine_config()  # fmt: skip
    cache = config.cache_config
    cache.block_size = block_size
    cls = backend.backend_for(Options(PRESETS[name]))
    platform._align_heterogeneous_kv_block_size(config, cls)
    token_bytes = NUM_KV_HEADS * preset_layout(PRESETS[name], HEAD_DIM).record_bytes
    dense_bytes = NUM_KV_HEADS * 2 * HEAD_DIM * 2
    assert cache.block_size % 16 == 0, "as the CUDA library needs"
    assert cache.skip_page_size_padded == cache.block_size * token_bytes >= 16 * dense_bytes
    smaller = cache.block_size - block_size
    assert smaller == 0 or smaller * token_bytes < 16 * dense_bytes, "blocks are no larger"


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    """Paths of configurations of tests/engine/architectures.py, by name."""

    @functools.cache
    def path_of(name: str) -> str:
        model, config = SHAPES[name]()
        given = {**config.to_dict(), "architectures": [model.__name__]}
        return make_config_only(name, given, tmp_path_factory.mktemp("configs"))

    return path_of


def platforms_blocks(platform, monkeypatch, path: str, head_dims, preset: str, **settings):
    """vLLM's configuration after its CUDA platform has chosen blocks, and our layers' specs.

    Args:
        head_dims: of the attention layers, by name; those of `skip` keep 16 bits.
    """
    from vllm.config import vllm as vllm_config_module
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    config = EngineArgs(
        model=path, kv_cache_dtype=preset, max_model_len=512, skip_tokenizer_init=True,
        additional_config={"fibquant": {"mode": "exact", "calibrate": "none"}}, **settings,
    ).create_engine_config()  # fmt: skip
    cache, cls = config.cache_config, backend.backend_for(Options(PRESETS[preset]))
    cache.kv_cache_layout = "LBHNC"
    if "block_size" not in settings:  # a CPU's platform has chosen its own
        cache.block_size, cache.user_specified_block_size = 16, False
    layers = {name: SimpleNamespace(get_attn_backend=lambda: cls) for name in head_dims}
    monkeypatch.setattr(vllm_config_module, "get_layers_from_vllm_config", lambda *args: layers)
    platform.update_block_size_for_backend(config)
    heads = config.model_config.get_num_kv_heads(config.parallel_config)
    shape = {"block_size": cache.block_size, "num_kv_heads": heads, "dtype": torch.uint8}
    specs = {
        name: cls.customize_spec(FullAttentionSpec(head_size=head_dim, **shape))
        for name, head_dim in head_dims.items()
    }
    return config, specs


def groups_of(config, specs):
    """vLLM's groups of layers; the function has another place in each version."""
    for module in ("kv_cache_planning", "kv_cache_utils"):
        try:
            found = importlib.import_module(f"vllm.v1.core.{module}").get_kv_cache_groups
        except (ImportError, AttributeError):
            continue
        return found(config, specs)
    raise AssertionError("vLLM has no get_kv_cache_groups where it was")


@pytest.mark.parametrize("settings", [{}, {"block_size": 64}, {"enable_prefix_caching": True}],
                         ids=str)  # fmt: skip
@pytest.mark.parametrize("preset", ["fibquant_2bit", "fibquant_k5v3"])
@pytest.mark.parametrize("name", HYBRIDS)
def test_hybrid_models_blocks(platform, configs, monkeypatch, name, preset, settings) -> None:
    """A block of codes holds a layer's state, in as few tokens as our kernels' blocks allow."""
    from vllm.model_executor.models import ModelRegistry
    from vllm.v1.kv_cache_interface import MambaSpec

    head_dims = {"layers.1.attn": 64}
    config, specs = platforms_blocks(
        platform, monkeypatch, configs(name), head_dims, preset, **settings
    )
    cache, model = config.cache_config, config.model_config
    assert model.is_hybrid
    cls, _ = ModelRegistry.resolve_model_cls(model.architecture, model_config=model)
    state = MambaSpec(
        shapes=cls.get_mamba_state_shape_from_config(config),
        dtypes=cls.get_mamba_state_dtype_from_config(config), block_size=cache.mamba_block_size,
        page_size_padded=cache.mamba_page_size_padded, mamba_cache_mode=cache.mamba_cache_mode,
    )  # fmt: skip
    (attention,) = specs.values()
    needed = state.real_page_size_bytes
    token_bytes = 2 * preset_layout(PRESETS[preset], 64).record_bytes
    assert cache.block_size % 16 == 0, "as the CUDA library needs"
    assert attention.page_size_bytes == cache.block_size * token_bytes == state.page_size_bytes
    assert cache.block_size - settings.get("block_size", 16) < -(-needed // token_bytes)
    groups = groups_of(config, {**specs, "layers.0.mixer": state})
    assert {g.kv_cache_spec.page_size_bytes for g in groups} == {attention.page_size_bytes}
    assert [g.kv_cache_spec.block_size for g in groups if g.kv_cache_spec == attention] == [
        cache.block_size
    ]


def test_records_of_two_sizes_share_pages(platform, configs, monkeypatch) -> None:
    """Gemma 4: full attention has a head_dim of its own, so that its pages hold fewer tokens."""
    from vllm.v1.kv_cache_interface import SlidingWindowSpec

    head_dims = {f"layers.{n}.attn": 256 if n % 3 == 2 else 128 for n in range(6)}
    config, specs = platforms_blocks(
        platform, monkeypatch, configs("gemma4"), head_dims, "fibquant_3bit"
    )
    assert config.cache_config.block_size == 16
    for name, head_dim in head_dims.items():
        if head_dim == 128:
            full = specs[name]
            specs[name] = SlidingWindowSpec(
                block_size=full.block_size, num_kv_heads=full.num_kv_heads, head_size=head_dim,
                dtype=torch.uint8, sliding_window=64, state_content_bytes=full.state_content_bytes,
            )  # fmt: skip
    groups = groups_of(config, specs)
    assert sorted(n for g in groups for n in g.layer_names) == sorted(head_dims)
    assert all(g.kv_cache_spec.block_size % 16 == 0 for g in groups)
    assert len({g.kv_cache_spec.page_size_bytes for g in groups}) == 1


@pytest.mark.skipif(shutil.which("g++") is None, reason="the emulated library needs g++")
def test_a_start_on_vllms_cuda_platform(tmp_path) -> None:
    """From the command line's arguments to the attention backend of a layer."""
    model = make_config_only("llama", CONFIG, tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.cuda_start", model], capture_output=True, text=True,
        timeout=300, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    refusal = found.pop("refusal")
    assert "kernels: must be the CUDA library's on a GPU" in refusal and "not built" in refusal
    assert refusal.count("\n  - ") == 1, refusal
    assert found == {
        "device": "cuda", "block_size": 16, "graphs": "FULL_AND_PIECEWISE",
        "mode": ["raw", 128, "auto"], "told": [], "backends": ["FIBQUANT", "FLASH_ATTN"],
        "forward_encodes": False,
    }  # fmt: skip
