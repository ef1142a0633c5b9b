"""Batches of whole sequences by a number of tokens, and a batch's output cut into rows again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sida_ext.batching import cut_by_length, padded, windows
from sida_ext.serving.overlap import grouped

__all__ = ["TokenBatch", "batches_by_tokens", "rows_of", "summary"]

# Dimensions of a model's outputs that run over tokens; the first is always the batch. A classifier's logits have none,
# a language model's have the second: it is told by their number.
TOKEN_DIMS = {
    "last_hidden_state": (1,),
    "hidden_states": (1,),
    "router_logits": (1,),
    "attentions": (2, 3),
    "logits": (),
}


class TokenBatch(dict[str, Tensor]):
    """One batch of padded sequences: the model's arguments, and where its rows stand among the caller's inputs.

    Keys: ``input_ids`` [B, S] int64, padded on the right, and ``attention_mask`` [B, S] int64 (1: token).
    """

    def __init__(self, rows: Sequence[tuple[int, Tensor]], pad_token_id: int) -> None:
        self.positions = tuple(position for position, _ in rows)
        self.lengths = tuple(len(ids) for _, ids in rows)
        ids, mask = padded([ids for _, ids in rows], pad_token_id)
        super().__init__(input_ids=ids, attention_mask=mask)


def _token_ids(item: Any, position: int, tokenizer: Any) -> Tensor:
    """The token ids [S] of one of the caller's inputs, without padding."""
    mask = None
    if isinstance(item, str):
        if tokenizer is None:
            raise ValueError(f"input {position} is a text, and there is no tokenizer=; pass one, or token ids")
        item = tokenizer(item)["input_ids"]
    elif hasattr(item, "keys"):
        unknown = sorted(set(item.keys()) - {"input_ids", "attention_mask", "token_type_ids"})
        if unknown or "input_ids" not in item:
            raise ValueError(
                f"input {position} has the keys {', '.join(item.keys())}, expected input_ids and attention_mask; "
                "other arguments need batches of your own, see stream"
            )
        item, mask = item["input_ids"], item.get("attention_mask")
    ids = torch.as_tensor(item)
    if ids.dim() == 2 and ids.shape[0] == 1:
        ids = ids[0]
    if not ids.numel():
        raise ValueError(f"input {position} has no tokens")
    if ids.dim() != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"input {position} is a {ids.dtype} tensor of shape {tuple(ids.shape)}, expected integers [S]")
    if mask is not None:
        kept = torch.as_tensor(mask).reshape(-1)
        if kept.shape != ids.shape:
            raise ValueError(
                f"input {position} has an attention_mask of {kept.numel()} entries for {ids.numel()} tokens"
            )
        ids = ids[kept.bool()]
        if not ids.numel():
            raise ValueError(f"input {position} has no tokens that its attention_mask keeps")
    return ids.long()


def batches_by_tokens(
    inputs: Iterable[Any],
    max_tokens: int,
    window: int = 256,
    *,
    tokenizer: Any = None,
    pad_token_id: int = 0,
    wanted: Callable[[Tensor], int] | None = None,
) -> Iterator[TokenBatch]:
    """Put sequences of any length into batches of similar length and at most ``max_tokens`` tokens, padding included.

    Inside a window of ``window`` sequences they are sorted by length and cut into batches; the batch that holds the
    earliest sequence comes first. No sequence is cut: one that is longer than ``max_tokens`` is a batch of its own.

    Args:
        inputs: token ids [S] (tensors or lists), dicts with ``input_ids`` [S] or [1, S] and maybe an
            ``attention_mask`` (what it masks is left out), or texts. Taken lazily, a window at a time.
        max_tokens: rows times the longest row of a batch, at the most.
        window: sequences that are looked at together; also the bound on how far results wait for each other.
        tokenizer: for texts: called with one text, gives ``input_ids``.
        pad_token_id: what fills the rows on the right.
        wanted: gives the experts that a sequence's token ids [S] want, as bits
            (``sida_ext.serving.overlap.experts_wanted`` makes it of a model and a predictor). Sequences of a window
            that want the same experts then come into one batch, where their lengths are alike within a factor of 2.

    Yields:
        :class:`TokenBatch`, a dict that the model takes, with the ``positions`` of its rows among ``inputs``.

    Raises:
        ValueError: names the argument, or the input by its position, and what was expected.
    """
    for name, value in (("max_tokens", max_tokens), ("window", window)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}, expected a whole number of at least 1")
    if wanted is not None and not callable(wanted):
        raise TypeError(f"wanted is {type(wanted).__name__}, expected a function of token ids, or None")
    return _batches_by_tokens(inputs, max_tokens, window, tokenizer, pad_token_id, wanted)


def _batches_by_tokens(
    inputs: Iterable[Any],
    max_tokens: int,
    window: int,
    tokenizer: Any,
    pad_token_id: int,
    wanted: Callable[[Tensor], int] | None,
) -> Iterator[TokenBatch]:
    rows = ((position, _token_ids(item, position, tokenizer)) for position, item in enumerate(inputs))

    def full(batch: list[tuple[int, Tensor]], row: tuple[int, Tensor]) -> bool:
        # Longest first, so that the first row of a batch says how many fit.
        return (len(batch) + 1) * len(batch[0][1]) > max_tokens

    for gathered in windows(rows, window):
        if wanted is None:
            parts = cut_by_length(gathered, lambda row: (-len(row[1]), row[0]), full)
        else:
            parts = grouped(gathered, {position: wanted(ids) for position, ids in gathered}, max_tokens)
        yield from sorted(
            (TokenBatch(sorted(part), pad_token_id) for part in parts), key=lambda batch: batch.positions[0]
        )


def rows_of(output: Any, batch: TokenBatch) -> list[Any]:
    """A model's output for a batch, cut into one output for each row: batch size 1, without the padding.

    Args:
        output: of an encoder, a classifier or a decoder-only model without a cache, with any of the fields in
            ``TOKEN_DIMS``.

    Raises:
        ValueError: the output has a field that cannot be cut into rows, such as a loss.
    """
    for name in output:
        if name not in TOKEN_DIMS:
            raise ValueError(
                f"the output's field {name!r} cannot be cut into rows, only {', '.join(TOKEN_DIMS)}; "
                "run batches of your own through stream"
            )

    def cut(tensor: Tensor, row: int, dims: tuple[int, ...]) -> Tensor:
        part = tensor[row : row + 1]
        for dim in dims:
            part = part.narrow(dim, 0, batch.lengths[row])
        return part

    def dims(name: str, value: Any) -> tuple[int, ...]:
        return (1,) if name == "logits" and value.dim() == 3 else TOKEN_DIMS[name]

    rows = []
    for row in range(len(batch.positions)):
        fields = {
            name: cut(value, row, dims(name, value))
            if isinstance(value, Tensor)
            else tuple(cut(part, row, TOKEN_DIMS[name]) for part in value)
            for name, value in output.items()
        }
        rows.append(type(output)(**fields))
    return rows


def summary(output: Any) -> dict[str, Any]:
    """What a run keeps of one text's output."""
    if "logits" in output:
        logits = output.logits[0].float()
        return {"label": int(logits.argmax()), "logits": logits.tolist()}
    states = output.last_hidden_state.float()
    return {"mean": states.mean().item(), "norm": states.norm().item()}
