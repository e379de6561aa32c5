# SPDX-License-Identifier: Apache-2.0
"""Routes and metrics of an API server whose engine is a stand-in: keys, headers, failures, sums."""

from __future__ import annotations

import asyncio
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm", reason="the routes are those of vLLM's server")

import torch
from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus_client import REGISTRY, CollectorRegistry, Gauge
from prometheus_client.parser import text_string_to_metric_families

from vllm_fibquant.cli.serve import plugins_to_load
from vllm_fibquant.engine import compat
from vllm_fibquant.observe.counters import Counters
from vllm_fibquant.observe.loss import Loss, Outcome
from vllm_fibquant.server.metrics import FibQuantCollector, usage_in
from vllm_fibquant.server.routes import PAGE_DIR, FibQuantRoutes

OUTCOME = Outcome("warned", Loss({0: 0.99, 7: 0.9}, 191, 0.06, 12.0, 0.08))
KEY = {"Authorization": "Bearer secret"}


def fits(stored: int, padding: float, dense: int | None = None) -> dict[str, dict[str, float]]:
    """As `engine.capacity.what_fits` gives them: tokens as stored and with 16 bits."""
    found = {"stored": {"num_tokens": stored, "padding": padding}}
    return found | ({"16bit": {"num_tokens": dense, "padding": 0.0}} if dense else {})


FITS = fits(1000, 0.0, 142)
"""In pages without padding: 1,000 tokens are 7 times as many, as records are."""


class Engines:
    """What an API server sees: one engine, or several, of two workers each."""

    def __init__(self, kv_cache_dtype="fibquant_2bit", num_engines=1, additional_config=None):
        self.counters = [[Counters.create() for _ in range(2)] for _ in range(num_engines)]
        self.outcomes = [OUTCOME] * num_engines
        self.fits = [FITS, FITS]  # of an engine's workers
        self.vllm_config = SimpleNamespace(
            model_config=SimpleNamespace(
                served_model_name="model", dtype=torch.bfloat16, is_hybrid=False, use_mla=False
            ),
            device_config=SimpleNamespace(device_type="cpu"),
            kv_transfer_config=None,
            cache_config=SimpleNamespace(
                cache_dtype=kv_cache_dtype, kv_cache_size_tokens=1000, kv_offloading_size=None
            ),
            additional_config=additional_config or {},
        )
        self.engine_core = SimpleNamespace(
            engine_ranks_managed=list(range(num_engines)), call_utility_all_async=self._call_all
        )
        self.calls: list[str] = []

    def _reports(self, engine):
        return [
            {
                "counters": counters.path,
                "kernel": "cpu-avx2",
                "num_layers": 2,
                "num_coded_layers": 2,
                "fits": fit,
                "token_bytes": {"stored": 100, "16bit": 700, "auto": 1400},
                "cache_bytes": 1 << 20,
                "codes": [{"head_dim": 64}],
                "self_checks": [{"error": 1e-6, "tolerance": 1e-5}],
                "fidelity": self.outcomes[engine].facts(),
            }
            for counters, fit in zip(self.counters[engine], self.fits, strict=True)
        ]

    async def collective_rpc(self, name, timeout):
        self.calls.append(name)
        return self._reports(0)

    async def _call_all(self, function, name, *args):
        self.calls.append(name)
        return [self._reports(engine) for engine in self.engine_core.engine_ranks_managed]


@pytest.fixture
def serve(monkeypatch):
    """Starts the routes on an application; a client of it."""
    num_engines = 0

    def registry():
        """A new one every time, as vLLM makes with several API servers."""
        new = CollectorRegistry()
        usage = Gauge("vllm:kv_cache_usage_perc", "", ["model_name", "engine"], registry=new)
        for index in range(num_engines):
            usage.labels("model", str(index)).set(0.25)
        return new

    monkeypatch.setattr(compat, "metrics_registry", registry)
    monkeypatch.delenv("VLLM_API_KEY", raising=False)

    def start(engines, api_key=None):
        nonlocal num_engines
        num_engines = len(engines.counters) if engines else 0
        app, plugin = FastAPI(), FibQuantRoutes()
        plugin.attach_router(app)
        asyncio.run(plugin.init_state(engines, app.state, SimpleNamespace(api_key=api_key)))
        return TestClient(app)

    return start


