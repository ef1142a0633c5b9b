"""Prompts to rows, rows to answers: the shapes of OpenAI's completions and chat, whole and streamed."""

from __future__ import annotations

import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from sida_ext.serving.driver import Work
from sida_ext.serving.generation import Delta, Sampling, TokenLogprob
from sida_ext.serving.protocol import ChatRequest, CompletionRequest, RequestError
from sida_ext.serving.service import Answers, ClientLeftError, Front

__all__ = [
    "ChatShape",
    "CompletionShape",
    "EventStream",
    "encode_event",
    "generation_work",
    "stream",
    "tokens_of",
    "whole",
]

log = logging.getLogger("sida_ext.serving")


def encode_event(value: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


class EventStream(Response):
    """Sends what an iterator yields; the iterator itself learns when the client has left."""

    def __init__(self, events: AsyncIterator[bytes]) -> None:
        super().__init__(headers={"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-store"})
        del self.headers["content-length"]
        self.events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for event in self.events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def tokens_of(service: Front, given: str | list[str] | list[int] | list[list[int]], field: str) -> list[list[int]]:
    """Token ids of each prompt.

    Raises:
        RequestError: an empty or too long one, an id that the model does not have.
    """
    model = service.model
    single = isinstance(given, str) or (bool(given) and isinstance(given[0], int))
    prompts: Sequence[Any] = [given] if single else given
    if not prompts:
        raise RequestError(400, f"{field!r} is empty, expected at least one text", field)
    vocabulary = model.vocabulary
    found = []
    for prompt in prompts:
        ids = model.text_tokens(prompt) if isinstance(prompt, str) else list(prompt)
        if not ids:
            raise RequestError(400, f"{field!r} holds a text of no token", field)
        wrong = next((number for number in ids if not 0 <= number < vocabulary), None)
        if wrong is not None:
            raise RequestError(400, f"{field!r} holds the token {wrong}, expected 0 to {vocabulary - 1}", field)
        found.append(ids)
    return found


def generation_work(
    service: Front,
    prompts: Sequence[list[int]],
    body: CompletionRequest | ChatRequest,
    new: int | None,
    logprobs: int | None,
) -> list[Work]:
    """The rows of a generation: ``n`` for each prompt.

    Args:
        new: tokens asked for; None: as many as fit, at the most ``settings.default_tokens``.

    Raises:
        RequestError: the model does not generate; too many rows; too many tokens.
    """
    model, settings = service.model, service.settings
    if not model.generates:
        raise RequestError(400, f"{model.name} does not generate text (see /classify)", code="not_supported")
    rows = len(prompts) * body.n
    if rows > settings.choices:
        raise RequestError(
            400, f"{len(prompts)} prompts and n = {body.n} make {rows} rows, expected at most {settings.choices}", "n"
        )
    seed = body.seed if body.seed is not None else secrets.randbits(63)
    work: list[Work] = []
    for ids in prompts:
        used = 1 if model.seq2seq else len(ids)
        if len(ids) >= model.context:
            raise RequestError(
                400,
                f"the prompt has {len(ids)} tokens; the model's context is {model.context}, prompt and answer together",
                "prompt" if isinstance(body, CompletionRequest) else "messages",
                "context_length_exceeded",
            )
        room = min(model.context - used, service.limits.tokens - len(ids))
        if room < 1:
            raise RequestError(
                400, f"the prompt has {len(ids)} tokens; the server takes {service.limits.tokens}", code="too_long"
            )
        if new is not None and new > room:
            raise RequestError(
                400,
                f"max_tokens is {new}; beside a prompt of {len(ids)} tokens {room} are possible",
                "max_tokens",
                "context_length_exceeded",
            )
        for _ in range(body.n):
            sampling = Sampling(
                new_tokens=min(settings.default_tokens, room) if new is None else new,
                temperature=body.temperature,
                top_p=body.top_p,
                seed=(seed + len(work)) % 2**63,
                stops=tuple(body.stops),
                logprobs=logprobs,
            )
            work.append(Work("generate", list(ids), sampling))
    return work


class CompletionShape:
    """How ``/v1/completions`` answers."""

    prefix = "cmpl"
    object = chunk_object = "text_completion"

    def __init__(self, rows: int) -> None:
        self._offsets = [0] * rows

    def first(self, row: int) -> list[dict[str, Any]]:
        return []

    def piece(self, row: int, delta: Delta) -> dict[str, Any]:
        return self.choice(row, delta.text, delta.logprobs, delta.finish)

    def choice(self, row: int, text: str, logprobs: list[TokenLogprob], finish: str | None) -> dict[str, Any]:
        named: dict[str, Any] | None = None
        if logprobs:
            named = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
            for token in logprobs:
                named["tokens"].append(token.text)
                named["token_logprobs"].append(token.logprob)
                named["top_logprobs"].append({text: value for _, text, value in token.top} if token.top else None)
                named["text_offset"].append(self._offsets[row])
                self._offsets[row] += len(token.text)
        return {"index": row, "text": text, "logprobs": named, "finish_reason": finish}


class ChatShape:
    """How ``/v1/chat/completions`` answers."""

    prefix = "chatcmpl"
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def first(self, row: int) -> list[dict[str, Any]]:
        return [{"index": row, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}]

    def piece(self, row: int, delta: Delta) -> dict[str, Any]:
        said = {"content": delta.text} if delta.text else {}
        return {"index": row, "delta": said, "logprobs": self._logprobs(delta.logprobs), "finish_reason": delta.finish}

    def choice(self, row: int, text: str, logprobs: list[TokenLogprob], finish: str | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": text}
        return {"index": row, "message": message, "logprobs": self._logprobs(logprobs), "finish_reason": finish}

    @staticmethod
    def _logprobs(tokens: list[TokenLogprob]) -> dict[str, Any] | None:
        if not tokens:
            return None

        def named(text: str, value: float) -> dict[str, Any]:
            return {"token": text, "logprob": value, "bytes": list(text.encode())}

        return {
            "content": [
                {
                    **named(token.text, token.logprob),
                    "top_logprobs": [named(text, value) for _, text, value in token.top],
                }
                for token in tokens
            ]
        }


def _head(service: Front, shape: CompletionShape | ChatShape, kind: str) -> dict[str, Any]:
    number = f"{shape.prefix}-{secrets.token_hex(12)}"
    return {"id": number, "object": kind, "created": int(time.time()), "model": service.model.name}


def _usage(prompt: int, written: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}


async def whole(
    service: Front,
    request: Request,
    work: list[Work],
    deadline: float,
    shape: CompletionShape | ChatShape,
    prompt: int,
) -> dict[str, Any]:
    """The whole answer of a generation."""
    begin = time.perf_counter()
    texts: list[list[str]] = [[] for _ in work]
    logprobs: list[list[TokenLogprob]] = [[] for _ in work]
    finish: list[str | None] = [None] * len(work)
    written = 0
    async with service.run(request, work, deadline, whole=True) as answers:
        async for row, delta in answers.each():
            if not written:
                service.metrics.first_token.observe(answers.first_token_at() - begin)
            written += delta.tokens
            texts[row].append(delta.text)
            logprobs[row].extend(delta.logprobs)
            finish[row] = delta.finish
    choices = [shape.choice(row, "".join(texts[row]), logprobs[row], finish[row]) for row in range(len(work))]
    return {**_head(service, shape, shape.object), "choices": choices, "usage": _usage(prompt, written)}


async def stream(
    service: Front,
    request: Request,
    work: list[Work],
    deadline: float,
    shape: CompletionShape | ChatShape,
    prompt: int,
    usage: bool,
) -> EventStream:
    """The answer as events: pieces of every row, each row's last with its finish_reason, and ``[DONE]``; after an error
    an event with it, and ``[DONE]``.

    Raises:
        RequestError: the request cannot be taken; nothing was sent yet.
    """
    job = service.run(request, work, deadline)
    answers = await job.__aenter__()
    head = _head(service, shape, shape.chunk_object)
    begin = time.perf_counter()

    async def events() -> AsyncIterator[bytes]:
        try:
            async for event in _pieces(service, answers, head, shape, len(work), begin, prompt, usage):
                yield event
        except RequestError as problem:
            yield encode_event(problem.body())
        except ClientLeftError:
            return
        except Exception:
            log.exception("a stream failed")
            yield encode_event(RequestError(500, "the stream failed; the server's log says why").body())
        finally:
            await job.__aexit__(None, None, None)
        yield b"data: [DONE]\n\n"

    return EventStream(events())


async def _pieces(
    service: Front,
    answers: Answers,
    head: dict[str, Any],
    shape: CompletionShape | ChatShape,
    rows: int,
    begin: float,
    prompt: int,
    usage: bool,
) -> AsyncIterator[bytes]:
    extra = {"usage": None} if usage else {}
    begun: set[int] = set()
    written = 0
    async for row, delta in answers.each():
        if not written:
            service.metrics.first_token.observe(time.perf_counter() - begin)
        written += delta.tokens
        if row not in begun:
            begun.add(row)
            for choice in shape.first(row):
                yield encode_event({**head, "choices": [choice], **extra})
        if delta.text or delta.finish or delta.logprobs:
            yield encode_event({**head, "choices": [shape.piece(row, delta)], **extra})
    if usage:
        yield encode_event({**head, "choices": [], "usage": _usage(prompt, written)})
