"""The end of a program that has streams open: their threads end before the interpreter does.

Until Python 3.14 a thread that asks for the interpreter's lock while the interpreter ends is ended inside whatever C++
frames it stands in, and the first of them that may not throw aborts the program. Torch lets go of that lock in each of
its calls, so a thread that predicts or computes would meet it nearly always.
"""

from __future__ import annotations

import atexit
import ctypes
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

__all__ = ["at_work", "close_at_exit"]

# How long the end of a program waits for its streams' threads. A call of torch that takes longer goes on alone: it is
# cut off when the process is gone.
END_SECONDS = 5.0


class _Closable(Protocol):
    def close(self) -> object: ...


_changed = threading.Condition()
_working: dict[object, threading.Thread] = {}
_open: weakref.WeakSet[_Closable] = weakref.WeakSet()
_registered = False


@contextmanager
def at_work() -> Iterator[None]:
    """Inside the block this thread works for a stream: should the program end meanwhile, SystemExit is raised in it,
    which ends a thread without a word, and the program waits until it has left the block."""
    token = object()
    with _changed:
        _working[token] = threading.current_thread()
    try:
        yield
    finally:
        with _changed:
            del _working[token]
            _changed.notify_all()


def close_at_exit(queue: _Closable) -> None:
    """Close ``queue`` when the program ends, so that nobody waits at it."""
    global _registered
    with _changed:
        _open.add(queue)
        if not _registered:
            # At the first stream and not at import: what is registered last runs first, so that threads end before the
            # engines that they use are closed.
            atexit.register(_end_all)
            _registered = True


def _end_all() -> None:
    with _changed:
        queues = list(_open)
        threads = {thread for thread in _working.values() if thread is not threading.current_thread()}
    for queue in queues:
        queue.close()
    for thread in threads:
        if thread.ident is not None:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))
    deadline = time.monotonic() + END_SECONDS
    with _changed:
        _changed.wait_for(lambda: not threads & set(_working.values()), END_SECONDS)
    for thread in threads:
        # A daemon that goes on after its block is the caller's; one that ends now is waited for.
        thread.join(max(0.0, min(1.0, deadline - time.monotonic())))