def metrics_of(client):
    """name -> {labels but the model's, in alphabetical order of their names: value}."""
    found = {}
    for family in text_string_to_metric_families(client.get("/metrics").text):
        for sample in family.samples:
            labels = tuple(v for k, v in sample.labels.items() if k != "model_name")
            found.setdefault(sample.name, {})[labels] = sample.value
    return found


def test_info(serve):
    engines = Engines(additional_config={"fibquant": {"mode": "quality", "monitor": True}})
    body = serve(engines).get("/fibquant/info").json()
    assert engines.calls == ["fibquant_report"], "asked once, not at every request"
    assert body["enabled"] is True
    assert body["preset"] == "fibquant_2bit"
    assert body["options"]["prefill"] == "raw"
    assert body["options"]["monitor"] == {"budget": 0.005, "tokens": 4096}
    assert body["bytes_per_token"] == {"stored": 200, "16bit": 1400, "auto": 2800}
    assert body["compression_ratio"] == 1000 / 142
    assert body["capacity_tokens"] == 1000
    assert body["capacity_tokens_16bit"] == 142
    assert body["self_check"]["passed"] is True
    assert body["num_workers"] == body["num_workers_readable"] == 2
    assert body["versions"]["torch"] and body["versions"]["vllm-fibquant"]


@pytest.mark.parametrize(
    ("workers", "ratio", "padding"),
    [
        ([fits(1000, 0.4, 250), fits(1000, 0.4, 250)], 4, 0.4),  # padded: records are 7 times less
        ([fits(1000, 0.1, 250), fits(1500, 0.2, 200)], 5, 0.2),  # the fullest worker decides
        ([{}, fits(1000, 0.0, 250)], 4, 0.0),  # a rank without attention
        ([fits(1000, 0.3), fits(1000, 0.3)], None, 0.3),  # beside layers that keep a state
        ([{}, {}], None, 0.0),
    ],
)
def test_capacity_is_that_of_pages_not_of_records(serve, workers, ratio, padding):
    """What records promise is not said where vLLM's pages hold something else."""
    engines = Engines()
    engines.fits = workers
    client = serve(engines)
    body, found = client.get("/fibquant/info").json(), metrics_of(client)
    assert (body["compression_ratio"], body["padding"]) == (ratio, padding)
    assert body["capacity_tokens_16bit"] == (1000 / ratio if ratio else None)
    assert found["fibquant:kv_cache_padding_ratio"] == {("0",): padding}
    told = {("0",): ratio} if ratio else {}
    assert found.get("fibquant:compression_ratio", {}) == told
    dense = {key: 1000 / value for key, value in told.items()}
    assert found.get("fibquant:kv_cache_capacity_tokens_16bit", {}) == dense


def test_without_our_cache_it_says_so_and_asks_nobody(serve):
    engines = Engines("auto")
    client = serve(engines)
    body = client.get("/fibquant/info").json()
    assert body["enabled"] is False
    assert "--kv-cache-dtype fibquant" in body["reason"]
    assert engines.calls == []
    ours = {name: found for name, found in metrics_of(client).items() if "fibquant" in name}
    assert ours == {"fibquant:enabled": {(): 0.0}}


def test_a_server_without_an_engine(serve):
    client = serve(None)
    assert client.get("/fibquant/info").status_code == 503
    assert client.get("/fibquant").status_code == 200
    assert "fibquant" not in client.get("/metrics").text


