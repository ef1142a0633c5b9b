"""Tiny models of the families that the installed transformers has; a test of another one is skipped."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import transformers

from bench.causal import tiny_families
from bench.causal.tiny_families import FAMILIES, MissingFamilyError

__all__ = ["here", "tiny_model"]


def here(families: Iterable[str]) -> list[str]:
    """Those of the families whose class is there."""
    return [family for family in families if hasattr(transformers, FAMILIES[family].model)]


def tiny_model(family: str, seed: int = 0, **changes: Any) -> tuple[Any, Any]:
    """As :func:`bench.causal.tiny_families.tiny_model`."""
    try:
        return tiny_families.tiny_model(family, seed, **changes)
    except MissingFamilyError as missing:
        pytest.skip(str(missing))
