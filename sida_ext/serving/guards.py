"""What stands before the routes: API keys, the size of a body, the measure of every request. Plain ASGI."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sida_ext.serving.metrics import FrontMetrics
from sida_ext.serving.protocol import RequestError
from sida_ext.serving.settings import ServerSettings

__all__ = ["Guards", "send_problem"]

OPEN = frozenset({"/", "/health"})  # the page asks for a key itself


async def send_problem(send: Send, problem: RequestError) -> None:
    """Answer with an error."""
    body = json.dumps(problem.body()).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if problem.retry_after is not None:
        headers.append((b"retry-after", str(problem.retry_after).encode()))
    if problem.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if problem.status == 413:
        headers.append((b"connection", b"close"))  # the rest of the body is not read
    await send({"type": "http.response.start", "status": problem.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class Guards:
    """Measures every request, asks for a key, ends a body that is too large.

    Args:
        app: what is guarded.
        settings, metrics: of the server.
        endpoints: paths that are told apart in the metrics.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings, metrics: FrontMetrics, endpoints: Iterable[str]) -> None:
        self.app, self.settings, self.metrics = app, settings, metrics
        self.endpoints = frozenset(endpoints)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"]
        endpoint = path if path in self.endpoints else "other"
        begin = time.perf_counter()
        status = 0

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._guarded(scope, receive, counted)
        finally:
            self.metrics.requests.labels(endpoint, str(status or 499)).inc()  # 499: the client left before an answer
            self.metrics.latency.labels(endpoint).observe(time.perf_counter() - begin)

    async def _guarded(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        preflight = scope["method"] == "OPTIONS" and b"access-control-request-method" in headers
        if self.settings.keys and scope["path"] not in OPEN and not preflight and not self._allowed(headers):
            await send_problem(send, RequestError(401, "the API key is missing or wrong", code="invalid_api_key"))
            return
        limit = self.settings.body_bytes
        too_large = RequestError(413, f"the body is larger than {limit} bytes", code="body_too_large")
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length) > limit:
            await send_problem(send, too_large)
            return
        taken = 0
        over = started = False

        async def measured() -> Message:
            nonlocal taken, over
            message = await receive()
            if message["type"] == "http.request":
                taken += len(message.get("body", b""))
                over |= taken > limit
            return {"type": "http.disconnect"} if over else message

        async def watched(message: Message) -> None:
            nonlocal started
            if not over or started:  # what the application says of a body that was cut is not sent
                started = True
                await send(message)

        await self.app(scope, measured, watched)
        if over and not started:
            await send_problem(send, too_large)

    def _allowed(self, headers: dict[bytes, Any]) -> bool:
        kind, _, key = headers.get(b"authorization", b"").partition(b" ")
        return self.settings.knows(key.strip()) and kind.lower() == b"bearer"
