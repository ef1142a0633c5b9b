"""Loads the compiled extension, after a check that it was built for the torch that is installed.

The extension is linked against torch's libraries, which ``import torch`` makes known to the loader. Where torch is not
imported they are loaded by their path, and Python's torch is left alone: 0.2 s of CPU time in place of 1.4 s.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

__all__ = ["_C", "check_build"]

BUILD_INFO = Path(__file__).with_name("_build_info.json")


def _installed_torch() -> str:
    """The version of torch that is imported, or that would be.

    Raises:
        ImportError: there is none.
    """
    if "torch" not in sys.modules:
        try:
            return version("torch")
        except PackageNotFoundError:
            pass  # not installed by pip: the import tells
    import torch

    return torch.__version__


def _load_libraries() -> None:
    if "torch" in sys.modules:
        return
    found = importlib.util.find_spec("torch")
    library = Path(found.origin).parent / "lib" / "libtorch_cpu.so" if found is not None and found.origin else None
    if library is not None and library.exists():
        ctypes.CDLL(str(library))
    else:  # torch is laid out in another way: it knows best
        import torch  # noqa: F401


def check_build(path: Path = BUILD_INFO, found: str | None = None) -> dict:
    """What the extension was built with.

    Args:
        found: the version of torch to check for; None: the one that is installed.

    Raises:
        ImportError: it was never built, or for another torch; a load would end in a missing symbol.
    """
    found = _installed_torch() if found is None else found
    try:
        info = json.loads(path.read_text())
    except FileNotFoundError:
        raise ImportError(
            f"sida_ext's extension was not built ({path} is missing); run: pip install --no-build-isolation ."
        ) from None
    if info["torch"] != found:
        raise ImportError(
            f"sida_ext was built against torch {info['torch']}, but torch {found} is installed; build it again against "
            "this one: pip install --force-reinstall --no-deps --no-build-isolation ."
        )
    return info


if check_build()["cuda"]:  # linked against more of torch's libraries, whose order torch knows
    import torch  # noqa: F401
_load_libraries()

# Every module takes the extension from here, so that none loads it unchecked.
from sida_ext import _C  # noqa: E402
