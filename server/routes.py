# SPDX-License-Identifier: Apache-2.0
"""The routes of vLLM's API server that are ours, as vLLM's endpoint-plugin interface wants them.

    GET /fibquant                status page; static, needs no key, holds no data
    GET /fibquant/<asset>        its script, style and icon
    GET /fibquant/info           what is served and how, as JSON; needs the API key where one is set

The numbers the page shows are those of /metrics, which vLLM leaves open.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, generate_latest

from vllm_fibquant.engine import compat
from vllm_fibquant.server.metrics import FibQuantCollector, usage_in
from vllm_fibquant.server.status import Status, ask

PAGE_DIR = Path(__file__).parent / "page"
MEDIA_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css",
               ".svg": "image/svg+xml"}  # fmt: skip
PAGE_HEADERS = {
    # Nothing but our own files, and requests to the server the page came from.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class FibQuantRoutes:
    """The endpoint plugin, one per API server process."""

    name = "fibquant"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._status: Status | None = None
        self._verify: Callable[[Mapping[str, str]], bool] | None = None

    def attach_router(self, app: FastAPI) -> None:
        """Adds the routes, and our metrics to those vLLM serves."""
        app.add_api_route(
            "/fibquant/info",
            self._info,
            methods=["GET"],
            tags=["fibquant"],
            responses={401: {"description": "a key is needed"}, 503: {"description": "starting"}},
        )
        for path in sorted(PAGE_DIR.iterdir()):
            address = "/fibquant" if path.name == "index.html" else f"/fibquant/{path.name}"
            app.add_api_route(address, _serve_file(path), methods=["GET"], include_in_schema=False)

        registry = compat.metrics_registry()
        if registry is REGISTRY:
            collector = FibQuantCollector(lambda: self._status, lambda: usage_in(REGISTRY))
            REGISTRY.register(collector)
            return
        # Several API servers: vLLM reads their metrics from files, ours come from the workers.
        usage = lambda: usage_in(compat.metrics_registry())  # noqa: E731
        registry.register(FibQuantCollector(lambda: self._status, usage))

        def metrics() -> Response:
            return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

        app.add_api_route("/metrics", metrics, methods=["GET"], include_in_schema=False)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Asks the workers, once the engine is ready."""
        self._verify = compat.token_verifier(args)
        if engine_client is not None:
            self._status = await ask(engine_client)

    async def _info(self, request: Request) -> JSONResponse:
        if self._verify and not self._verify(request.headers):
            return JSONResponse({"error": "Unauthorized"}, status_code=401)
        if self._status is None:
            return JSONResponse({"error": "the engine is not ready"}, status_code=503)
        return JSONResponse(self._status.info(), headers={"Cache-Control": "no-store"})


def _serve_file(path: Path) -> Callable[[], Response]:
    content, media_type = path.read_bytes(), MEDIA_TYPES[path.suffix]

    def serve() -> Response:
        return Response(content, media_type=media_type, headers=PAGE_HEADERS)

    return serve
