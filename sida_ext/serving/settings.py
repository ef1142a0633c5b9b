"""What a server allows: limits of requests, keys, time."""

from __future__ import annotations

import hmac
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ServerSettings", "read_keys"]


@dataclass(frozen=True)
class ServerSettings:
    """Limits of one server; those of batching are :class:`~sida_ext.serving.scheduler.Limits`.

    Args:
        body_bytes: of a request's body at the most; more is a 413.
        choices: rows of one request at the most: prompts times ``n``, texts, continuations.
        default_tokens: tokens of a chat answer whose request names no limit. (A completion's is 16, as OpenAI's is.)
        deadline: seconds after which a request ends with an error; a request may ask for less.
        drain: seconds that running requests get to end after SIGTERM or Ctrl-C.
        keys: API keys; empty: none is asked for.
        cors_origins: origins whose pages may call the server.
        events: seconds between two snapshots for the page.
    """

    body_bytes: int = 1 << 20
    choices: int = 64
    default_tokens: int = 256
    deadline: float = 600.0
    drain: float = 30.0
    keys: tuple[bytes, ...] = ()
    cors_origins: tuple[str, ...] = ()
    events: float = 1.0

    def __post_init__(self) -> None:
        for name in ("body_bytes", "choices", "default_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        for name in ("deadline", "events"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected more than 0 seconds")
        if self.drain < 0:
            raise ValueError(f"drain is {self.drain}, expected 0 seconds or more")

    def knows(self, key: bytes) -> bool:
        """Whether it is one of the keys; takes as long for every key of a length."""
        found = False
        for known in self.keys:
            found |= hmac.compare_digest(known, key)
        return found


def read_keys(path: str | os.PathLike[str]) -> tuple[bytes, ...]:
    """The keys of a file: one a line; empty lines and those that begin with # are skipped.

    Raises:
        ValueError: the file holds none, or others than its owner can read it.
    """
    file = Path(path)
    mode = file.stat().st_mode
    if mode & 0o077:
        raise ValueError(f"{file} can be read by others (mode {mode & 0o777:o}), expected 600: chmod 600 {file}")
    lines: Sequence[bytes] = file.read_bytes().splitlines()
    keys = tuple(line.strip() for line in lines if line.strip() and not line.strip().startswith(b"#"))
    if not keys:
        raise ValueError(f"{file} holds no key, expected one a line")
    return keys
