"""Where packed stores and what was measured of this machine are kept."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["default_cache"]


def default_cache() -> Path:
    """Folder of packed stores: ``$SIDA_CACHE``, else ``~/.cache/sida``."""
    return Path(os.environ.get("SIDA_CACHE") or Path.home() / ".cache" / "sida")
