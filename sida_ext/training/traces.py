"""Traces of the true router: what every token's router said in every MoE layer, streamed from a model into shards."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sida_ext.files import written_whole
from sida_ext.prediction.hash_table import HashTable
from sida_ext.prediction.moe_facts import check_tokens, stack_facts

SHARD_TOKENS = 100_000  # of one file of traces: some 70 MB for 6 layers
KEPT = 30  # router logits kept for each token and layer: the paper's T, and all that TKD reads


@dataclass(frozen=True)
class Trace:
    """The true router's view of some sentences, without padding: all tokens in a row, N in number.

    Attributes:
        input_ids: [N] int64.
        length: [rows] int64, tokens of each sentence; their sum is N.
        document: [rows] int64, the document that each sentence comes from.
        candidates: [N, layers, T] int16, experts from the router's first choice downwards.
        logits: [N, layers, T] float16, the router's logits of the candidates, less the first choice's (so <= 0).
        gate: [N, layers] float32, the router's probability of its first choice among *all* experts.
    """

    input_ids: Tensor
    length: Tensor
    document: Tensor
    candidates: Tensor
    logits: Tensor
    gate: Tensor

    @property
    def top1(self) -> Tensor:
        """[N, layers] int64: the router's first choice."""
        return self.candidates[..., 0].long()

    @property
    def chosen(self) -> Tensor:
        """[N, layers, choices] int64: what the router chose; an encoder's router chooses one."""
        return self.candidates[..., :1].long()

    @property
    def weights(self) -> Tensor:
        """[N, layers, choices] float32: the router's probability of each choice."""
        return self.gate.unsqueeze(-1)

    @property
    def rows(self) -> int:
        return self.length.numel()

    def select(self, rows: Tensor) -> Trace:
        """The sentences ``rows`` [n], in that order."""
        start = (self.length.cumsum(0) - self.length)[rows]
        length = self.length[rows]
        first = torch.repeat_interleave(start - (length.cumsum(0) - length), length)
        token = first + torch.arange(int(length.sum()))
        # A subclass with further fields selects them itself.
        return _plain(type(self))(
            self.input_ids[token],
            length,
            self.document[rows],
            self.candidates[token],
            self.logits[token],
            self.gate[token],
        )

    def padded(self) -> tuple[Tensor, Tensor]:
        """input_ids [rows, S] and bool mask [rows, S]; ``mask`` selects exactly the N tokens, in order."""
        longest = int(self.length.max()) if self.rows else 0
        mask = torch.arange(longest)[None] < self.length[:, None]
        input_ids = torch.zeros(mask.shape, dtype=torch.int64)
        input_ids[mask] = self.input_ids
        return input_ids, mask

    def logits_of(self, predictor: nn.Module) -> Tensor:
        """The predictor's logits for these tokens, [N, layers, experts]."""
        input_ids, mask = self.padded()
        return predictor(input_ids, mask.long())[mask]

    def table_of(self, predictor: Any, top_k: int) -> HashTable:
        """The predictor's table for these sentences, padded as ``padded`` has it."""
        input_ids, mask = self.padded()
        return predictor.predict(input_ids, mask.long(), top_k=top_k)

    def tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name).contiguous() for name in self.__dataclass_fields__}


def _plain(kind: type[Trace]) -> type[Trace]:
    """``kind`` itself if it has Trace's fields and no more."""
    return kind if set(kind.__dataclass_fields__) == set(Trace.__dataclass_fields__) else Trace


@torch.no_grad()
def collect_traces(model: nn.Module, batches: Iterable[Mapping[str, Any]], keep: int = KEPT) -> Iterator[Trace]:
    """Run the stack over batches and yield one Trace for each; nothing else is held.

    Works on a plain transformers model and on one with swapped experts: both record ``router_logits``. The model
    runs in eval mode (no jitter, no dropout) and its mode is restored.

    Args:
        model: holds a Switch encoder.
        batches: dicts with ``input_ids`` [B, S] and optionally ``attention_mask`` [B, S] and ``document`` [B].
        keep: candidates kept for each token and layer; at most the number of experts are.

    Raises:
        ValueError: an unknown token, a mask of another shape, or router logits that are NaN or infinite.
    """
    if keep < 1:
        raise ValueError(f"keep is {keep}, expected at least 1 candidate")
    facts = stack_facts(model)
    keep = min(keep, facts.experts)
    device = facts.embedding.device
    number = 0
    for batch in batches:
        input_ids, mask = batch["input_ids"], batch.get("attention_mask")
        real = check_tokens(input_ids, mask, facts.embedding.shape[0]).cpu()
        document = batch.get("document")
        if document is None:
            document = torch.arange(number, number + input_ids.shape[0])
        number += input_ids.shape[0]
        if input_ids.numel() == 0:
            continue
        was_training = facts.stack.training
        facts.stack.eval()
        # The router is asked, also of a model that is served with a table in its place and has none yet.
        tabled: list[Any] = [m for m in facts.stack.modules() if getattr(m, "routing", "router") != "router"]
        routings = [layer.routing for layer in tabled]
        for layer in tabled:
            layer.routing = "router"
        try:
            output = facts.stack(
                input_ids=input_ids.to(device), attention_mask=real.long().to(device), output_router_logits=True
            )
        finally:
            facts.stack.train(was_training)
            for layer, routing in zip(tabled, routings, strict=True):
                layer.routing = routing
        yield Trace(
            input_ids.cpu()[real].long(),
            real.sum(dim=1),
            torch.as_tensor(document, dtype=torch.int64),
            *kept_choices(output.router_logits, real, facts.layers, keep, "encoder"),
        )


