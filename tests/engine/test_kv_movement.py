# SPDX-License-Identifier: Apache-2.0
"""Pages that leave an engine and come back, through a KV connector, give the same answers.

vLLM's ExampleConnector writes each prompt's whole blocks to files, token by token as vLLM's view
of our pages has them, and reads them into whatever blocks another request gets. In mode `exact`
tokens and log-probabilities are equal bit by bit.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vllm_fibquant.codec.config import PRESETS
from vllm_fibquant.codec.layout import preset_layout

from .harness import engine, in_batches, largest_difference, one_by_one, varied_prompts
from .models import VOCAB_SIZE, make_model

PRESET = "fibquant"
NUM_TOKENS = 6
BLOCK_SIZE = 32
FEW_BLOCKS = 17  # one is vLLM's own; the prompts below need four times as many


def connector(folder: Path, role: str) -> dict:
    """Engine settings for vLLM's connector to files in `folder`."""
    from vllm.config import KVTransferConfig

    transfer = KVTransferConfig(
        kv_connector="ExampleConnector",
        kv_role=role,
        kv_connector_extra_config={"shared_storage_path": str(folder)},
    )
    return {"kv_transfer_config": transfer}


def stored_tokens(prompt: list[int]) -> int:
    """Tokens of a prompt that the connector stores and looks for: whole blocks before the last."""
    return max(0, (len(prompt) - 2) // BLOCK_SIZE * BLOCK_SIZE)


@pytest.fixture(scope="module")
def model(model_folder) -> str:
    return make_model("llama", model_folder)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    # Lengths of n blocks and one token more are stored under another name than they are looked
    # for (the connector counts one token less when it looks): they are always recomputed.
    prompts = varied_prompts(24, VOCAB_SIZE, longest=160, shortest=34, seed=11)
    return [prompt for prompt in prompts if len(prompt) % BLOCK_SIZE != 1]


@pytest.fixture(scope="module")
def alone(model, prompts):
    with engine(model, PRESET) as llm:
        return one_by_one(llm, prompts, NUM_TOKENS)


@pytest.fixture(scope="module")
def storage(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("pages")


@pytest.fixture(scope="module")
def small_cache(model, prompts, storage) -> dict:
    """Two rounds of all prompts with a cache for a quarter of them: the rest is in files."""
    settings = {
        "num_gpu_blocks_override": FEW_BLOCKS,
        "max_model_len": 256,
        "enable_prefix_caching": True,
        **connector(storage, "kv_both"),
    }
    assert sum(stored_tokens(p) for p in prompts) > 3 * FEW_BLOCKS * BLOCK_SIZE
    with engine(model, PRESET, **settings) as llm:
        rounds = [one_by_one(llm, prompts, NUM_TOKENS) for _ in range(2)]
        metrics = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
    return {
        "rounds": rounds,
        "from the cache": metrics["vllm:prefix_cache_hits"],
        "from files": metrics["vllm:external_prefix_cache_hits"],
    }


def test_evicted_and_brought_back(small_cache, prompts, alone):
    for answers in small_cache["rounds"]:
        assert [a.bits for a in answers] == [a.bits for a in alone]
    assert [a.num_cached for a in small_cache["rounds"][1]] == [stored_tokens(p) for p in prompts]
    assert small_cache["from files"] > small_cache["from the cache"]


def test_files_hold_codes_alone(small_cache, storage, prompts):
    """A stored token takes record_bytes per KV head and layer, not 16 bits a coordinate."""
    from safetensors.torch import load_file

    record_bytes = preset_layout(PRESETS[PRESET], 64).record_bytes
    tensors = [load_file(path)["kv_cache"] for path in storage.rglob("*.safetensors")]
    assert len(tensors) == 2 * len({tuple(p[: stored_tokens(p)]) for p in prompts})  # two layers
    for tensor in tensors:
        assert tensor.dtype == torch.uint8
        assert tensor.shape[1:] == (2, record_bytes)  # tokens, KV heads, bytes


def test_another_engine_reads_them(model, small_cache, storage, prompts, alone):
    """Produced in one engine, consumed in another, in batches, in other blocks."""
    order = list(reversed(range(len(prompts))))
    with engine(model, PRESET, **connector(storage, "kv_consumer")) as llm:
        answers = in_batches(llm, [prompts[i] for i in order], NUM_TOKENS)
    assert [a.num_cached for a in answers] == [stored_tokens(prompts[i]) for i in order]
    assert [a.bits for a in answers] == [alone[i].bits for i in order]


def test_a_changed_byte_is_seen(model, small_cache, storage, prompts, alone, tmp_path):
    """What is read is what answers: a damaged page gives other log-probabilities."""
    from safetensors.torch import load_file, save_file

    for path in storage.rglob("*.safetensors"):
        pages = load_file(path)["kv_cache"]
        pages[pages.shape[0] // 2, 0, 3] ^= 0x55
        target = tmp_path / path.relative_to(storage)
        target.parent.mkdir(exist_ok=True)
        save_file({"kv_cache": pages}, target)
    with engine(model, PRESET, **connector(tmp_path, "kv_consumer")) as llm:
        answers = in_batches(llm, prompts, NUM_TOKENS)
    assert largest_difference(alone, answers)[1] > len(prompts) // 2
