# SPDX-License-Identifier: Apache-2.0
"""What is known of the server: facts asked of every worker once, and their counters."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, field
from typing import Any

from vllm_fibquant.cli import info
from vllm_fibquant.codec.config import PRESETS
from vllm_fibquant.engine import compat
from vllm_fibquant.engine.plugin import REPORT_METHOD
from vllm_fibquant.engine.support import run_options
from vllm_fibquant.observe.counters import Counters
from vllm_fibquant.options import Options

logger = logging.getLogger(f"vllm.{__name__}")

REPORT_TIMEOUT_S = 60.0
HEALTH = ("unknown", "healthy", "degraded", "damaged")
"""The numbers of the counter monitor_health in words; of several workers the worst counts."""

FORMS = ("stored", "16bit", "auto")
"""As it is, with 16 bits per coordinate, and with --kv-cache-dtype auto."""


@dataclass
class Worker:
    """One worker: its report, and its counters where they can be read from this machine."""

    rank: int
    report: dict[str, Any]
    counters: Counters | None


@dataclass
class Engine:
    """The workers of one engine (one data-parallel rank) and what they hold together."""

    index: int
    capacity_tokens: int
    workers: list[Worker] = field(default_factory=list)

    def token_bytes(self, form: str) -> int:
        """Bytes of one token in all layers, in one of FORMS."""
        return sum(worker.report["token_bytes"][form] for worker in self.workers)

    @property
    def cache_bytes(self) -> int:
        return sum(worker.report["cache_bytes"] for worker in self.workers)

    @property
    def _fits(self) -> list[dict[str, Any]]:
        """What fits into the workers' memory, of those that have layers with a cache."""
        return [fit for worker in self.workers if (fit := worker.report["fits"])]

    @property
    def ratio(self) -> float | None:
        """How many times more tokens fit than with 16 bits, in the pages vLLM allocates.

        None where that is not known: beside layers that keep a state vLLM makes other blocks of 16
        bits, and records alone would promise too much.
        """
        stored = [fit["stored"]["num_tokens"] for fit in self._fits]
        dense = [fit.get("16bit", {}).get("num_tokens") for fit in self._fits]
        # The worker that holds least decides, with either.
        return min(stored) / min(dense) if stored and all(dense) else None

    @property
    def capacity_tokens_16bit(self) -> float | None:
        """Tokens that 16 bits would hold in the cache's memory, or None where that is not known."""
        return self.capacity_tokens / self.ratio if self.ratio else None

    @property
    def padding(self) -> float:
        """Share of the pages that holds nothing, as vLLM makes all pages equally large."""
        return max((fit["stored"]["padding"] for fit in self._fits), default=0.0)

    def health(self) -> int:
        """The worst health of the monitors, as an index of HEALTH."""
        return max((int(c["monitor_health"]) for c in self.counters()), default=0)

    @property
    def fidelity(self) -> dict[str, Any]:
        """What its start found that codes cost the model: all its workers know the same."""
        return self.workers[0].report["fidelity"]

    def counters(self) -> list[Counters]:
        return [worker.counters for worker in self.workers if worker.counters]


@dataclass
class Status:
    """The server as a whole.

    Attributes:
        model_name: what vLLM's metrics call it.
        kv_cache_dtype: as given.
        options: None when the cache is not ours.
        engines: empty when the cache is not ours, or the workers could not be asked.
        problem: why they could not.
    """

    model_name: str
    kv_cache_dtype: str
    options: Options | None = None
    engines: list[Engine] = field(default_factory=list)
    problem: str | None = None

    @property
    def enabled(self) -> bool:
        return self.options is not None

    def info(self) -> dict[str, Any]:
        """The body of GET /fibquant/info."""
        body: dict[str, Any] = {
            "enabled": self.enabled,
            "model": self.model_name,
            "kv_cache_dtype": self.kv_cache_dtype,
            "versions": info.versions(),
        }
        if self.options is None:
            return {**body, "reason": "the cache holds no codes: give --kv-cache-dtype fibquant"}
        if self.problem:
            body["problem"] = self.problem
        body |= {"preset": self.options.preset.name, "options": option_values(self.options)}
        if not self.engines:
            return body
        engine = self.engines[0]
        workers = [worker for e in self.engines for worker in e.workers]
        checks = [check for worker in workers for check in worker.report["self_checks"]]
        capacity = sum(e.capacity_tokens for e in self.engines)
        body |= {
            "kernel": ", ".join(sorted({worker.report["kernel"] for worker in workers})),
            "codes": codes_of(engine),
            "bytes_per_token": {form: engine.token_bytes(form) for form in FORMS},
            "compression_ratio": engine.ratio,
            "padding": engine.padding,
            "capacity_tokens": capacity,
            "capacity_tokens_16bit": round(capacity / engine.ratio) if engine.ratio else None,
            "cache_bytes": sum(e.cache_bytes for e in self.engines),
            "self_check": {
                "passed": bool(checks),
                "number": len(checks),
                "largest_error": max((check["error"] for check in checks), default=None),
                "tolerance": max((check["tolerance"] for check in checks), default=None),
            },
            "fidelity": max((e.fidelity for e in self.engines), key=lambda f: f["kl"] or 0.0),
            "num_engines": len(self.engines),
            "num_workers": len(workers),
            "num_workers_readable": sum(worker.counters is not None for worker in workers),
            "layers": {
                "all": sum(worker.report["num_layers"] for worker in engine.workers),
                "coded": sum(worker.report["num_coded_layers"] for worker in engine.workers),
            },
            "health": HEALTH[max(e.health() for e in self.engines)],
        }  # fmt: skip
        return body


def codes_of(engine: Engine) -> list[dict[str, Any]]:
    """The codes of all workers: pipeline stages may have layers with other presets."""
    codes: list[dict[str, Any]] = []
    for worker in engine.workers:
        codes += [code for code in worker.report["codes"] if code not in codes]
    return codes


def option_values(options: Options) -> dict[str, Any]:
    """The options of a run but its codes."""
    values = asdict(options)
    del values["preset"]
    values["layers"] = dict(options.layers)
    return {**values, "rotation_seed": options.preset.rotation_seed}


async def ask(engine_client: Any) -> Status:
    """The status of the server behind an engine client. Never raises for what workers say."""
    config = engine_client.vllm_config
    name = str(config.model_config.served_model_name)
    status = Status(name, str(config.cache_config.cache_dtype))
    if status.kv_cache_dtype not in PRESETS:
        return status
    status.options = run_options(config)
    try:
        reports = await compat.call_workers(engine_client, REPORT_METHOD, REPORT_TIMEOUT_S)
    except Exception as error:
        status.problem = f"the workers could not be asked: {type(error).__name__}: {error}"
        logger.warning("FibQuant: %s", status.problem)
        return status
    capacity = config.cache_config.kv_cache_size_tokens or 0
    for index, worker_reports in sorted(reports.items()):
        workers = [
            Worker(rank, report, _open(report["counters"]))
            for rank, report in enumerate(worker_reports)
        ]
        status.engines.append(Engine(index, capacity, workers))
    return status


def _open(path: str) -> Counters | None:
    try:
        return Counters.open(path)
    except (OSError, ValueError) as error:
        logger.warning("FibQuant: the counters of a worker cannot be read here: %s", error)
        return None
