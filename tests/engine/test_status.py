# SPDX-License-Identifier: Apache-2.0
"""A live server's routes, metrics, fidelity monitor and status page, all on one start."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import signal
import subprocess
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import pytest

pytest.importorskip("vllm", reason="starts vLLM's server")

import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from tests.browser import browser
from vllm_fibquant import ops
from vllm_fibquant.demo_model import MODEL_NAME, ensure_demo_model

from .test_server import STOP_LIMIT_S, Server, start, wait_until_healthy

ROOT = Path(__file__).parent.parent.parent
KEY = {"Authorization": "Bearer secret"}
BUDGET = 0.02
FUZZ = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    ensure_demo_model()
    options = {"fibquant": {"monitor": {"budget": BUDGET}}}
    greedy = {"temperature": 0}  # the page leaves sampling to the model, whose own is a lottery
    server = start(
        tmp_path_factory.mktemp("server") / "log", "--max-model-len", "1024",
        "--api-key", "secret", "--additional-config", json.dumps(options),
        "--override-generation-config", json.dumps(greedy),
    )  # fmt: skip
    try:
        wait_until_healthy(server)
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda number: ask(server, number), range(16)))
        yield server
    finally:
        server.process.send_signal(signal.SIGINT)
        try:
            server.process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            server.process.kill()


def ask(server: Server, number: int) -> None:
    """A chat whose prompts begin alike, so that its first blocks are read again and again."""
    text = "You are asked about numbers. " * 40 + f"What follows {number}?"
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 12, "temperature": 0}
    fetch(server, "/v1/chat/completions", KEY, body)


def fetch(server: Server, path: str, headers=None, body=None) -> str:
    request = urllib.request.Request(
        server.url + path,
        data=json.dumps(body).encode() if body else None,
        headers={**(headers or {}), "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        return response.read().decode()


def metrics(server: Server) -> dict[str, list]:
    """Samples by their full name."""
    found: dict[str, list] = {}
    for family in text_string_to_metric_families(fetch(server, "/metrics")):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample)
    return found


def total(found: dict[str, list], name: str) -> float:
    return sum(sample.value for sample in found[name])


def test_info_obeys_the_api_key(server):
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        with pytest.raises(urllib.error.HTTPError) as caught:
            fetch(server, "/fibquant/info", headers)
        assert caught.value.code == 401
    body = json.loads(fetch(server, "/fibquant/info", KEY))
    assert body["enabled"] is True
    assert body["preset"] == "fibquant"
    assert body["kernel"] == ops.kernel_name()
    assert body["self_check"]["passed"] is True
    assert body["layers"] == {"all": 30, "coded": 30}
    (code,) = body["codes"]
    assert code["head_dim"] == 64
    assert len(code["key"]["codebook_digest"]) == 64
    # 3 KV heads of 64 in 30 layers: keys and values in 16 bits, and records of 68 bytes.
    assert body["bytes_per_token"]["16bit"] == 2 * 2 * 64 * 3 * 30
    assert body["bytes_per_token"]["stored"] == code["record_bytes"] * 3 * 30
    logged = re.search(r"KV cache size: ([\d,]+) tokens", server.log)
    assert body["capacity_tokens"] == int(logged[1].replace(",", ""))
    assert body["cache_bytes"] >= body["capacity_tokens"] * body["bytes_per_token"]["stored"]


@pytest.mark.parametrize("key", [{}, KEY], ids=["without the key", "with the key"])
def test_our_routes_keep_what_their_schema_says(server, key):
    """Every /fibquant route the server describes, asked as the schema allows."""
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [
        found.ok() for found in schema.include(path_regex="^/fibquant").get_all_operations()
    ]
    assert "GET /fibquant/info" in [operation.label for operation in operations]
    statuses = set()
    for operation in operations:

        @given(case=operation.as_strategy())
        @FUZZ
        def check(case):
            statuses.add(case.call_and_validate(base_url=server.url, headers=key).status_code)

        check()
    assert statuses == ({200} if key else {401})


def test_our_routes_bear_anything(server):
    """Any method, query, key and body at any of our paths: an answer or a refusal, no fault."""
    paths = ["/fibquant", "/fibquant/info", "/fibquant/page.js", "/fibquant/none", "/fibquant/../x"]
    latin = st.text(st.characters(codec="latin-1", exclude_categories=["Cc"]))
    statuses: dict[int, int] = {}

    @given(
        st.sampled_from(["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "TRACE"]),
        st.sampled_from(paths),
        st.text(),
        st.one_of(latin, st.just("Bearer "), latin.map("Bearer {}".format)),
        st.binary(max_size=200),
    )
    @FUZZ
    def check(method, path, query, key, body):
        connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=60)
        with contextlib.closing(connection):
            connection.request(
                method, f"{path}?{quote(query, errors='ignore')}", body,
                {"Authorization": key.encode("latin-1")},
            )  # fmt: skip
            status = connection.getresponse().status
        statuses[status] = statuses.get(status, 0) + 1
        expected = (200, 401, 404, 405) if method == "GET" else (404, 405)
        assert status in expected

    check()
    print(f"\nstatuses: {statuses}")
    assert {200, 401, 404, 405} <= set(statuses)
    assert json.loads(fetch(server, "/fibquant/info", KEY))["enabled"] is True


def test_metrics_count_what_happened(server):
    found = metrics(server)
    assert total(found, "fibquant:enabled") == 1
    (info,) = found["fibquant:info"]
    assert info.labels["model_name"] == MODEL_NAME
    assert info.labels["engine"] == "0"
    assert total(found, "fibquant:steps_total") > 12
    # Every new token is encoded once: prompts less what the prefix cache had, and answers.
    computed = total(found, "vllm:prompt_tokens_total") - total(
        found, "vllm:prefix_cache_hits_total"
    )
    tokens = total(found, "fibquant:tokens_total")
    assert computed <= tokens <= computed + total(found, "vllm:generation_tokens_total")
    assert total(found, "fibquant:encode_seconds_total") > 0
    assert total(found, "fibquant:attend_seconds_total") > 0
    assert total(found, "fibquant:self_check_passed") == 1
    assert total(found, "fibquant:non_finite_vectors_total") == 0
    ratio = total(found, "fibquant:compression_ratio")
    assert ratio == pytest.approx(256 / 52, rel=0.01)
    assert total(found, "fibquant:kv_cache_capacity_tokens") == pytest.approx(
        ratio * total(found, "fibquant:kv_cache_capacity_tokens_16bit")
    )


def test_every_metric_of_the_dashboard_and_the_page_exists(server):
    found = metrics(server)
    dashboard = json.loads((ROOT / "docker/grafana/dashboards/fibquant.json").read_text())
    texts = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    texts += [variable["query"]["query"] for variable in dashboard["templating"]["list"]]
    names = {n for text in texts for n in re.findall(r"(?:vllm|fibquant):\w+", text)}
    assert len(names) > 20
    page = (ROOT / "server/page/page.js").read_text()
    histograms = set(re.findall(r'means\("((?:vllm|fibquant):\w+)"', page))
    used = set(re.findall(r'"((?:vllm|fibquant):\w+)"', page)) - histograms
    names |= used | {f"{name}_{part}" for name in histograms for part in ("sum", "count")}
    missing = sorted(name for name in names if name not in found)
    assert not missing, f"not on /metrics: {missing}"


def test_the_monitor_compares_within_its_budget(server):
    found = metrics(server)
    samples = total(found, "fibquant:fidelity_cosine_count")
    cosine = total(found, "fibquant:fidelity_cosine_sum") / samples
    share = total(found, "fibquant:monitor_seconds_total") / total(
        found, "fibquant:monitor_step_seconds_total"
    )
    rereads = total(found, "fibquant:monitor_rereads_total")
    print(
        f"\n{samples:.0f} samples, {rereads:.0f} read again, mean cosine {cosine:.4f}, {share:.2%}"
    )
    assert samples > 5
    assert cosine > 0.9
    assert total(found, "fibquant:monitor_changed_total") == 0
    assert share <= BUDGET
    states = {s.labels["state"]: s.value for s in found["fibquant:monitor_health"]}
    assert states["damaged"] == states["degraded"] == 0


def test_page(server, tmp_path):
    """In a browser: figures appear, the key is asked for, an answer streams in, no error."""
    with browser(tmp_path) as page:
        page.open(f"{server.url}/fibquant")
        page.wait("document.getElementById('ratio').textContent.startsWith('4.9')")
        assert page.text("#model") == f"{MODEL_NAME} · fibquant"
        assert page.text("#health") in ("healthy", "serving")
        page.wait("document.getElementById('speed').textContent !== '–'")
        assert "passed" in page.text("#facts")
        assert page.evaluate("document.querySelectorAll('#layers div').length") > 1

        page.type("#chat-text", "What is the capital of France?")
        page.click("#send")
        page.wait("document.querySelector('.message.error')")
        assert "API key" in page.text(".message.error")
        assert page.evaluate("document.activeElement.id") == "key"
        page.type("#key", "secret")
        page.click("#send")
        page.wait("document.querySelector('.message.assistant')?.textContent.includes('Paris')")
        page.wait("!document.getElementById('send').disabled")
        unexpected = [text for text in page.errors if "401" not in text]
        assert not unexpected
        assert (
            page.evaluate("localStorage.length + sessionStorage.length + document.cookie.length")
            == 0
        )

        for width in (360, 800, 1600):
            page.open(f"{server.url}/fibquant", width=width, scheme="dark")
            assert page.evaluate("document.documentElement.scrollWidth") <= width
        background = "getComputedStyle(document.body).backgroundColor"
        dark = page.evaluate(background)
        page.click("#theme")
        assert page.evaluate(background) != dark
