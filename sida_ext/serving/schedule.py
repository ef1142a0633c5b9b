"""``stream_by_tokens``: a stream over sequences of any length, results one by one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from transformers import PreTrainedModel

from sida_ext.experts.runtime import runtime_of
from sida_ext.prediction.moe_facts import predicted_stack
from sida_ext.prediction.protocol import Predictor
from sida_ext.serving.lookahead import DEFAULT_LOOKAHEAD
from sida_ext.serving.overlap import experts_wanted
from sida_ext.serving.pipeline import stream
from sida_ext.serving.token_batches import TokenBatch, batches_by_tokens, rows_of

__all__ = ["TokenBatch", "batches_by_tokens", "rows_of", "stream_by_tokens"]

GATHERED = 8  # batches that order="overlap" chooses the next one of


def stream_by_tokens(
    model: PreTrainedModel,
    inputs: Iterable[Any],
    predictor: Predictor | None = None,
    lookahead: int | str = DEFAULT_LOOKAHEAD,
    order: str = "given",
    *,
    max_tokens: int,
    window: int = 256,
    tokenizer: Any = None,
    pad_token_id: int | None = None,
    timeout: float | None = None,
) -> Iterator[Any]:
    """:func:`~sida_ext.stream` over sequences of any length: batches are formed by tokens, results come one by one.

    With ``order="overlap"`` sequences that are predicted to want the same experts come into one batch, and batches that
    share experts run one after the other, eight of them being gathered to choose from; each sequence is then
    predicted once more, alone.

    What holds: an output is bit-equal to its row in a plain call of the model with the same batch, whatever the budget,
    the predictor and the order; where every batch is one sequence (``max_tokens=1``), to a call with that sequence
    alone. Rows are padded on the right, and a Switch router counts an expert's capacity along each row, so neither
    neighbours nor padding change which tokens an expert takes. Between batch shapes the dense layers of PyTorch round
    differently in the last bits, so that a decision of the router between nearly equal experts may then fall otherwise.

    Args:
        model: an encoder, a classifier or a decoder-only model with swapped experts; the last keeps no cache here.
        inputs, max_tokens, window, tokenizer: see :func:`batches_by_tokens`.
        pad_token_id: None: the one of the model's configuration.
        predictor, lookahead, order, timeout: see :func:`~sida_ext.stream`.

    Yields:
        One output for each input, batch size 1, without padding, in the caller's order.
    """
    runtime = runtime_of(model)
    if pad_token_id is None:
        pad_token_id = getattr(model.config, "pad_token_id", None) or 0
    predictor = predictor if predictor is not None else runtime.predictor
    batches = batches_by_tokens(
        inputs,
        max_tokens,
        window,
        tokenizer=tokenizer,
        pad_token_id=pad_token_id,
        wanted=experts_wanted(model, predictor) if order == "overlap" and predictor is not None else None,
    )
    formed: list[TokenBatch] = []  # those that are under way, in the order in which stream takes and answers them
    further: dict[str, Any] = {"use_cache": False} if predicted_stack(model) == "causal" else {}

    def kept() -> Iterator[dict[str, Any]]:
        for batch in batches:
            formed.append(batch)
            yield {**batch, **further}

    gathered = GATHERED if order == "overlap" else None
    outputs = stream(model, kept(), predictor, lookahead, order, timeout=timeout, window=gathered)
    return _in_order(outputs, formed)


def _in_order(outputs: Iterator[Any], formed: list[TokenBatch]) -> Iterator[Any]:
    finished: dict[int, Any] = {}
    turn = 0
    for output in outputs:
        batch = formed.pop(0)
        finished.update(zip(batch.positions, rows_of(output, batch), strict=True))
        while turn in finished:
            yield finished.pop(turn)
            turn += 1