def test_workers_that_cannot_be_asked_stop_nobody(serve):
    engines = Engines()

    async def fail(*args, **kwargs):
        raise TimeoutError("no answer")

    engines.collective_rpc = fail
    client = serve(engines)
    body = client.get("/fibquant/info").json()
    assert body["enabled"] is True
    assert "TimeoutError: no answer" in body["problem"]
    assert metrics_of(client)["fibquant:enabled"] == {(): 1.0}


def test_a_worker_of_another_machine(serve):
    engines = Engines()
    reports = engines._reports(0)
    reports[1]["counters"] = "/proc/1/fd/999999"
    engines._reports = lambda engine: reports
    client = serve(engines)
    body = client.get("/fibquant/info").json()
    assert (body["num_workers"], body["num_workers_readable"]) == (2, 1)
    assert list(metrics_of(client)["fibquant:steps_total"]) == [("0", "0")]


@pytest.mark.parametrize("from_environment", [False, True])
def test_the_key_guards_data_and_not_the_page(serve, monkeypatch, from_environment):
    if from_environment:
        monkeypatch.setenv("VLLM_API_KEY", "secret")
    client = serve(Engines(), api_key=None if from_environment else ["other", "secret"])
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
        answer = client.get("/fibquant/info", headers=headers)
        assert answer.status_code == 401
        assert answer.json() == {"error": "Unauthorized"}
    assert client.get("/fibquant/info", headers=KEY).json()["enabled"] is True
    page = client.get("/fibquant")
    assert page.status_code == 200
    assert "fibquant_2bit" not in page.text


def test_the_page_needs_nothing_from_elsewhere(serve):
    client = serve(Engines())
    page = client.get("/fibquant")
    assert page.headers["content-type"].startswith("text/html")
    policy = page.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy and "http" not in policy
    files = set(re.findall(r'(?:src|href)="(fibquant/[\w.]+)"', page.text))
    assert len(files) >= 5
    for name in files - {"fibquant/info"}:
        answer = client.get(f"/{name}")
        assert answer.status_code == 200
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "://" not in answer.text.replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"<script>|style=|onclick=|://", page.text)
    assert client.get("/fibquant/routes.py").status_code == 404


def test_what_the_start_found_that_codes_cost(serve):
    engines = Engines(num_engines=2)
    engines.outcomes[1] = Outcome("accepted", Loss({0: 0.4}, 191, 3.5, 12.0, 20.0))
    client = serve(engines)
    worst = client.get("/fibquant/info").json()["fidelity"]
    assert (worst["state"], worst["kl"], worst["worst_layer_cosine"]) == ("accepted", 3.5, 0.4)
    found = metrics_of(client)
    assert found["fibquant:expected_kl"] == {("0",): 0.06, ("1",): 3.5}
    assert found["fibquant:expected_perplexity_increase"] == {("0",): 0.08, ("1",): 20.0}
    cosines = {("0", "0"): 0.99, ("0", "7"): 0.9, ("1", "0"): 0.4}
    assert found["fibquant:expected_cosine"] == cosines
    states = {key for key, value in found["fibquant:fidelity_gate"].items() if value}
    assert states == {("0", "warned"), ("1", "accepted")}


@pytest.mark.parametrize(
    ("outcome", "figures"),
    [
        (Outcome("skipped", reason="switched off"), 0),
        (Outcome("accepted", Loss({0: math.nan}, 191, math.nan, 9.0, math.inf)), 0),
        (Outcome("unmeasured", Loss({0: 0.9}, 0, 0.0, 1.0, 0.0)), 0),
        (OUTCOME, 1),
    ],
)
def test_figures_that_are_not_known_are_not_shown(serve, outcome, figures):
    """Among them NaN, which JSON does not have."""
    engines = Engines()
    engines.outcomes = [outcome]
    client = serve(engines)
    assert client.get("/fibquant/info").json()["fidelity"]["state"] == outcome.state
    found = metrics_of(client)
    assert len(found.get("fibquant:expected_kl", {})) == figures
    assert sum(found["fibquant:fidelity_gate"].values()) == 1


