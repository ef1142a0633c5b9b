"""Routes that take one JSON body, read by the short way.

FastAPI solves a tree of dependencies for every request. A route of ours has none but its request and its body; beside a
small model's work, what solving them takes is much.
"""

from __future__ import annotations

import inspect
import json
import re
import typing
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from sida_ext.serving.protocol import RequestError
from sida_ext.serving.service import ClientLeftError

__all__ = ["BodyRoute", "invalid"]


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

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        endpoint: Any = self.endpoint
        model = typing.get_type_hints(endpoint).get("body")
        if model is None or list(inspect.signature(endpoint).parameters) != ["request", "body"]:
            return super().get_route_handler()

        async def handle(request: Request) -> Response:
            try:
                content = await request.body()
            except ClientDisconnect as error:  # or the body is larger than it may be: then that is answered
                raise ClientLeftError from error
            return await endpoint(request, _read(content, request, model))

        return handle


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
