"""Texts through a decoder-only language model: how likely each is, and how each goes on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sida_ext.batching import windows
from sida_ext.experts.runtime import runtime_of
from sida_ext.prediction.protocol import Predictor
from sida_ext.serving.lookahead import DEFAULT_LOOKAHEAD
from sida_ext.serving.overlap import experts_wanted, grouped
from sida_ext.serving.pipeline import stream
from sida_ext.serving.schedule import GATHERED
from sida_ext.serving.token_batches import TokenBatch

__all__ = ["continuations", "is_language_model", "likelihoods", "perplexity"]

WINDOW = 256  # texts that order="overlap" looks at together


def is_language_model(model: PreTrainedModel) -> bool:
    """Whether the model is decoder-only and gives the next token's logits."""
    return not model.config.is_encoder_decoder and model.can_generate() and model.get_output_embeddings() is not None


def likelihoods(
    model: PreTrainedModel,
    texts: Sequence[Sequence[int]],
    predictor: Predictor | None = None,
    *,
    batch_size: int = 1,
    pad_token_id: int = 0,
    lookahead: int | str = DEFAULT_LOOKAHEAD,
    order: str = "given",
) -> Iterator[tuple[float, int]]:
    """How likely each text is to the model.

    Args:
        model: a language model whose experts are offloaded.
        texts: token ids of each text.
        predictor, lookahead, order: see :func:`sida_ext.stream`.
        batch_size: texts in a batch, padded on the right. With ``order="overlap"`` a batch may hold texts from anywhere
            in a window of 256: those that are predicted to want the same experts.

    Yields:
        For each text, in order, the sum of the natural logarithms of the probabilities of its tokens from the second
        on, and how many these are.
    """
    formed: list[TokenBatch] = []
    predictor = predictor if predictor is not None else runtime_of(model).predictor
    overlap = order == "overlap" and predictor is not None

    def batches() -> Iterator[dict[str, Any]]:
        numbered = enumerate(torch.tensor(list(ids)) for ids in texts)
        parts: Iterator[list[tuple[int, Tensor]]] = windows(numbered, batch_size)
        if overlap and batch_size > 1:  # texts that run alone are ordered by stream
            parts = _by_experts(numbered, experts_wanted(model, predictor), batch_size)
        for part in parts:
            formed.append(TokenBatch(part, pad_token_id))
            yield {**formed[-1], "use_cache": False}

    window = GATHERED if overlap else None
    finished: dict[int, tuple[float, int]] = {}
    turn = 0
    for number, output in enumerate(stream(model, batches(), predictor, lookahead, order, window=window)):
        batch = formed[number]
        for row, (position, length) in enumerate(zip(batch.positions, batch.lengths, strict=True)):
            value = _likelihood(output.logits[row, : length - 1], batch["input_ids"][row, 1:length])
            finished[position] = value, max(0, length - 1)
        while turn in finished:
            yield finished.pop(turn)
            turn += 1


def _by_experts(
    rows: Iterable[tuple[int, Tensor]], wanted: Callable[[Tensor], int], batch_size: int
) -> Iterator[list[tuple[int, Tensor]]]:
    """Batches of rows that want the same experts, a window's after another's; of each the earliest row's is first."""
    for gathered in windows(rows, WINDOW):
        bits = {position: wanted(ids) for position, ids in gathered}
        yield from sorted((sorted(part) for part in grouped(gathered, bits, rows_at_most=batch_size)), key=_first)


def _first(rows: list[tuple[int, Tensor]]) -> int:
    return rows[0][0]


def _likelihood(logits: Tensor, targets: Tensor) -> float:
    chosen = logits.float().log_softmax(-1).gather(1, targets.unsqueeze(1))
    return float(chosen.sum(dtype=torch.float64))


def perplexity(found: Sequence[tuple[float, int]]) -> float:
    """exp of the mean negative logarithm over all tokens of :func:`likelihoods`; NaN without any."""
    tokens = sum(count for _, count in found)
    return math.exp(-sum(value for value, _ in found) / tokens) if tokens else math.nan


def continuations(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    *,
    batch_size: int = 1,
    pad_token_id: int = 0,
) -> Iterator[list[int]]:
    """What the model writes after each prompt, greedily: the new tokens, up to and with an end of sequence.

    Args:
        prompts: token ids of each prompt, at least one.
        new_tokens: the most for each.
        batch_size: prompts in a batch, padded on the left.

    Raises:
        ValueError: a prompt without tokens.
    """
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {number} has 0 tokens, expected at least one")
    ends = model.generation_config.eos_token_id if model.generation_config is not None else None
    stops = set(ends if isinstance(ends, (list, tuple)) else [] if ends is None else [ends])
    for start in range(0, len(prompts), batch_size):
        part = [list(prompt) for prompt in prompts[start : start + batch_size]]
        width = max(map(len, part))
        ids = torch.tensor([[pad_token_id] * (width - len(prompt)) + prompt for prompt in part])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in part])
        with torch.no_grad():
            written = model.generate(  # type: ignore[operator]
                ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, pad_token_id=pad_token_id
            )
        for row in written[:, width:].tolist():
            end = next((place + 1 for place, token in enumerate(row) if token in stops), len(row))
            yield row[:end]
