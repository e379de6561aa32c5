# SPDX-License-Identifier: Apache-2.0
"""A process of the server is killed while it generates: clients are told, and nothing hangs."""

from __future__ import annotations

import contextlib
import signal
import time

import pytest

from benchmarks.served import serving

from .models import make_model
from .test_faults import FLAGS, ONE_THREAD, body_of, seconds_until

pytestmark = pytest.mark.slow

TOLD_WITHIN_S = 60.0


@pytest.mark.parametrize(
    ("victim", "flags"),
    [("EngineCore", ()), ("Worker", ("--tensor-parallel-size", "2"))],
    ids=["engine core", "one of two workers"],
)
def test_killed_at_work(victim, flags, model_folder, tmp_path):
    import psutil

    with serving(
        make_model("llama", model_folder), *FLAGS, *flags,
        log_path=tmp_path / "log", environment=ONE_THREAD,
    ) as server:  # fmt: skip
        processes = server.processes()
        victims = [p for p in processes if victim in " ".join(p.cmdline())]
        assert victims, [p.cmdline() for p in processes]
        prompt = [5] * 40
        connection, response = server.open(
            "/v1/completions", body_of(prompt, 400, stream=True), timeout=TOLD_WITHIN_S
        )
        assert response.readline().startswith(b"data: ")
        victims[-1].kill()
        begin = time.monotonic()
        content = b""
        with contextlib.closing(connection), contextlib.suppress(Exception):
            content = response.read()  # times out, and fails below, if nobody ends it
        told = time.monotonic() - begin
        assert told < TOLD_WITHIN_S
        assert b"[DONE]" not in content or b"error" in content, "the answer was not complete"
        unhealthy = seconds_until(lambda: not server.is_healthy(), TOLD_WITHIN_S)
        _, alive = psutil.wait_procs(processes, timeout=TOLD_WITHIN_S)
        print(
            f"\n{victim} killed: client told after {told:.1f} s with {content[-200:]!r}, "
            f"/health failed {unhealthy:.1f} s later, server's status {server.process.poll()}"
        )
        assert not alive, "no process may stay behind"
        # vLLM ends with status 0 here: whoever watches the server must restart it always.
        assert server.process.poll() is not None


def test_stopped_with_time_to_finish(model_folder, tmp_path):
    """--shutdown-timeout: what is being generated on SIGTERM is generated to its end."""
    with serving(
        make_model("llama", model_folder), *FLAGS, "--shutdown-timeout", "60",
        log_path=tmp_path / "log", environment=ONE_THREAD,
    ) as server:  # fmt: skip
        connection, response = server.open(
            "/v1/completions", body_of([5] * 40, 200, stream=True), timeout=TOLD_WITHIN_S
        )
        assert response.readline().startswith(b"data: ")
        server.process.send_signal(signal.SIGTERM)
        with contextlib.closing(connection):
            content = response.read()
        assert content.endswith(b"data: [DONE]\n\n")
        assert content.count(b"data: ") >= 200
        print(f"\nfinished; server's status {server.process.wait(60)}")
