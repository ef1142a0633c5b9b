"""The HTTP application: routes, errors, life. ``create_app`` makes it from a service; the command and Ray run it."""

from __future__ import annotations

import asyncio
import base64
import struct
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from jinja2.exceptions import TemplateError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from sida_ext.serving.answers import (
    ChatShape,
    CompletionShape,
    EventStream,
    encode_event,
    generation_work,
    stream,
    tokens_of,
    whole,
)
from sida_ext.serving.driver import Work
from sida_ext.serving.guards import Guards
from sida_ext.serving.protocol import (
    ChatRequest,
    ClassifyRequest,
    CompletionRequest,
    EmbeddingRequest,
    RequestError,
    ScoreRequest,
)
from sida_ext.serving.routes import BodyRoute, ShortWay, invalid
from sida_ext.serving.service import ClientLeftError, Front, until_left

__all__ = ["create_app"]

DEADLINE_HEADER = "x-deadline-seconds"


def create_app(service: Front) -> FastAPI:
    """The application of one service."""

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        try:
            yield
        finally:
            await service.stop()

    # No pages that load scripts from elsewhere: the interface is described at /openapi.json alone.
    app = _Application(title="sida serve", docs_url=None, redoc_url=None, lifespan=life)
    app.router.route_class = BodyRoute
    app.state.service = service
    _add_errors(app)
    _add_generation(app, service)
    _add_once(app, service)
    _add_watching(app, service)
    endpoints = [route.path for route in app.routes if hasattr(route, "path")]
    short = ShortWay(app.long_way, app.routes, app.exception_handlers)
    app.front = Guards(short, service.settings, service.metrics, endpoints)
    if service.settings.cors_origins:
        app.front = CORSMiddleware(
            app.front,
            allow_origins=list(service.settings.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", DEADLINE_HEADER],
        )
    return app


class _Application(FastAPI):
    """What stands before the routes stands before FastAPI as well: see :class:`~sida_ext.serving.routes.ShortWay`."""

    front: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.front(scope, receive, send)

    async def long_way(self, scope: Scope, receive: Receive, send: Send) -> None:
        await super().__call__(scope, receive, send)


def _answer(problem: RequestError) -> Response:
    headers = {} if problem.retry_after is None else {"retry-after": str(problem.retry_after)}
    return JSONResponse(problem.body(), problem.status, headers)


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(RequestError)
    async def problem(request: Request, error: RequestError) -> Response:
        return _answer(error)

    @app.exception_handler(ClientLeftError)
    async def left(request: Request, error: ClientLeftError) -> Response:
        return Response(status_code=499)  # nobody reads it; it is what the metrics count

    @app.exception_handler(RequestValidationError)
    async def refused(request: Request, error: RequestValidationError) -> Response:
        return _answer(invalid(error.errors()[0]))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        if error.status_code == 404:
            return _answer(RequestError(404, f"there is no {request.url.path} here", code="unknown_url"))
        return _answer(RequestError(error.status_code, str(error.detail)))

    @app.exception_handler(Exception)
    async def unknown(request: Request, error: Exception) -> Response:
        return _answer(RequestError(500, "the server failed; its log says why", code="internal_error"))


def _check(service: Front, request: Request, model: str | None) -> float:
    """The request's deadline in seconds, once its model is known to be served."""
    if model is not None and model != service.model.name:
        raise RequestError(
            404, f"the model {model!r} is not served here, only {service.model.name!r}", "model", "model_not_found"
        )
    asked = request.headers.get(DEADLINE_HEADER)
    if asked is None:
        return service.settings.deadline
    try:
        seconds = float(asked)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds <= service.settings.deadline:
        raise RequestError(
            400,
            f"{DEADLINE_HEADER} is {asked!r}, expected seconds, more than 0 and at most {service.settings.deadline:g}",
        )
    return seconds


def _add_generation(app: FastAPI, service: Front) -> None:
    async def answered(
        request: Request,
        body: CompletionRequest | ChatRequest,
        shape: CompletionShape | ChatShape,
        work: list[Work],
        deadline: float,
        prompt: int,
    ) -> Any:
        if body.stream_options is not None and not body.stream:
            raise RequestError(400, 'stream_options is given without "stream": true', "stream_options")
        if not body.stream:
            return JSONResponse(await whole(service, request, work, deadline, shape, prompt))
        usage = body.stream_options is not None and body.stream_options.include_usage
        return await stream(service, request, work, deadline, shape, prompt, usage)

    @app.post("/v1/completions")
    async def completions(request: Request, body: CompletionRequest) -> Any:
        deadline = _check(service, request, body.model)
        prompts = tokens_of(service, body.prompt, "prompt")
        work = generation_work(
            service, prompts, body, 16 if body.max_tokens is None else body.max_tokens, body.logprobs
        )
        shape = CompletionShape(len(work))
        return await answered(request, body, shape, work, deadline, sum(map(len, prompts)))

    @app.post("/v1/chat/completions")
    async def chat(request: Request, body: ChatRequest) -> Any:
        deadline = _check(service, request, body.model)
        tokenizer = service.model.tokenizer
        if getattr(tokenizer, "chat_template", None) is None:
            raise RequestError(
                400,
                f"the tokenizer of {service.model.name} has no chat template; use /v1/completions",
                "messages",
                "no_chat_template",
            )
        try:
            ids = tokenizer.apply_chat_template(
                [message.plain() for message in body.messages],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
            )
        except (TemplateError, ValueError, TypeError) as error:
            raise RequestError(400, f"the chat template refuses these messages: {error}", "messages") from error
        new = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        work = generation_work(service, [list(ids)], body, new, logprobs)
        return await answered(request, body, ChatShape(), work, deadline, len(ids))

    @app.get("/v1/models")
    async def models() -> Any:
        return {"object": "list", "data": [_model_card(service)]}

    @app.get("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> Any:
        _check(service, request, name)
        return _model_card(service)


def _model_card(service: Front) -> dict[str, Any]:
    return {"id": service.model.name, "object": "model", "created": service.model.created, "owned_by": "sida"}


def _add_once(app: FastAPI, service: Front) -> None:
    async def rows(request: Request, work: list[Work], deadline: float) -> list[list[float]]:
        if len(work) > service.settings.choices:
            raise RequestError(400, f"{len(work)} texts in a request, expected at most {service.settings.choices}")
        for part in work:
            tokens = len(part.ids) + len(part.continuation)
            if tokens > min(service.model.context, service.limits.tokens):
                raise RequestError(
                    400,
                    f"a text has {tokens} tokens, expected at most {min(service.model.context, service.limits.tokens)}",
                    code="context_length_exceeded",
                )
        found: list[list[float]] = [[] for _ in work]
        async with service.run(request, work, deadline) as answers:
            async for row, answer in answers.each():
                found[row] = answer
        return found

    @app.post("/v1/embeddings")
    async def embeddings(request: Request, body: EmbeddingRequest) -> Any:
        deadline = _check(service, request, body.model)
        texts = tokens_of(service, body.input, "input")
        found: Sequence[Any] = await rows(request, [Work("embed", ids) for ids in texts], deadline)
        if body.encoding_format == "base64":
            found = [base64.b64encode(struct.pack(f"<{len(row)}f", *row)).decode() for row in found]
        data = [{"object": "embedding", "index": place, "embedding": row} for place, row in enumerate(found)]
        return JSONResponse({"object": "list", "data": data, "model": service.model.name, "usage": _tokens(texts)})

    @app.post("/classify")
    async def classify(request: Request, body: ClassifyRequest) -> Any:
        deadline = _check(service, request, body.model)
        if not service.model.classifies:
            raise RequestError(
                400, f"{service.model.name} does not classify: it has no classification head", code="not_supported"
            )
        texts = tokens_of(service, body.input, "input")
        found = await rows(request, [Work("classify", ids) for ids in texts], deadline)
        labels = service.model.labels
        data = [
            {"index": place, "label": labels[row.index(max(row))], "logits": dict(zip(labels, row, strict=True))}
            for place, row in enumerate(found)
        ]
        return JSONResponse({"object": "list", "data": data, "model": service.model.name, "usage": _tokens(texts)})

    @app.post("/score")
    async def score(request: Request, body: ScoreRequest) -> Any:
        deadline = _check(service, request, body.model)
        if not service.model.generates:
            raise RequestError(
                400, f"{service.model.name} gives text no probability: it does not generate", code="not_supported"
            )
        prompt = tokens_of(service, body.prompt, "prompt")[0]
        tokenizer = service.model.tokenizer
        continuations = [service.model.text_tokens(text, add_special_tokens=False) for text in body.continuations]
        if not all(continuations):
            raise RequestError(400, "'continuations' holds a text of no token", "continuations")
        found = await rows(request, [Work("score", prompt, None, ids) for ids in continuations], deadline)
        data = [
            {
                "index": place,
                "logprob": sum(row),
                "tokens": [tokenizer.decode([number]) for number in continuations[place]],
                "token_logprobs": row,
            }
            for place, row in enumerate(found)
        ]
        usage = _tokens([prompt, *continuations])
        return JSONResponse({"object": "list", "data": data, "model": service.model.name, "usage": usage})


def _tokens(texts: list[list[int]]) -> dict[str, int]:
    tokens = sum(map(len, texts))
    return {"prompt_tokens": tokens, "total_tokens": tokens}


def _add_watching(app: FastAPI, service: Front) -> None:
    page = (files("sida_ext.serving") / "page.html").read_text(encoding="utf-8")

    @app.get("/")
    async def root() -> Response:
        return HTMLResponse(
            page,
            headers={
                # Everything of the page is in the page.
                "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
                "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
                "cache-control": "no-cache",
            },
        )

    @app.get("/health")
    async def health() -> Response:
        if service.draining:
            return JSONResponse({"status": "shutting down"}, 503)
        status, more = service.standing()
        return JSONResponse({"status": status, "model": service.model.name, **more}, 200 if status == "ok" else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/events")
    async def events(request: Request) -> Response:
        async def snapshots() -> AsyncIterator[bytes]:
            gone = asyncio.Event()
            watch = asyncio.create_task(until_left(request, gone.set))
            try:
                while not gone.is_set() and not service.draining:
                    yield encode_event(service.metrics.snapshot())
                    end = time.monotonic() + service.settings.events
                    while time.monotonic() < end and not gone.is_set() and not service.draining:
                        await asyncio.sleep(min(0.25, max(end - time.monotonic(), 0.01)))
            finally:
                watch.cancel()

        return EventStream(snapshots())
