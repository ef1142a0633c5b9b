"""A predictor without its model, for processes that route and compute nothing."""

from __future__ import annotations

from typing import Any

__all__ = ["load_predictor"]


def load_predictor(model: str, predictor: str, options: dict[str, Any]) -> Any:
    """The predictor of prompts alone: the experts' memory is given back at once, the model's other weights are dropped.

    Args:
        model: checkpoint folder or hub id.
        predictor: folder made by ``sida train``, or an entry point.
        options: of :func:`sida_ext.from_pretrained`.

    Raises:
        ValueError: a predictor of a decoder's steps, which knows nothing of a prompt.
    """
    from sida_ext.experts.runtime import runtime_of
    from sida_ext.models.swap import from_pretrained
    from sida_ext.prediction.protocol import find_predictor, split_predictors

    loaded = from_pretrained(model, **options)
    runtime_of(loaded).close()
    found = split_predictors(find_predictor(predictor, loaded))[0]
    if found is None:
        raise ValueError(f"{predictor} predicts a decoder's steps; to route by experts, one of prompts is needed")
    return found
