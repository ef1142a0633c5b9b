"""The one interface of everything that predicts routing; ``stream`` and the command line know nothing else of it."""

from __future__ import annotations

import os
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from sida_ext.prediction.decoder_predictor import RecurrentPredictor, TokenTableDecoder
from sida_ext.prediction.files import PredictorError, read_config
from sida_ext.prediction.hash_predictor import HashPredictor
from sida_ext.prediction.hash_table import NO_EXPERT, HashTable
from sida_ext.prediction.token_table import TokenTablePredictor

__all__ = [
    "NO_EXPERT",
    "DecoderPredictor",
    "HashPredictor",
    "HashTable",
    "Predictor",
    "PredictorError",
    "RecurrentPredictor",
    "TokenTableDecoder",
    "TokenTablePredictor",
    "find_predictor",
    "load_predictor",
]


@runtime_checkable
class Predictor(Protocol):
    """Names the experts of one stack's MoE layers for a whole batch, ahead of the model.

    ``predict`` is called from another thread than the model's, under ``torch.no_grad()``, one call at a time.
    """

    def predict(self, input_ids: Tensor, attention_mask: Tensor | None = None, top_k: int = 1) -> HashTable:
        """Predict routing.

        Args:
            input_ids: [B, S] int32 or int64 token ids.
            attention_mask: [B, S], 1 for tokens and 0 for padding; None means that all are tokens.
            top_k: candidates for each token and layer, most likely first.

        Returns:
            HashTable of [B, S, layers, top_k]; padding has no expert (-1, gate 0).
        """
        ...


@runtime_checkable
class DecoderPredictor(Predictor, Protocol):
    """Predicts the decoder's routing inside ``generate``, step by step, with state that follows the cache.

    All three run in the model's thread, under ``torch.no_grad()``. A state is opaque to others; ``step`` and
    ``reorder`` give a new one and leave the old as it was. All that a table names is read ahead; a predictor with a
    number ``min_need`` leaves out what the step needs with less than that probability (``HashTable.need``).

    Of a decoder-only model there is no encoder: ``start`` is given a result of [B, 0, 0]. There a predictor may have
    two further things: ``observe(state, chosen)``, which gives the state after a step or prompt whose tokens went to
    the experts ``chosen`` [B, T, layers, choices] int16 (-1: none), and ``state_of_tokens = False``, which says that
    its state is made of that alone, so that no tokens have to be read again where it is built anew.
    """

    def start(self, encoder_output: Tensor, attention_mask: Tensor | None) -> Any:
        """State before the first token, from the encoder's result [B, S, d_model] and its mask [B, S]."""
        ...

    def step(self, state: Any, input_ids: Tensor) -> tuple[HashTable, Any]:
        """The experts of all decoder layers for this step's tokens [B, T], and the state after them.

        T is 1 but for a prompt of the decoder, a candidate continuation, or a model that runs without cache.
        """
        ...

    def reorder(self, state: Any, index: Tensor) -> Any:
        """The state whose row i is row index[i] of ``state``: beams that were chosen, copied or dropped."""
        ...


ENTRY_POINTS = "sida_ext.predictors"


def find_predictor(name: str | os.PathLike[str], model: Any) -> Predictor:
    """The predictor that a user names: the folder of a saved one, or an entry point of another package.

    Args:
        name: a folder with a predictor of ours; or the name of an entry point in the group "sida_ext.predictors", whose
            target is called with the model and returns a Predictor.
        model: the model that is served.

    Raises:
        PredictorError: neither a folder nor an entry point, or what the entry point made has no ``predict``.
    """
    if Path(name).is_dir():
        return load_predictor(name, model)
    known = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
    if str(name) not in known:
        raise PredictorError(
            f"{str(name)!r} is neither a folder with a predictor nor an entry point in {ENTRY_POINTS} "
            f"(installed: {', '.join(sorted(known)) or 'none'})"
        )
    made = known[str(name)].load()(model)
    if not callable(getattr(made, "predict", None)):
        raise PredictorError(
            f"the entry point {str(name)!r} made a {type(made).__name__}, expected an object with "
            "predict(input_ids, attention_mask=None, top_k=1)"
        )
    return made


def load_predictor(
    path: str | os.PathLike[str], model: Any
) -> HashPredictor | RecurrentPredictor | TokenTablePredictor | TokenTableDecoder:
    """Load whichever predictor of ours is saved in folder ``path``, for ``model``.

    Raises:
        PredictorError: nothing there, damaged, of another model, or of a kind that this release does not know.
    """
    kind = read_config(path).get("kind")
    if kind == HashPredictor.kind:
        return HashPredictor.from_pretrained(path, model)
    if kind == RecurrentPredictor.kind:
        return RecurrentPredictor.from_pretrained(path, model)
    if kind == TokenTablePredictor.kind:
        table = TokenTablePredictor.from_pretrained(path, model)
        return TokenTableDecoder(table) if table.stack == "decoder" else table
    raise PredictorError(
        f"{path} holds a predictor of kind {kind!r}, expected {HashPredictor.kind!r}, {RecurrentPredictor.kind!r} or "
        f"{TokenTablePredictor.kind!r}"
    )


def is_decoder_predictor(predictor: Any) -> bool:
    """Whether ``predictor`` has what ``generate`` asks of a DecoderPredictor."""
    return all(callable(getattr(predictor, name, None)) for name in ("start", "step", "reorder"))


def split_predictors(given: Any) -> tuple[Any, Any]:
    """The encoder's and the decoder's predictor (or None) of what a user gave: one of either kind, or both in a pair.

    Raises:
        TypeError: something that is neither, or two of the same kind.
    """
    predictors = given if isinstance(given, (tuple, list)) else [] if given is None else [given]
    found: dict[str, Any] = {"encoder": None, "decoder": None}
    for predictor in predictors:
        if is_decoder_predictor(predictor):
            stack = "decoder"
        elif callable(getattr(predictor, "predict", None)):
            stack = "encoder"
        else:
            raise TypeError(
                f"predictor is {type(predictor).__name__}, expected an object with a predict method (encoder), one "
                "with start, step and reorder (decoder), a RouterLookahead, or several of these"
            )
        if found[stack] is not None:
            raise TypeError(
                f"predictor holds two for the {stack}, {type(found[stack]).__name__} and {type(predictor).__name__}, "
                "expected at most one for each stack"
            )
        found[stack] = predictor
    return found["encoder"], found["decoder"]


def check_table(
    table: Any, predictor: Any, input_ids: Tensor, layers: int, num_experts: int, method: str = "predict"
) -> HashTable:
    """A predictor's answer must be a hash table of this batch; raises PredictorError that says what it is instead."""
    who = f"{type(predictor).__name__}.{method}"
    if not isinstance(table, HashTable):
        raise PredictorError(f"{who} returned {type(table).__name__}, expected a sida_ext.HashTable")
    try:
        table.check_for(input_ids, layers, num_experts)
    except ValueError as error:
        raise PredictorError(f"{who} returned a wrong table: {error}") from error
    return table
