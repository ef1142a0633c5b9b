"""A served model in this process, behind a real port."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from sida_ext.serving.model import ServedModel
from sida_ext.serving.scheduler import Limits
from sida_ext.serving.server import create_app
from sida_ext.serving.service import Service
from sida_ext.serving.settings import ServerSettings

__all__ = ["ServedHere", "served_here", "serving"]


class ServedHere:
    """A running server: its address and what is behind it."""

    def __init__(self, url: str, service: Service) -> None:
        self.url, self.service = url, service

    def wait_idle(self, seconds: float = 20.0) -> None:
        """Until no row waits or runs."""
        end = time.monotonic() + seconds
        while self.service.driver.waiting or self.service.driver.running or self.service.driver.kept:
            if time.monotonic() > end:
                raise TimeoutError(f"rows are still there after {seconds} s")
            time.sleep(0.005)


@contextmanager
def served_here(
    model: Any, tokenizer: Any, *, name: str = "tiny", limits: Limits | None = None, **settings: Any
) -> Iterator[ServedHere]:
    """Serve on a free port of 127.0.0.1 until the block ends."""
    limits = limits or Limits()
    served = ServedModel(model, tokenizer, name, rows=limits.rows, shared=limits.shared)
    with serving(served, limits, **settings) as server:
        yield server


@contextmanager
def serving(served: ServedModel, limits: Limits, **settings: Any) -> Iterator[ServedHere]:
    """The same with a model that is ready to be served."""
    service = Service(served, limits, ServerSettings(**settings))
    server = uvicorn.Server(
        uvicorn.Config(create_app(service), port=0, log_level="warning", timeout_graceful_shutdown=5)
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            if not thread.is_alive():
                raise RuntimeError("the server did not start")
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield ServedHere(f"http://127.0.0.1:{port}", service)
    finally:
        service.draining = True  # endless streams end
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive(), "the server has not ended"
