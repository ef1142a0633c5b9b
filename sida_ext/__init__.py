"""Serve Mixture-of-Experts transformers whose experts do not fit where they are computed (SiDA-MoE).

Importing the package touches no device and starts no thread. It registers ``torch.ops.sida``; the names below are
imported when they are first used, transformers with them.
"""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sida_ext.errors import PredictorError, StoreError
    from sida_ext.experts.options import Options
    from sida_ext.experts.runtime import Runtime
    from sida_ext.experts.stats import LayerStats, Stats
    from sida_ext.models.classification import SwitchTransformersForSequenceClassification
    from sida_ext.models.packing import pack
    from sida_ext.models.swap import from_pretrained, swap_experts
    from sida_ext.planning.verdict import Plan, plan
    from sida_ext.precision import get_precision, precisions, set_precision
    from sida_ext.prediction.protocol import (
        DecoderPredictor,
        HashPredictor,
        HashTable,
        Predictor,
        TokenTablePredictor,
    )
    from sida_ext.prediction.router_lookahead import RouterLookahead
    from sida_ext.serving.pipeline import stream
    from sida_ext.serving.schedule import stream_by_tokens
    from sida_ext.serving.token_batches import TokenBatch, batches_by_tokens

    __version__: str

__all__ = [
    "DecoderPredictor",
    "HashPredictor",
    "HashTable",
    "LayerStats",
    "Options",
    "Plan",
    "Predictor",
    "PredictorError",
    "RouterLookahead",
    "Runtime",
    "Stats",
    "StoreError",
    "SwitchTransformersForSequenceClassification",
    "TokenBatch",
    "TokenTablePredictor",
    "batches_by_tokens",
    "from_pretrained",
    "get_precision",
    "pack",
    "plan",
    "precisions",
    "set_precision",
    "stream",
    "stream_by_tokens",
    "swap_experts",
]

# Where each name is defined, as above for the type checker.
_HOME = {
    "errors": ("PredictorError", "StoreError"),
    "experts.options": ("Options",),
    "experts.runtime": ("Runtime",),
    "planning.verdict": ("Plan", "plan"),
    "experts.stats": ("LayerStats", "Stats"),
    "models.classification": ("SwitchTransformersForSequenceClassification",),
    "models.packing": ("pack",),
    "models.swap": ("from_pretrained", "swap_experts"),
    "precision": ("get_precision", "precisions", "set_precision"),
    "prediction.protocol": ("DecoderPredictor", "HashPredictor", "HashTable", "Predictor", "TokenTablePredictor"),
    "prediction.router_lookahead": ("RouterLookahead",),
    "serving.pipeline": ("stream",),
    "serving.schedule": ("stream_by_tokens",),
    "serving.token_batches": ("TokenBatch", "batches_by_tokens"),
}
_HOME_OF = {name: module for module, names in _HOME.items() for name in names}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        try:
            value: Any = version("sida_ext")
        except PackageNotFoundError:  # run from a source tree that was never installed
            value = "0+unknown"
    elif name in _HOME_OF:
        value = getattr(importlib.import_module(f"sida_ext.{_HOME_OF[name]}"), name)
    else:
        try:
            # A room of the package, as if it had been imported with it.
            value = importlib.import_module(f"sida_ext.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"sida_ext.{name}":
                raise
            raise AttributeError(f"module 'sida_ext' has no attribute {name!r}") from None
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})


def _is_the_command() -> bool:
    """Whether this process is ``sida`` itself, which answers ``--help`` and mistyped arguments without loading torch:
    its commands import what they need."""
    program = sys.orig_argv[1:3]
    return program == ["-m", "sida_ext.cli"] or Path(*program[:1]).name in ("sida", "sida.exe")


if not _is_the_command():
    from sida_ext import ops  # noqa: F401  (registers torch.ops.sida)
