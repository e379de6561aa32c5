# SPDX-License-Identifier: Apache-2.0
"""`vllm-fibquant serve` as a process of its own: start, ask, look at it, stop."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

START_S = 600.0
STOP_S = 60.0
NAME = "served"
"""What models are called by requests."""

_SAMPLE = re.compile(r"^(\w[\w:]*)(?:\{.*\})? (\S+)$")


class ServerEnded(RuntimeError):
    """The server ended, or was not ready in time; with the end of its log."""


@dataclass
class Served:
    """A running server.

    Attributes:
        process: of the API server, the leader of a process group of its own.
        port: on 127.0.0.1.
        log_path: its output.
    """

    process: subprocess.Popen
    port: int
    log_path: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def open(
        self, path: str, body: Any = None, timeout: float = 120
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        """Sends a request and returns when its status is there. A body of bytes is sent as it is.

        Raises:
            OSError, http.client.HTTPException: there is no answer.
        """
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            if body is None:
                connection.request("GET", path)
            else:
                content = body if isinstance(body, bytes) else json.dumps(body).encode()
                headers = {"Content-Type": "application/json"}
                connection.request("POST", path, content, headers)
            return connection, connection.getresponse()
        except BaseException:
            connection.close()
            raise

    def ask(self, path: str, body: Any = None, timeout: float = 120) -> tuple[int, bytes]:
        """Status and body of the answer. As `open`."""
        connection, response = self.open(path, body, timeout)
        with contextlib.closing(connection):
            return response.status, response.read()

    def is_healthy(self) -> bool:
        with contextlib.suppress(OSError, http.client.HTTPException):
            return self.ask("/health", timeout=5)[0] == 200
        return False

    def metrics(self) -> Mapping[str, float]:
        """vLLM's counters and gauges, summed over labels; 0 for those it does not know."""
        values: dict[str, float] = defaultdict(float)
        for line in self.ask("/metrics")[1].decode().splitlines():
            if match := _SAMPLE.match(line):
                values[match[1].removesuffix("_total")] += float(match[2])
        return values

    def cache_tokens(self) -> int:
        """Tokens the cache has room for."""
        (line,) = (
            line
            for line in self.ask("/metrics")[1].decode().splitlines()
            if line.startswith("vllm:cache_config_info{")
        )
        blocks, size = (
            int(re.search(rf'{name}="(\d+)"', line)[1])  # type: ignore[index]
            for name in ("num_gpu_blocks", "block_size")
        )
        return blocks * size

    def processes(self) -> list[Any]:
        """psutil's view of the server and all it started, the server first."""
        import psutil

        with contextlib.suppress(psutil.NoSuchProcess):
            leader = psutil.Process(self.process.pid)
            return [leader, *leader.children(recursive=True)]
        return []

    def rss(self) -> int:
        """Resident bytes of all processes; memory they share counts once for each."""
        import psutil

        total = 0
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                total += process.memory_info().rss
        return total

    def cpu_seconds(self) -> float:
        """Processor time all processes have used since they started."""
        import psutil

        total = 0.0
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def stop(self) -> None:
        """Interrupts it, and kills what is left after a minute."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def serving(
    model: str,
    *flags: str,
    log_path: Path,
    environment: Mapping[str, str] | None = None,
    port: int | None = None,
) -> Iterator[Served]:
    """A server of `model` that answers requests; stopped at the end.

    Args:
        model: folder of a model.
        flags: of `vllm-fibquant serve`.
        log_path: where its output goes.
        environment: variables beside those of this process, without vLLM's.
        port: on 127.0.0.1; any free one when left out.

    Raises:
        ServerEnded: it did not start.
    """
    port = port or free_port()
    command = [sys.executable, "-m", "vllm_fibquant", "serve", model, "--served-model-name", NAME]
    command += ["--host", "127.0.0.1", "--port", str(port), *flags]
    # In-process engines set variables of vLLM's that a server must not inherit.
    kept = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    with log_path.open("w") as log:
        process = subprocess.Popen(
            command,
            env={**kept, **(environment or {})},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    server = Served(process, port, log_path)
    try:
        deadline = time.monotonic() + START_S
        while not server.is_healthy():
            if process.poll() is not None or time.monotonic() > deadline:
                raise ServerEnded(f"status {process.poll()}:\n{server.log[-8000:]}")
            time.sleep(0.25)
        yield server
    finally:
        server.stop()
