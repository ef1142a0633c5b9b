"""``sida run --ray``: texts through replicas of a model with Ray Data, grouped by the experts they are predicted to
want.

Rows are ordered so that those that want the same experts stand together, cut into blocks and handed to a pool of
actors, each with experts and a budget of its own; what they answer comes back in the caller's order.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

try:
    import ray
    import ray.data
except ImportError as error:
    raise ImportError(
        f"running on a cluster needs {error.name}, which is not installed: pip install 'sida_ext[ray]'"
    ) from error

from sida_ext.files import placed
from sida_ext.serving.cluster_batch_order import by_experts
from sida_ext.serving.model import predicted_experts

__all__ = ["BatchArguments", "BatchResult", "run_batch"]


@dataclass(frozen=True)
class BatchArguments:
    """What each actor does.

    Args:
        model: checkpoint folder or hub id; every machine must reach it under this name.
        options: of :func:`sida_ext.from_pretrained`.
        predictor: folder or entry point; None: rows are taken as they come.
        max_length: tokens of a text at the most.
        generate: of a language model: so many tokens after each text; 0: score the texts.
    """

    model: str
    options: dict[str, Any] = field(default_factory=dict)
    predictor: str | None = None
    max_length: int = 512
    generate: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", placed(self.model))
        if self.predictor is not None:
            object.__setattr__(self, "predictor", placed(self.predictor))
        if self.options.get("store") is not None:
            object.__setattr__(self, "options", {**self.options, "store": placed(str(self.options["store"]))})


@dataclass(frozen=True)
class BatchResult:
    """What a run answered: a JSON object for each text, in the caller's order; and what it took, over all actors."""

    rows: list[dict[str, Any]]
    tokens: int
    read_bytes: int
    hits: int
    wanted: int


class _Actor:
    """One replica: takes blocks of texts, answers a JSON object for each."""

    def __init__(self, arguments: BatchArguments) -> None:
        from sida_ext.experts.runtime import runtime_of
        from sida_ext.models.swap import from_pretrained
        from sida_ext.prediction.protocol import find_predictor
        from sida_ext.texts import tokenizer_of

        self.arguments, self.tokenizer = arguments, tokenizer_of(arguments.model)
        self.model = from_pretrained(arguments.model, **arguments.options)
        self.runtime = runtime_of(self.model)
        self.predictor = find_predictor(arguments.predictor, self.model) if arguments.predictor is not None else None

    def __call__(self, block: dict[str, Any]) -> dict[str, Any]:
        before = self.runtime.stats()
        ids = [list(map(int, row)) for row in block["ids"]]
        answers = [json.dumps(row) for row in self._answers(ids)]
        after = self.runtime.stats()
        # Of the block's work, in its first row.
        spent = {
            name: [getattr(after, of) - getattr(before, of), *[0] * (len(ids) - 1)]
            for name, of in (("read_bytes", "bytes_read"), ("hits", "hits"), ("wanted", "unique"))
        }
        return {"row": block["row"], "answer": answers, **spent}

    def _answers(self, ids: list[list[int]]) -> list[dict[str, Any]]:
        from sida_ext.serving.language import continuations, is_language_model, likelihoods
        from sida_ext.serving.pipeline import stream
        from sida_ext.serving.token_batches import TokenBatch, rows_of, summary

        if is_language_model(self.model):
            if self.arguments.generate:
                return [
                    {"generated": self.tokenizer.decode(written), "tokens": len(written)}
                    for written in continuations(self.model, ids, self.arguments.generate)
                ]
            return [
                {"log_likelihood": value, "tokens": count}
                for value, count in likelihoods(self.model, ids, self.predictor)
            ]
        pad = self.tokenizer.pad_token_id or 0
        batches = [TokenBatch([(number, torch.tensor(row))], pad) for number, row in enumerate(ids)]
        outputs = stream(self.model, batches, self.predictor)
        return [summary(rows_of(output, batch)[0]) for output, batch in zip(outputs, batches, strict=True)]


def run_batch(
    arguments: BatchArguments, lines: Sequence[str], *, replicas: int, cpus: float = 1.0, address: str | None = None
) -> BatchResult:
    """Answer every line.

    Args:
        replicas, cpus: how many actors, and the processors of each.
        address: of a Ray cluster; None: ``$RAY_ADDRESS``, else one of this machine alone.

    Raises:
        ValueError: the cluster is too small, which would wait for ever.
    """
    from sida_ext.texts import tokenizer_of

    tokenizer = tokenizer_of(arguments.model)
    ids = [tokenizer(line, truncation=True, max_length=arguments.max_length)["input_ids"] for line in lines]
    order = by_experts(_predicted(arguments, ids)) if arguments.predictor is not None else list(range(len(ids)))
    own = not ray.is_initialized()
    ray.init(address=address, ignore_reinit_error=True, log_to_driver=False, logging_level=logging.WARNING)
    try:
        room = ray.cluster_resources().get("CPU", 0.0)
        if replicas * cpus > room:
            raise ValueError(
                f"{replicas} replicas of {cpus:g} CPU need {replicas * cpus:g}; the Ray cluster has {room:g}"
            )
        ray.data.DataContext.get_current().enable_progress_bars = False
        # A few blocks for each actor, so that one that is slow or dies leaves little behind.
        blocks = max(1, min(len(ids), 4 * replicas))
        given = ray.data.from_items([{"row": at, "ids": ids[at]} for at in order], override_num_blocks=blocks)
        found = given.map_batches(
            _Actor,
            fn_constructor_args=(arguments,),
            batch_size=None,
            compute=ray.data.ActorPoolStrategy(size=replicas),
            num_cpus=cpus,
        ).take_all()
    finally:
        if own:
            ray.shutdown()
    found.sort(key=lambda each: each["row"])
    if [each["row"] for each in found] != list(range(len(ids))):
        raise RuntimeError(f"{len(found)} rows came back, expected {len(ids)}, each once")
    spent = {name: sum(int(each[name]) for each in found) for name in ("read_bytes", "hits", "wanted")}
    return BatchResult([json.loads(each["answer"]) for each in found], sum(map(len, ids)), **spent)


def _predicted(arguments: BatchArguments, ids: list[list[int]]) -> list[frozenset[tuple[int, int]]]:
    from sida_ext.serving.predicting import load_predictor

    assert arguments.predictor is not None
    predictor = load_predictor(arguments.model, arguments.predictor, arguments.options)
    return [predicted_experts(predictor, row) for row in ids]
