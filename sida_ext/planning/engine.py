"""The compiled engine, loaded when it is first asked something."""

from __future__ import annotations

import os
import sys
from types import ModuleType

__all__ = ["engine", "threads"]


def engine() -> ModuleType:
    """``sida_ext._C``, without Python's torch.

    Raises:
        ImportError: the extension was not built, or torch is too old for it.
    """
    from sida_ext._load import _C

    return _C


def threads() -> int:
    """Threads that compute: torch's own number, or what it will be when it is imported."""
    torch = sys.modules.get("torch")
    if torch is not None:
        return int(torch.get_num_threads())
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdecimal() and int(given) > 0 else len(os.sched_getaffinity(0))
