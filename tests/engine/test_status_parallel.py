# SPDX-License-Identifier: Apache-2.0
"""Routes and metrics of servers started with vLLM's own command: several workers, engines and API
servers, and a cache that is not ours."""

from __future__ import annotations

import json
import urllib.error
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from .harness import varied_prompts
from .models import VOCAB_SIZE, make_model
from .test_parallel import ask_all, server

pytestmark = pytest.mark.slow

STEPS = "fibquant:steps_total"


@pytest.fixture(autouse=True)
def named_plugin(monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "fibquant")


def fetch(url: str) -> str:
    with urllib.request.urlopen(url, timeout=60) as response:
        return response.read().decode()


def samples(url: str, name: str) -> dict[tuple[str, str], float]:
    """A metric by engine and worker."""
    return {
        (sample.labels.get("engine", ""), sample.labels.get("worker", "")): sample.value
        for family in text_string_to_metric_families(fetch(f"{url}/metrics"))
        for sample in family.samples
        if sample.name == name
    }


def test_tensor_parallel(model_folder):
    prompts = varied_prompts(8, VOCAB_SIZE)
    flags = ("--enforce-eager", "--tensor-parallel-size", "2")
    with server(make_model("llama", model_folder), *flags, threads="0|1") as url:
        ask_all(url, prompts)
        steps = samples(url, STEPS)
        info = json.loads(fetch(f"{url}/fibquant/info"))
    assert sorted(steps) == [("0", "0"), ("0", "1")]
    assert steps["0", "0"] == steps["0", "1"] > 5
    assert info["num_workers"] == info["num_workers_readable"] == 2
    # Each rank has one of two KV heads: together they hold what one worker would.
    assert info["bytes_per_token"]["16bit"] == 2 * 2 * 2 * 64 * 2


def test_two_engines_and_two_api_servers(model_folder):
    """Whichever API server answers, it tells of all engines."""
    prompts = varied_prompts(24, VOCAB_SIZE)
    flags = ("--enforce-eager", "--data-parallel-size", "2", "--api-server-count", "2")
    with server(make_model("llama", model_folder), *flags, threads="0|1") as url:
        ask_all(url, prompts)
        for _ in range(6):
            steps = samples(url, STEPS)
            assert sorted(steps) == [("0", "0"), ("1", "0")]
            assert all(steps.values())
            assert len(samples(url, "fibquant:kv_cache_used_tokens")) == 2
            assert sum(samples(url, "vllm:generation_tokens_total").values()) == 6 * 24
            info = json.loads(fetch(f"{url}/fibquant/info"))
            assert info["num_engines"] == info["num_workers_readable"] == 2


def test_another_cache_dtype(model_folder):
    flags = ("--enforce-eager", "--kv-cache-dtype", "auto")
    with server(make_model("llama", model_folder), *flags) as url:
        ask_all(url, varied_prompts(2, VOCAB_SIZE))
        info = json.loads(fetch(f"{url}/fibquant/info"))
        assert samples(url, "fibquant:enabled") == {("", ""): 0}
        assert samples(url, STEPS) == {}
        assert "<title>FibQuant" in fetch(f"{url}/fibquant")
    assert info["enabled"] is False


def test_without_the_plugins_name_there_are_no_routes(model_folder, monkeypatch):
    monkeypatch.delenv("VLLM_PLUGINS")
    with server(make_model("llama", model_folder), "--enforce-eager") as url:
        with pytest.raises(urllib.error.HTTPError):
            fetch(f"{url}/fibquant/info")
        assert "fibquant:" not in fetch(f"{url}/metrics")