def test_metrics_of_several_engines(serve):
    engines = Engines(num_engines=2)
    for number, counters in enumerate(c for pair in engines.counters for c in pair):
        counters["steps"] = 10 + number
        counters["self_checks"] = 1
        counters.observe("cosine_by_layer", 1, 0.97)
        counters.observe("error_by_age", 2, 0.2)
    engines.counters[1][0]["monitor_health"] = 3
    found = metrics_of(serve(engines))
    assert found["fibquant:steps_total"] == {
        ("0", "0"): 10, ("0", "1"): 11, ("1", "0"): 12, ("1", "1"): 13,
    }  # fmt: skip
    assert found["fibquant:kv_cache_used_tokens"] == {("0",): 250, ("1",): 250}
    assert found["fibquant:kv_cache_used_bytes"] == {("0",): 2**19, ("1",): 2**19}
    assert found["fibquant:compression_ratio"] == {("0",): 1000 / 142, ("1",): 1000 / 142}
    assert found["fibquant:fidelity_cosine_count"] == {("0", "1"): 2, ("1", "1"): 2}
    assert found["fibquant:fidelity_cosine_sum"][("0", "1")] == pytest.approx(1.94)
    buckets = found["fibquant:fidelity_cosine_bucket"]
    assert buckets[("0", "1", "0.95")] == 0 and buckets[("0", "1", "0.98")] == 2
    assert buckets[("0", "1", "+Inf")] == 2
    assert found["fibquant:fidelity_error_by_age_count"] == {
        ("10-60s", "0"): 2, ("10-60s", "1"): 2,
    }  # fmt: skip
    health = found["fibquant:monitor_health"]
    assert health[("0", "unknown")] == health[("1", "damaged")] == 1
    assert sum(health.values()) == 2


def test_without_vllms_own_statistics_what_is_used_is_not_known():
    status = SimpleNamespace(enabled=True, options=None, engines=[])
    collector = FibQuantCollector(lambda: status, lambda: {})
    assert [family.name for family in collector.collect()] == ["fibquant:enabled"]
    assert usage_in(CollectorRegistry()) == {}
    assert usage_in(REGISTRY) == {} or 0 in usage_in(REGISTRY)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, "a,fibquant,lora,mine"),
        ("", "fibquant"),
        ("mine", "mine,fibquant"),
        ("fibquant,mine", "fibquant,mine"),
    ],
)
def test_plugins_to_load(given, expected):
    """Unset means all but other plugins' routes; set, the user's choice stands and we are added."""
    groups = {
        "vllm.general_plugins": ["lora", "fibquant", "mine"],
        "vllm.platform_plugins": ["a"],
        "vllm.endpoint_plugins": ["fibquant", "somebody_elses_routes"],
    }
    environ = {} if given is None else {"VLLM_PLUGINS": given}
    assert plugins_to_load(environ, groups) == expected


def test_the_pages_figures_link_to_what_they_mean():
    """They have a place, links within the page reach an element, and the sections of documents it
    names exist."""
    page = (PAGE_DIR / "index.html").read_text()
    shown = set(re.findall(r'\b(?:show|bar|spark)\("([\w-]+)"', (PAGE_DIR / "page.js").read_text()))
    assert {"ratio", "expected-kl", "expected-perplexity", "expected-worst", "gate-state"} <= shown
    assert [name for name in shown if f'id="{name}"' not in page] == []
    within = re.findall(r'href="#([\w-]+)"', page)
    assert within.count("fidelity-meaning") == 3  # KL, perplexity and cosine of the gate
    for name in within:
        assert f'id="{name}"' in page, name
    named = re.findall(r"(docs/[\w-]+\.md)#([\w-]+)", page)
    assert ("docs/serving.md", "the-fidelity-gate") in named
    for path, anchor in named:
        text = (Path(__file__).parents[2] / path).read_text()
        titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
        assert anchor in {re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles}
