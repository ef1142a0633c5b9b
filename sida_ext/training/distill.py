"""Trains a HashPredictor for a model: traces of its router, truncated distillation, calibration, report."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sida_ext.batching import cut_by_length, padded, windows
from sida_ext.prediction.decoder_predictor import RecurrentPredictor
from sida_ext.prediction.hash_predictor import HashPredictor
from sida_ext.prediction.moe_facts import StackFacts, predicted_stack, stack_facts
from sida_ext.prediction.token_table import TokenTablePredictor
from sida_ext.progress import progress_bar
from sida_ext.training.causal_fit import fit_stand_ins, freeze_copies
from sida_ext.training.causal_traces import CausalTrace, collect_causal_traces
from sida_ext.training.evaluation import cost_share, evaluate
from sida_ext.training.objective import TrainingOptions, predictor_loss, truncated_distillation
from sida_ext.training.report import write_report
from sida_ext.training.routing_curve import routing_curve
from sida_ext.training.split import HELD_OUT, TRAIN, VALIDATION, SplitPart
from sida_ext.training.step_fit import fit_steps, judge_steps, trace_steps
from sida_ext.training.traces import Trace, TraceStore, collect_traces
from sida_ext.training.trainer import Trainer

__all__ = [
    "TrainingOptions",
    "collect_traces",
    "predictor_loss",
    "tokenized_batches",
    "train_predictor",
    "truncated_distillation",
]

Texts = Iterable[str | Sequence[str]]


def train_predictor(
    model: nn.Module,
    tokenizer: Any,
    texts: Texts,
    out: str | os.PathLike[str],
    options: TrainingOptions | None = None,
    *,
    held_out_texts: Texts | None = None,
    resume: bool = True,
    progress: bool = True,
    keep_traces: bool = False,
) -> HashPredictor:
    """Train a predictor of an encoder's or a decoder-only model's routing and write it, with its report and a token
    table, to folder ``out``.

    Work in progress lives in OUT/training: traces and a checkpoint. After Ctrl-C or a crash the same call goes on where
    it stopped (Ctrl-C is re-raised once the checkpoint is on disk). A predictor that ``out`` already holds is replaced
    only when the new one is complete; until then OUT/training/early is the best so far, which can be served with.

    Args:
        model: holds a Switch encoder, or is a decoder-only model of the experts seam; plain or with swapped experts.
        tokenizer: called with a sentence, gives ``input_ids``; the model's own.
        texts: documents, each a string or a sequence of sentences.
        out: folder of the predictor.
        options: see TrainingOptions.
        held_out_texts: documents to report on; then none of ``texts`` is held out for that.
        resume: False deletes unfinished work in ``out`` first.
        progress: shows progress bars with the current loss.
        keep_traces: keeps OUT/training when done.

    Returns:
        The predictor in eval mode.

    Raises:
        ValueError: texts too few to split, tokens unknown to the model, unfinished work of another model or text.
    """
    started = time.perf_counter()
    stack = predicted_stack(model)
    options = training_options(options, "held_out_texts", held_out_texts, 8 if stack == "causal" else 64)
    facts = stack_facts(model, stack)
    work = training_folder(out, resume)
    store = _collect(model, facts, tokenizer, texts, held_out_texts, work / "traces", options, progress)
    predictor = HashPredictor.for_model(model, options.variant, options.seed, **options.net)
    if stack == "causal":
        trained = SplitPart(store, options, TRAIN)
        freeze_copies(predictor, trained)
        if not (work / "checkpoint.safetensors").is_file():
            fit_stand_ins(predictor, model, trained, progress=progress)
    table = TokenTablePredictor.for_model(model)

    def learn_steps(validation: SplitPart, held_out: SplitPart) -> dict[str, Any]:
        predictor.steps = fit_steps(table, trace_steps(model, validation))
        judged = judge_steps(predictor.steps, trace_steps(model, held_out))
        predictor.steps.held_out_top1 = judged["top1"]
        return {"steps": judged}

    return train_on_store(
        predictor,
        table,
        store,
        options,
        out,
        compared_with=table,
        further=learn_steps if stack == "causal" else None,
        details=lambda held_out: {
            **({"confident": routing_curve(predictor, model, held_out())} if stack == "encoder" else {}),
            "cost": cost_share(predictor, model),
        },
        started=started,
        progress=progress,
        keep_traces=keep_traces,
    )


def training_options(
    options: TrainingOptions | None, argument: str, held_out: Any, sentences: int = 64
) -> TrainingOptions:
    """The options of a run; where documents to report on are given (``argument``), no others are held out for that.

    Args:
        sentences: in a step, where the options leave it open.
    """
    options = options or TrainingOptions()
    options = replace(options, batch_sentences=options.batch_sentences or sentences)
    if held_out is not None:
        return replace(options, held_out=0.0)
    if options.held_out == 0:
        raise ValueError(f"held_out is 0 and there are no {argument}; a report needs text that was not trained on")
    return options


def training_folder(out: str | os.PathLike[str], resume: bool) -> Path:
    """OUT/training; emptied unless the work in it is to be gone on with."""
    work = Path(out) / "training"
    if not resume and work.exists():
        shutil.rmtree(work)
    return work


P = TypeVar("P", HashPredictor, RecurrentPredictor)


def train_on_store(
    predictor: P,
    table: TokenTablePredictor,
    store: TraceStore,
    options: TrainingOptions,
    out: str | os.PathLike[str],
    *,
    compared_with: Any,
    details: Callable[[SplitPart], dict[str, Any]],
    started: float,
    progress: bool,
    keep_traces: bool,
    further: Callable[[SplitPart, SplitPart], dict[str, Any]] | None = None,
) -> P:
    """Train ``predictor`` and its rival on the traces, judge both, and write them and the report to folder ``out``.

    Args:
        compared_with: ``table`` as a predictor of the same stack.
        details: the report's further entries, asked for when the predictor is trained; gets the held-out part.
        started: ``time.perf_counter()`` when the work began.
        further: what else is learned before the predictor is written, from the validation part, and reported on of the
            held-out part.
    """
    work = Path(out) / "training"
    trained, validation, held_out = (SplitPart(store, options, part) for part in (TRAIN, VALIDATION, HELD_OUT))
    if not any(True for _ in held_out()):  # before the hours that the report comes after
        raise ValueError(
            f"no document was set aside for the report (each is, with a chance of {options.held_out:.0%}); give more "
            "texts"
        )
    trainer = Trainer(predictor, trained, validation, options, work / "checkpoint", early=work / "early")
    history = trainer.run(progress)
    trainer.finish()
    for trace in trained():
        chosen, weights = trace.chosen, trace.weights
        one = table.choices == 1
        table.update(trace.input_ids, chosen[..., 0] if one else chosen, weights[..., 0] if one else weights)
    predictor.join_table(table, validation())
    judged = evaluate(predictor, held_out())
    predictor.held_out_top1 = judged.summary()["mean_top1"]
    learned = further(validation, held_out) if further is not None else {}
    report = {
        "model_fingerprint": predictor.model_fingerprint,
        "options": asdict(options),
        "network": {**predictor.description(), "parameters": predictor.parameter_count()},
        "tokens": {
            name: sum(t.input_ids.numel() for t in part())
            for name, part in (("train", trained), ("validation", validation), ("held_out", held_out))
        },
        "history": history,
        "training_seconds": trainer.seconds,
        "total_seconds": time.perf_counter() - started,
        "held_out": {
            "predictor": judged.summary(),
            "token_table": evaluate(compared_with, held_out()).summary(),
            **learned,
        },
    }
    # Before what may fail without harm to them: the details measure the model.
    table.save_pretrained(Path(out) / "token_table")
    predictor.save_pretrained(out)
    write_report(out, report | details(held_out))
    if not keep_traces:
        shutil.rmtree(work)
    return predictor


def tokenized_batches(
    tokenizer: Any, texts: Texts, max_length: int = 512, sentences: int = 32
) -> Iterator[dict[str, Tensor]]:
    """Batches for ``collect_traces``; an item of ``texts`` is a document: one string, or a sequence of its sentences.

    Sentences are sorted by length within windows of 64 batches, so little is padding. Empty sentences are skipped.
    """
    for window in windows(_sentences(tokenizer, texts, max_length), 64 * sentences):
        for part in cut_by_length(window, lambda row: len(row[0]), lambda batch, _: len(batch) == sentences):
            input_ids, mask = padded([ids for ids, _ in part])
            document = torch.tensor([number for _, number in part])
            yield {"input_ids": input_ids, "attention_mask": mask, "document": document}


def _sentences(tokenizer: Any, texts: Texts, max_length: int) -> Iterator[tuple[list[int], int]]:
    """Each sentence's token ids and the number of its document."""
    for number, text in enumerate(texts):
        for sentence in [text] if isinstance(text, str) else text:
            if not isinstance(sentence, str):
                raise TypeError(f"document {number} holds a {type(sentence).__name__}, expected text")
            if not sentence.strip():
                continue
            ids = tokenizer(sentence, truncation=True, max_length=max_length)["input_ids"]
            if ids:
                yield list(ids), number


