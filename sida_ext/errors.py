"""Exceptions of the package."""

from __future__ import annotations


class StoreError(RuntimeError):
    """An expert store is not what it should be: damaged, of another checkpoint, or of a newer format."""


class PredictorError(ValueError):
    """A predictor file is missing, damaged or of another model, or a predictor gave an answer that is no hash table of
    its batch."""
