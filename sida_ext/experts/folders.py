"""Where the package keeps what it made: packed stores, remembered hashes, and scratch folders of running processes."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

__all__ = ["ScratchFolder", "default_cache", "scratch_folder"]

PREFIX = "swapped-"


def default_cache() -> Path:
    """Folder of packed stores: ``$SIDA_CACHE``, else ``~/.cache/sida``."""
    return Path(os.environ.get("SIDA_CACHE") or Path.home() / ".cache" / "sida")


class ScratchFolder:
    """A folder in the cache that goes with :meth:`cleanup`, or, should its process be killed, with the next one that is
    made: a living process holds the lock on it."""

    def __init__(self, parent: Path) -> None:
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
            try:
                self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except FileNotFoundError:  # another process took it for one that was left behind
                continue
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            if os.fstat(self._lock).st_nlink:
                return
            os.close(self._lock)

    def cleanup(self) -> None:
        """Remove it; a second call does nothing."""
        if self._lock >= 0:
            shutil.rmtree(self.path)
            os.close(self._lock)
            self._lock = -1


def _remove_left_behind(parent: Path) -> None:
    for folder in parent.glob(f"{PREFIX}*"):
        # Its process may just have removed it, or still be at work.
        with suppress(FileNotFoundError, NotADirectoryError, BlockingIOError):
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
            finally:
                os.close(lock)


def scratch_folder() -> ScratchFolder:
    """A new folder in the cache, after those of killed processes have been removed.

    Raises:
        OSError: the cache cannot be written.
    """
    parent = default_cache()
    parent.mkdir(parents=True, exist_ok=True)
    _remove_left_behind(parent)
    return ScratchFolder(parent)
