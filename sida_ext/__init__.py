"""Serve Mixture-of-Experts transformers whose experts do not fit where they are computed (SiDA-MoE).

Importing the package touches no device and starts no thread.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from sida_ext._load import check_build

check_build()

from sida_ext.errors import PredictorError, StoreError  # noqa: E402
from sida_ext.experts.options import Options  # noqa: E402
from sida_ext.experts.runtime import Runtime  # noqa: E402
from sida_ext.experts.stats import LayerStats, Stats  # noqa: E402
from sida_ext.experts.store import pack  # noqa: E402
from sida_ext.models.classification import SwitchTransformersForSequenceClassification  # noqa: E402
from sida_ext.models.swap import from_pretrained, swap_experts  # noqa: E402
from sida_ext.precision import get_precision, precisions, set_precision  # noqa: E402
from sida_ext.prediction.protocol import DecoderPredictor, HashPredictor, HashTable, Predictor, TokenTablePredictor  # noqa: E402
from sida_ext.serving.pipeline import stream  # noqa: E402
from sida_ext.serving.schedule import TokenBatch, batches_by_tokens, stream_by_tokens  # noqa: E402

try:
    __version__ = version("sida_ext")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"

__all__ = [
    "DecoderPredictor",
    "HashPredictor",
    "HashTable",
    "LayerStats",
    "Options",
    "Predictor",
    "PredictorError",
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
    "precisions",
    "set_precision",
    "stream",
    "stream_by_tokens",
    "swap_experts",
]
