"""Routes that take one JSON body, read and reached by the short way.

FastAPI solves a tree of dependencies for every request, and tries one route's pattern after the other. A route of ours
has no dependencies but its request and its body, and no parameters in its path; beside a small model's work, what the
long way takes is much. So :class:`ShortWay` calls it at once. It stays a route of FastAPI's as well: for the
description at ``/openapi.json``, and to refuse other methods.
"""

from __future__ import annotations

import inspect
import json
import re
import typing
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from sida_ext.serving.protocol import RequestError
from sida_ext.serving.service import ClientLeftError

__all__ = ["BodyRoute", "ShortWay", "invalid"]

Handler = Callable[[Request], Coroutine[Any, Any, Response]]


def invalid(found: Mapping[str, Any]) -> RequestError:
    """What is answered to the first problem that pydantic finds."""
    place = [str(part) for part in found["loc"] if part != "body"]
    name = ".".join(place) or None
    message = found["msg"].removeprefix("Value error, ")
    named = re.match(r"the field '(\w+)'", message)
    param = place[0] if place else named[1] if named else None
    return RequestError(400, f"{name}: {message}" if name else message, param)


class BodyRoute(APIRoute):
    """A route whose endpoint takes ``request`` and one pydantic model, ``body``; any other is FastAPI's."""

    def get_route_handler(self) -> Handler:
        return self.short() or super().get_route_handler()

    def short(self) -> Handler | None:
        """Reads the body and calls the endpoint; None if it is another kind of route."""
        endpoint: Any = self.endpoint
        model = typing.get_type_hints(endpoint).get("body")
        if model is None or list(inspect.signature(endpoint).parameters) != ["request", "body"]:
            return None

        async def handle(request: Request) -> Response:
            try:
                content = await request.body()
            except ClientDisconnect as error:  # or the body is larger than it may be: then that is answered
                raise ClientLeftError from error
            return await endpoint(request, _read(content, request, model))

        return handle


class ShortWay:
    """Calls the routes that take a body; everything else goes on to ``app``.

    Args:
        app: the ASGI application that has all routes.
        routes: all of it.
        problems: what answers an exception of an endpoint, by its type; ``Exception`` any other, which is then raised
            for the server's log.
    """

    def __init__(self, app: ASGIApp, routes: Sequence[BaseRoute], problems: Mapping[Any, Any]) -> None:
        self.app = app
        self._handlers = {
            route.path: handler
            for route in routes
            if isinstance(route, BodyRoute) and route.methods == {"POST"} and (handler := route.short()) is not None
        }
        self._problems = problems

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        handler = None
        if scope["type"] == "http" and scope["method"] == "POST":
            handler = self._handlers.get(scope["path"])
        if handler is None:
            await self.app(scope, receive, send)
            return
        request = Request(scope, receive, send)
        try:
            response = await handler(request)
        except (RequestError, ClientLeftError) as error:
            response = await self._problems[type(error)](request, error)
        except Exception as error:
            response = await self._problems[Exception](request, error)
            await response(scope, receive, send)
            raise
        await response(scope, receive, send)


def _read(content: bytes, request: Request, model: type[BaseModel]) -> BaseModel:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if not content or not (kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))):
        raise RequestError(400, "expected a JSON body: send the header Content-Type: application/json")
    try:
        found = json.loads(content)
    except json.JSONDecodeError as error:
        raise RequestError(400, f"the body is no JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:  # bytes that are no text, a number of too many digits, too deep
        raise RequestError(400, f"the body is no JSON: {error}") from error
    try:
        return model.model_validate(found)
    except ValidationError as error:
        raise invalid(error.errors(include_url=False)[0]) from error
