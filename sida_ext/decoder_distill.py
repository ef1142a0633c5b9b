"""Trains a RecurrentPredictor for a decoder: traces under teacher forcing, distillation, calibration, report."""

from __future__ import annotations

import os
import shutil
import statistics
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .decoder_predictor import RecurrentPredictor, TokenTableDecoder
from .decoder_traces import DecoderTrace, Pairs, collect_decoder_traces, paired_batches, read_by_decoder
from .distill import SplitPart, fill_store
from .evaluation import evaluate
from .moe_facts import stack_facts
from .objective import HELD_OUT, TRAIN, VALIDATION, TrainingOptions
from .report import write_report
from .token_table import TokenTablePredictor
from .traces import TraceStore
from .trainer import Trainer

__all__ = ["decoder_cost", "train_decoder_predictor"]


def train_decoder_predictor(
    model: nn.Module,
    tokenizer: Any,
    pairs: Pairs,
    out: str | os.PathLike[str],
    options: TrainingOptions | None = None,
    *,
    held_out_pairs: Pairs | None = None,
    resume: bool = True,
    progress: bool = True,
    keep_traces: bool = False,
) -> RecurrentPredictor:
    """Trains a predictor of the decoder's routing and writes it, with its report and a token table, to folder `out`.

    Interrupting and going on work as in `distill.train_predictor`; targets that the model generates are generated again
    when tracing goes on, to see that they are the same.

    Args:
        model: a Switch encoder-decoder, plain or with swapped experts.
        tokenizer: called with a text, gives `input_ids`; the model's own.
        pairs: documents: a source and its target, or a source alone, for which the model generates (greedily, at most
            `max_length` tokens) what it is then traced on. See `decoder_traces.paired_batches`.
        out: folder of the predictor.
        options: see TrainingOptions; `variant` is not read, `net` holds sizes of the DecoderNet.
        held_out_pairs: documents to report on; then none of `pairs` is held out for that.
        resume: False deletes unfinished work in `out` first.
        progress: shows progress bars.
        keep_traces: keeps OUT/training when done.

    Returns:
        The predictor in eval mode.

    Raises:
        ValueError: documents too few to split, tokens unknown to the model, unfinished work of another model or text.
    """
    options = options or TrainingOptions()
    if held_out_pairs is not None:
        options = replace(options, held_out=0.0)
    elif options.held_out == 0:
        raise ValueError("held_out is 0 and there are no held_out_pairs; a report needs text that was not trained on")
    facts = stack_facts(model, "decoder")
    started = time.perf_counter()
    work = Path(out) / "training"
    if not resume and work.exists():
        shutil.rmtree(work)
    identity = {"model_fingerprint": facts.fingerprint, "max_length": options.max_length, "stack": "decoder"}
    store = TraceStore(work / "traces", identity, DecoderTrace)
    given, held = (
        None
        if some is None
        else read_by_decoder(model, paired_batches(tokenizer, some, options.max_length), options.max_length)
        for some in (pairs, held_out_pairs)
    )
    assert given is not None  # for the type checker: pairs are given
    fill_store(store, given, held, lambda batches: collect_decoder_traces(model, batches), progress)
    trained, validation, held_out = (SplitPart(store, options, part) for part in (TRAIN, VALIDATION, HELD_OUT))
    predictor = RecurrentPredictor.for_model(model, seed=options.seed, **options.net)
    trainer = Trainer(predictor, trained, validation, options, work / "checkpoint")
    history = trainer.run(progress)
    trainer.finish()
    table = TokenTablePredictor.for_model(model, "decoder")
    for trace in trained():
        table.update(trace.input_ids, trace.top1, trace.gate)
    judged = evaluate(predictor, held_out())
    predictor.held_out_top1 = judged.summary()["mean_top1"]
    report = {
        "model_fingerprint": facts.fingerprint,
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
            "token_table": evaluate(TokenTableDecoder(table), held_out()).summary(),
        },
        "cost": decoder_cost(predictor, model),
    }
    table.save_pretrained(Path(out) / "token_table")
    predictor.save_pretrained(out)
    write_report(out, report)
    if not keep_traces:
        shutil.rmtree(work)
    return predictor


@torch.no_grad()
def decoder_cost(
    predictor: RecurrentPredictor,
    model: nn.Module,
    rows: tuple[int, ...] = (1, 4),
    source: int = 32,
    steps: int = 24,
) -> dict[str, dict[str, float]]:
    """Milliseconds of one predicted step and of one step of the decoder, medians, and their ratio, by rows.

    The decoder's step is that of the stack alone, without the language model head, with its cache growing.
    """
    facts = stack_facts(model, "decoder")
    generator = torch.Generator().manual_seed(0)
    found = {}
    for count in rows:
        tokens = torch.randint(0, facts.embedding.shape[0], (count, steps), generator=generator)
        told = torch.randn(count, source, facts.embedding.shape[1], generator=generator).to(facts.embedding.dtype)
        mask = torch.ones(count, source, dtype=torch.int64)
        state, cache = predictor.start(told, mask), None
        ours, theirs = [], []
        for token in tokens.split(1, dim=1):
            begin = time.perf_counter()
            _, state = predictor.step(state, token)
            middle = time.perf_counter()
            # Past the model's own forward, which would predict as well.
            output = type(facts.stack).forward(
                facts.stack, input_ids=token, encoder_hidden_states=told, encoder_attention_mask=mask, cache=cache
            )
            theirs.append(1e3 * (time.perf_counter() - middle))
            ours.append(1e3 * (middle - begin))
            cache = output.cache
        step, whole = statistics.median(ours), statistics.median(theirs)
        found[f"{count}x1"] = {"predictor_ms": step, "model_ms": whole, "share": step / whole}
    return found
