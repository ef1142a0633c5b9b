"""Loads the compiled extension, after a check that it was built for the torch that is installed."""

from __future__ import annotations

import json
from pathlib import Path

import torch

__all__ = ["_C", "check_build"]

BUILD_INFO = Path(__file__).with_name("_build_info.json")


def check_build(path: Path = BUILD_INFO, found: str = torch.__version__) -> dict:
    """What the extension was built with.

    Raises:
        ImportError: it was never built, or for another torch; a load would end in a missing symbol.
    """
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


check_build()

# Every module takes the extension from here, so that none loads it unchecked.
from sida_ext import _C  # noqa: E402