def _collect(
    model: nn.Module,
    facts: StackFacts,
    tokenizer: Any,
    texts: Texts,
    held_out_texts: Texts | None,
    folder: Path,
    options: TrainingOptions,
    progress: bool,
) -> TraceStore:
    """Trace all texts into ``folder``, going on after the batches that are already there."""
    identity = {"model_fingerprint": facts.fingerprint, "max_length": options.max_length}
    causal = predicted_stack(model) == "causal"
    collect = collect_causal_traces if causal else collect_traces
    store = TraceStore(folder, identity, CausalTrace if causal else Trace)
    batches = tokenized_batches(tokenizer, texts, options.max_length)
    held_out = None
    if held_out_texts is not None:
        held_out = tokenized_batches(tokenizer, held_out_texts, options.max_length)
    return fill_store(store, batches, held_out, lambda given: collect(model, given), progress)


def fill_store(
    store: TraceStore,
    batches: Iterator[dict[str, Any]],
    held_out: Iterator[dict[str, Any]] | None,
    collect: Callable[[Iterator[dict[str, Any]]], Iterator[Trace]],
    progress: bool,
) -> TraceStore:
    """Trace all batches into ``store``, going on after those that are already there.

    Args:
        batches, held_out: with ``input_ids``, ``attention_mask`` and ``document``; ``held_out`` is only reported on.
        collect: makes traces of batches, one of each.
    """
    if held_out is not None:
        batches = itertools.chain(batches, ({**batch, "document": -1 - batch["document"]} for batch in held_out))
    store.skip(batches)
    if store.complete:
        return store
    with progress_bar("tracing the router, tokens", done=store.tokens, shown=progress) as bar:
        with contextlib.closing(store.extend(collect(batches))) as tokens:
            for count in tokens:
                bar.advance(count)
    if not store.tokens:
        raise ValueError("the texts hold no sentence; there is nothing to learn from")
    return store
