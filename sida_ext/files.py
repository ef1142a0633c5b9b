"""Files that appear under their name when they are complete."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["placed", "written_whole"]


def placed(name: str) -> str:
    """A file or folder by its whole path, which other processes find; anything else, such as a hub id, as it is."""
    path = Path(name)
    return str(path.resolve()) if path.exists() else name


@contextmanager
def written_whole(path: str | os.PathLike[str], *, sync: bool = False) -> Iterator[Path]:
    """A name beside ``path`` for the block to write to. When the block ends well the file takes the place of ``path``
    in one step; when it fails ``path`` stays as it was, and what was written goes.

    Two writers of one path do not meet: each has a name of its own, and the last to end wins.

    Args:
        path: the file; its folder must exist.
        sync: see the bytes on the disk first, so that a power cut too leaves the old file or the new one. For what took
            long to make.
    """
    path = Path(path)
    # The name's end stays, by which some writers choose a format.
    partial = path.with_name(f".{secrets.token_hex(4)}.partial.{path.name}")
    try:
        yield partial
        if sync:
            _sync(partial)
        partial.replace(path)
        if sync:
            _sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
