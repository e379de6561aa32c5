# SPDX-License-Identifier: Apache-2.0
"""What vLLM's CUDA platform makes of our configurations: decided before any GPU is asked."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm_fibquant.codec.config import PRESETS
from vllm_fibquant.codec.layout import preset_layout
from vllm_fibquant.engine import backend
from vllm_fibquant.options import Options

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
