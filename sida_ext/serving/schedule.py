"""Schedule: batches of whole sequences by a number of tokens, and what another order of batches saves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sida_ext._load import _C
from sida_ext.experts.runtime import Runtime, runtime_of
from sida_ext.models.layers import swapped_layers
from sida_ext.prediction.protocol import Predictor
from sida_ext.serving.lookahead import DEFAULT_LOOKAHEAD
from sida_ext.serving.pipeline import stream

__all__ = ["OrderSavings", "TokenBatch", "batches_by_tokens", "rows_of", "stream_by_tokens", "watch_order"]

# Dimensions of a model's outputs that run over tokens; the first is always the batch.
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
        longest = max(self.lengths)
        ids = torch.full((len(rows), longest), pad_token_id, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, (_, sequence) in enumerate(rows):
            ids[row, : len(sequence)] = sequence
            mask[row, : len(sequence)] = 1
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

    Yields:
        :class:`TokenBatch`, a dict that the model takes, with the ``positions`` of its rows among ``inputs``.

    Raises:
        ValueError: names the argument, or the input by its position, and what was expected.
    """
    for name, value in (("max_tokens", max_tokens), ("window", window)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}, expected a whole number of at least 1")
    return _batches_by_tokens(inputs, max_tokens, window, tokenizer, pad_token_id)


def _batches_by_tokens(
    inputs: Iterable[Any], max_tokens: int, window: int, tokenizer: Any, pad_token_id: int
) -> Iterator[TokenBatch]:
    gathered: list[tuple[int, Tensor]] = []
    for position, item in enumerate(inputs):
        gathered.append((position, _token_ids(item, position, tokenizer)))
        if len(gathered) == window:
            yield from _cut(gathered, max_tokens, pad_token_id)
            gathered = []
    if gathered:
        yield from _cut(gathered, max_tokens, pad_token_id)


def _cut(gathered: list[tuple[int, Tensor]], max_tokens: int, pad_token_id: int) -> list[TokenBatch]:
    rows: list[list[tuple[int, Tensor]]] = []
    # Longest first, so that the first row of a batch says how many fit.
    for position, ids in sorted(gathered, key=lambda entry: (-len(entry[1]), entry[0])):
        if rows and (len(rows[-1]) + 1) * len(rows[-1][0][1]) <= max_tokens:
            rows[-1].append((position, ids))
        else:
            rows.append([(position, ids)])
    return sorted((TokenBatch(sorted(batch), pad_token_id) for batch in rows), key=lambda batch: batch.positions[0])


def rows_of(output: Any, batch: TokenBatch) -> list[Any]:
    """A model's output for a batch, cut into one output for each row: batch size 1, without the padding.

    Args:
        output: of an encoder or a classifier, with any of the fields in ``TOKEN_DIMS``.

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

    rows = []
    for row in range(len(batch.positions)):
        fields = {
            name: cut(value, row, TOKEN_DIMS[name])
            if isinstance(value, Tensor)
            else tuple(cut(part, row, TOKEN_DIMS[name]) for part in value)
            for name, value in output.items()
        }
        rows.append(type(output)(**fields))
    return rows


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

    What holds: an output is bit-equal to its row in a plain call of the model with the same batch, whatever the budget,
    the predictor and the order; where every batch is one sequence (``max_tokens=1``), to a call with that sequence
    alone. Rows are padded on the right, and a Switch router counts an expert's capacity along each row, so neither
    neighbours nor padding change which tokens an expert takes. Between batch shapes the dense layers of PyTorch round
    differently in the last bits, so that a decision of the router between nearly equal experts may then fall otherwise.

    Args:
        model: an encoder or a classifier with swapped experts.
        inputs, max_tokens, window, tokenizer: see :func:`batches_by_tokens`.
        pad_token_id: None: the one of the model's configuration.
        predictor, lookahead, order, timeout: see :func:`~sida_ext.stream`.

    Yields:
        One output for each input, batch size 1, without padding, in the caller's order.
    """
    runtime_of(model)
    if pad_token_id is None:
        pad_token_id = getattr(model.config, "pad_token_id", None) or 0
    batches = batches_by_tokens(inputs, max_tokens, window, tokenizer=tokenizer, pad_token_id=pad_token_id)
    formed: list[TokenBatch] = []  # those that are under way, in the order in which stream takes and answers them

    def kept() -> Iterator[dict[str, Any]]:
        for batch in batches:
            formed.append(batch)
            yield batch

    return _in_order(stream(model, kept(), predictor, lookahead, order, timeout=timeout), formed)


def _in_order(outputs: Iterator[Any], formed: list[TokenBatch]) -> Iterator[Any]:
    finished: dict[int, Any] = {}
    turn = 0
    for output in outputs:
        batch = formed.pop(0)
        finished.update(zip(batch.positions, rows_of(output, batch), strict=True))
        while turn in finished:
            yield finished.pop(turn)
            turn += 1


@dataclass(frozen=True)
class OrderSavings:
    """Bytes that the engine's state machine reads for a run's experts in either order; copies take no time and every
    table is right, so that only the order differs."""

    given_bytes: int
    run_bytes: int

    @property
    def saved_bytes(self) -> int:
        return self.given_bytes - self.run_bytes


@dataclass
class _Watch:
    """What a run does: which batches were given in which order, and which experts each used, in the order of the run.
    It keeps the token ids of every batch, by whose identity a batch is known again."""

    runtime: Runtime
    given: list[Tensor] = field(default_factory=list)
    run: list[Tensor] = field(default_factory=list)
    used: list[list[tuple[int, list[int]]]] = field(default_factory=list)

    def batches(self, given: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The same batches, remembered."""
        for batch in given:
            self.given.append(batch["input_ids"])
            yield batch

    def savings(self, lookahead: int) -> OrderSavings:
        """What the order of the run saved over the given one, with the budget that is in force now."""
        header = self.runtime.header
        place = {id(ids): number for number, ids in enumerate(self.run)}
        in_given_order = [self.used[place[id(ids)]] for ids in self.given]

        def read(batches: list[list[tuple[int, list[int]]]]) -> int:
            _, loads, _ = _C.run_policy(
                len(header.layers),
                header.num_experts,
                batches,
                self.runtime.eviction,
                self.runtime.slots,
                lookahead,
                [],
            )
            return loads * header.record_bytes

        return OrderSavings(read(in_given_order), read(self.used))


@contextmanager
def watch_order(model: PreTrainedModel) -> Iterator[_Watch]:
    """Watch the batches that run through ``model`` inside the block, to say what their order saved."""
    runtime = runtime_of(model)
    watch = _Watch(runtime)

    def begin(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        watch.run.append(kwargs["input_ids"])
        watch.used.append([])

    def layer_used(name: str, expert_index: Tensor) -> None:
        distinct = expert_index.unique()
        watch.used[-1].append((runtime.header.layers.index(name), distinct[distinct >= 0].tolist()))

    layers = swapped_layers(model)
    hook = model.register_forward_pre_hook(begin, with_kwargs=True)
    for layer in layers:
        layer.observer = layer_used
    try:
        yield watch
    finally:
        hook.remove()
        for layer in layers:
            layer.observer = None
