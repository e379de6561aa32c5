# SPDX-License-Identifier: Apache-2.0
"""Prometheus metrics, made from the workers' counters when somebody asks for them.

Names and labels follow vLLM's: ``fibquant:`` where vLLM has ``vllm:``, labels model_name and
engine; what is counted per worker also has the label worker.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from operator import itemgetter
from typing import Any, get_args

from prometheus_client import REGISTRY
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.utils import floatToGoString

from vllm_fibquant import __version__
from vllm_fibquant.cli.info import code_text
from vllm_fibquant.observe.counters import AGES_S, HISTOGRAMS, Counters, Distribution
from vllm_fibquant.observe.loss import State
from vllm_fibquant.options import Options
from vllm_fibquant.server.status import HEALTH, Engine, Status

LABELS = ["model_name", "engine"]
USAGE_METRIC = "vllm:kv_cache_usage_perc"

AGE_NAMES = [
    f"{floatToGoString(low)}-{floatToGoString(high)}s".replace(".0", "")
    for low, high in zip((0.0, *AGES_S), AGES_S, strict=False)
] + [f">{floatToGoString(AGES_S[-1])}s".replace(".0", "")]

# Counted by every worker: name of metric and counter, help.
WORKER_COUNTERS = {
    "steps": "Steps of the model.",
    "tokens": "New tokens of all steps, encoded in every layer.",
    "encode_seconds": "Time in encode ops, all layers.",
    "attend_seconds": "Time in attention ops, all layers.",
    "non_finite_vectors": "Keys and values with NaN or Inf, stored as zero vectors.",
    "monitor_seconds": "Time the fidelity monitor has taken.",
    "monitor_step_seconds": "Time of steps as the fidelity monitor sees it; its budget is a share "
    "of this.",
    "monitor_rereads": "Samples read again after they had been compared.",
    "monitor_changed": "Samples that no longer read as when they were taken.",
}

# Of every worker: metric, help, number.
WORKER_GAUGES: tuple[tuple[str, str, Callable[[Counters], float]], ...] = (
    ("monitor_tokens", "Tokens of which the monitor holds exact copies.",
     lambda c: c["monitor_tokens"]),
    ("monitor_worst_layer_cosine", "Lowest mean cosine of recent samples among layers.",
     lambda c: c["monitor_worst_cosine"]),
    ("self_check_passed", "1 when the start-up check of the kernels passed, 0 when it was switched "
     "off.", lambda c: float(c["self_checks"] > 0)),
    ("monitor_enabled", "1 when the fidelity monitor is on, else 0.",
     lambda c: c["monitor_enabled"]),
)  # fmt: skip

Numbers = Callable[[Engine], Iterable[tuple[list[str], float | None]]]
"""What an engine has of a metric: further labels, and a number or None."""

# Of every engine: metric, help, further labels, numbers.
ENGINE_GAUGES: tuple[tuple[str, str, list[str], Numbers], ...] = (
    ("kv_cache_capacity_tokens", "Tokens the cache can hold.", [],
     lambda e: [([], e.capacity_tokens)]),
    ("kv_cache_capacity_tokens_16bit", "Tokens that 16 bits would hold in its memory.", [],
     lambda e: [([], e.capacity_tokens_16bit)]),
    ("kv_cache_bytes", "Memory of the cache.", [], lambda e: [([], e.cache_bytes)]),
    ("bytes_per_token", "Bytes of one token in all layers.", [],
     lambda e: [([], e.token_bytes("stored"))]),
    ("bytes_per_token_16bit", "Bytes of one token with 16 bits per coordinate.", [],
     lambda e: [([], e.token_bytes("16bit"))]),
    ("kv_cache_padding_ratio", "Share of the pages that holds nothing.", [],
     lambda e: [([], e.padding)]),
    ("compression_ratio", "Tokens in the memory of one in 16 bits.", [], lambda e: [([], e.ratio)]),
    # Measured once at the start.
    ("fidelity_gate", "1 at what the start said of the codes' loss, else 0.", ["state"],
     lambda e: [([state], state == e.fidelity["state"]) for state in get_args(State)]),
    ("expected_kl", "KL of next-token distributions with exact attention and from codes, in nats, "
     "on the start's text.", [], lambda e: [([], e.fidelity["kl"])]),
    ("expected_perplexity_increase", "Increase of perplexity by codes on the start's text, a "
     "share.", [], lambda e: [([], e.fidelity["perplexity_increase"])]),
    ("expected_cosine", "Cosine of attention over codes and over exact keys and values on the "
     "start's text, by layer.", ["layer"],
     lambda e: [([layer], x) for layer, x in e.fidelity["layer_cosines"].items()]),
    ("monitor_health", "1 at the state the fidelity monitor is in, else 0.", ["state"],
     lambda e: [([name], name == HEALTH[e.health()]) for name in HEALTH]),
)  # fmt: skip

FIDELITY = (
    ("fidelity_cosine", "cosine_by_layer", "layer",
     "Cosine of attention outputs from codes and from exact keys and values, by layer."),
    ("fidelity_error", "error_by_layer", "layer",
     "Relative error of attention outputs from codes, by layer."),
    ("fidelity_cosine_by_age", "cosine_by_age", "age", "As fidelity_cosine, by age of the tokens."),
    ("fidelity_error_by_age", "error_by_age", "age", "As fidelity_error, by age of the tokens."),
)  # fmt: skip


class FibQuantCollector:
    """A collector for a Prometheus registry.

    Args:
        status: called at every collection; None before the server is ready.
        usage: called at every collection; the share of each engine's blocks in use, by engine.
    """

    def __init__(
        self, status: Callable[[], Status | None], usage: Callable[[], dict[int, float]]
    ) -> None:
        self._status = status
        self._usage = usage

    def describe(self) -> list[Metric]:
        return []  # nothing is known before the server is ready

    def collect(self) -> Iterator[Metric]:
        status = self._status()
        if status is None:
            return
        family = gauge("enabled", "1 when the KV cache holds FibQuant codes, else 0.", [])
        family.add_metric([], float(status.enabled))
        yield family
        if status.options is None or not status.engines:
            return
        yield info_gauge(status, status.options)
        usage = self._usage()  # of no engine with --disable-log-stats
        used: tuple[tuple[str, str, list[str], Numbers], ...] = (
            ("kv_cache_used_tokens", "Tokens of blocks in use, filled or not.", [],
             lambda e: [([], usage[e.index] * e.capacity_tokens)] if e.index in usage else []),
            ("kv_cache_used_bytes", "Memory of blocks in use.", [],
             lambda e: [([], usage[e.index] * e.cache_bytes)] if e.index in usage else []),
        )  # fmt: skip
        for name, text, labelnames, numbers in (*ENGINE_GAUGES, *used):
            family = gauge(name, text, [*LABELS, *labelnames])
            for engine in status.engines:
                for own, number in numbers(engine):
                    if number is not None:
                        family.add_metric([*labels(status, engine), *own], float(number))
            yield family
        yield from worker_metrics(status)
        yield from fidelity_metrics(status)


def gauge(name: str, text: str, labelnames: list[str]) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"fibquant:{name}", text, labels=labelnames)


def labels(status: Status, engine: Engine) -> list[str]:
    return [status.model_name, str(engine.index)]


def info_gauge(status: Status, options: Options) -> Metric:
    """What vLLM calls an info metric: a gauge of 1 whose labels carry the facts."""
    facts = {
        "version": __version__,
        "kv_cache_dtype": status.kv_cache_dtype,
        "preset": options.preset.name,
        "key_code": code_text(options.preset.key),
        "value_code": code_text(options.preset.value),
        "layers": ", ".join(f"{number}: {name}" for number, name in options.layers),
        "prefill": options.prefill,
        "recent_window": str(options.recent_window),
        "kernel": status.engines[0].workers[0].report["kernel"],
    }
    family = gauge("info", "The cache's code and how it is read.", [*LABELS, *facts])
    for engine in status.engines:
        family.add_metric([*labels(status, engine), *facts.values()], 1.0)
    return family


def worker_metrics(status: Status) -> Iterator[Metric]:
    """What every worker counts."""

    def fill(family: Any, number: Callable[[Counters], float]) -> Metric:
        for engine in status.engines:
            for worker in engine.workers:
                if worker.counters:
                    own = [*labels(status, engine), str(worker.rank)]
                    family.add_metric(own, number(worker.counters))
        return family

    names = [*LABELS, "worker"]
    for name, text in WORKER_COUNTERS.items():
        family = CounterMetricFamily(f"fibquant:{name}", text, labels=names)
        yield fill(family, itemgetter(name))
    for name, text, number in WORKER_GAUGES:
        yield fill(gauge(name, text, names), number)


def fidelity_metrics(status: Status) -> Iterator[Metric]:
    """What the fidelity monitors of an engine's workers found together."""
    for name, histogram, label, text in FIDELITY:
        samples = HistogramMetricFamily(f"fibquant:{name}", text, labels=[*LABELS, label])
        bounds = [*map(floatToGoString, HISTOGRAMS[histogram][1]), "+Inf"]
        for engine in status.engines:
            for row, found in merged(engine, histogram).items():
                value = AGE_NAMES[row] if label == "age" else str(row)
                cumulative = [sum(found.counts[: i + 1]) for i in range(len(bounds))]
                samples.add_metric(
                    [*labels(status, engine), value],
                    list(zip(bounds, cumulative, strict=True)),
                    sum_value=found.total,
                )
        yield samples


def merged(engine: Engine, histogram: str) -> dict[int, Distribution]:
    """A histogram's rows over all workers of an engine."""
    rows: dict[int, Distribution] = {}
    for counters in engine.counters():
        for row, found in counters.rows(histogram).items():
            rows[row] = rows[row] + found if row in rows else found
    return dict(sorted(rows.items()))


def usage_in(registry: Any) -> dict[int, float]:
    """Share of each engine's blocks in use, from vLLM's own metric in a registry."""
    if registry is REGISTRY:
        # It holds our own collector: asking it for everything would never end.
        registry = registry.restricted_registry([USAGE_METRIC])
    return {
        int(sample.labels["engine"]): sample.value
        for family in registry.collect()
        if family.name == USAGE_METRIC
        for sample in family.samples
    }