def kept_choices(
    recorded: tuple[Tensor, ...] | None, real: Tensor, layers: int, keep: int, stack: str
) -> tuple[Tensor, Tensor, Tensor]:
    """candidates, logits and gate of a Trace.

    Args:
        recorded: each MoE layer's router logits [B, S, experts], as transformers records them.
        real: [B, S] bool, the tokens that are kept.
        layers: MoE layers of the stack, named ``stack``.
        keep: candidates kept for each token and layer.

    Raises:
        ValueError: another number of layers, or NaN or infinite logits.
    """
    if recorded is None or len(recorded) != layers:
        found = 0 if recorded is None else len(recorded)
        raise ValueError(f"the {stack} recorded router logits of {found} layers; it has {layers} MoE layers")
    logits = torch.stack([layer.float() for layer in recorded], dim=2).cpu()[real]
    if not bool(torch.isfinite(logits).all()):
        raise ValueError("the model's router logits hold NaN or inf; its weights or its dtype cannot be traced")
    best, index = logits.topk(keep, dim=-1)
    return (
        index.to(torch.int16),
        (best - best[..., :1]).half(),
        (best[..., 0] - logits.logsumexp(dim=-1)).exp(),
    )


class TraceStore:
    """A folder of trace shards. Each shard is complete or absent, so collecting resumes where it was interrupted.

    Memory while writing is one shard; while reading, one shard.

    Args:
        folder: made if missing.
        identity: what the traces depend on (model, texts, options); a folder of another identity is refused.
        kind: the class of the traces.

    Raises:
        ValueError: the folder holds traces of another model or other texts.
    """

    _INDEX = "traces.json"

    def __init__(self, folder: str | os.PathLike[str], identity: Mapping[str, Any], kind: type[Trace] = Trace) -> None:
        self.folder, self.kind = Path(folder), kind
        self.folder.mkdir(parents=True, exist_ok=True)
        index = self.folder / self._INDEX
        if index.is_file():
            self._state = json.loads(index.read_text())
            if self._state.get("identity") != dict(identity):
                raise ValueError(
                    f"{self.folder} holds traces of {self._state.get('identity')}, expected {dict(identity)}; "
                    "delete the folder or name another"
                )
        else:
            self._state = {"identity": dict(identity), "shards": [], "batches": 0, "digest": "", "complete": False}
            self._write_index()
        self._digest = hashlib.sha256()

    @property
    def batches_done(self) -> int:
        """Batches whose traces are already on disk; the caller skips them."""
        return int(self._state["batches"])

    @property
    def complete(self) -> bool:
        return bool(self._state["complete"])

    @property
    def tokens(self) -> int:
        return sum(shard["tokens"] for shard in self._state["shards"])

    def skip(self, batches: Iterator[Mapping[str, Tensor]]) -> None:
        """Take the batches whose traces are on disk from ``batches``, and check that they are the same.

        Raises:
            ValueError: they are not, or there are fewer, or the store is complete and there are more.
        """
        advice = "give the texts that it was begun with, or start again without resuming"
        for number in range(self.batches_done):
            batch = next(batches, None)
            if batch is None:
                raise ValueError(
                    f"{self.folder} holds {self.batches_done} traced batches, the texts {number}; {advice}"
                )
            real = batch["attention_mask"].bool()
            self._note(batch["input_ids"][real], real.sum(dim=1), batch["document"])
        if self.batches_done and self._digest.hexdigest() != self._state["digest"]:
            raise ValueError(f"{self.folder} holds traces of other texts; {advice}")
        if self.complete and next(batches, None) is not None:
            raise ValueError(f"{self.folder} holds traces of fewer texts than given; {advice}")

    def extend(self, traces: Iterable[Trace], shard_tokens: int | None = None) -> Generator[int, None, None]:
        """Write traces into shards of about ``shard_tokens`` tokens; yield the tokens of each trace."""
        shard_tokens = shard_tokens or SHARD_TOKENS
        pending: list[Trace] = []
        waiting = 0
        try:
            for trace in traces:
                pending.append(trace)
                tokens = trace.input_ids.numel()
                waiting += tokens
                if waiting >= shard_tokens:
                    full, pending, waiting = pending, [], 0
                    self._write_shard(full)
                    del full  # or it would live beside the next shard
                yield tokens
        finally:
            # Also when interrupted: what was traced is not traced again.
            if pending:
                self._write_shard(pending)
        self._state["complete"] = True
        self._write_index()

    def shard(self, number: int) -> Trace:
        return self.kind(**load_file(self.folder / self._state["shards"][number]["file"]))

    def __len__(self) -> int:
        return len(self._state["shards"])

    def _write_shard(self, traces: list[Trace]) -> None:
        name = f"{len(self._state['shards']):05d}.safetensors"
        joined = join_traces(traces)
        for trace in traces:
            self._note(trace.input_ids, trace.length, trace.document)
        with written_whole(self.folder / name, sync=True) as partial:
            save_file(joined.tensors(), partial)
        self._state["shards"].append({"file": name, "tokens": joined.input_ids.numel()})
        self._state["batches"] += len(traces)
        self._state["digest"] = self._digest.hexdigest()
        self._write_index()

    def _note(self, *tensors: Tensor) -> None:
        for tensor in tensors:
            self._digest.update(tensor.long().numpy().tobytes())

    def _write_index(self) -> None:
        with written_whole(self.folder / self._INDEX, sync=True) as partial:
            partial.write_text(json.dumps(self._state))


def join_traces(traces: list[Trace]) -> Trace:
    """One trace with the sentences of all."""
    if not traces:
        raise ValueError("there are no traces to join; the texts hold no sentence")
    kind = type(traces[0])
    return kind(**{name: torch.cat([getattr(t, name) for t in traces]) for name in kind.__dataclass_fields__})
