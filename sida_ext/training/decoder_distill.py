"""Trains a RecurrentPredictor for a decoder: traces under teacher forcing, distillation, calibration, report."""

from __future__ import annotations

import os
import statistics
import time
from typing import Any

import torch
from torch import nn

from sida_ext.prediction.cache_names import cache_argument
from sida_ext.prediction.decoder_predictor import RecurrentPredictor, TokenTableDecoder
from sida_ext.prediction.moe_facts import stack_facts
from sida_ext.prediction.token_table import TokenTablePredictor
from sida_ext.training.decoder_traces import (
    DecoderTrace,
    Pairs,
    collect_decoder_traces,
    paired_batches,
    read_by_decoder,
)
from sida_ext.training.distill import fill_store, train_on_store, training_folder, training_options
from sida_ext.training.objective import TrainingOptions
from sida_ext.training.traces import TraceStore

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
    """Train a predictor of the decoder's routing and write it, with its report and a token table, to folder ``out``.

    Interrupting and going on work as in ``distill.train_predictor``; targets that the model generates are generated
    again when tracing goes on, to see that they are the same.

    Args:
        model: a Switch encoder-decoder, plain or with swapped experts.
        tokenizer: called with a text, gives ``input_ids``; the model's own.
        pairs: documents: a source and its target, or a source alone, for which the model generates (greedily, at most
            ``max_length`` tokens) what it is then traced on. See ``decoder_traces.paired_batches``.
        out: folder of the predictor.
        options: see TrainingOptions; ``variant`` is not read, ``net`` holds sizes of the DecoderNet.
        held_out_pairs: documents to report on; then none of ``pairs`` is held out for that.
        resume: False deletes unfinished work in ``out`` first.
        progress: shows progress bars.
        keep_traces: keeps OUT/training when done.

    Returns:
        The predictor in eval mode.

    Raises:
        ValueError: documents too few to split, tokens unknown to the model, unfinished work of another model or text.
    """
    started = time.perf_counter()
    options = training_options(options, "held_out_pairs", held_out_pairs)
    facts = stack_facts(model, "decoder")
    work = training_folder(out, resume)
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
    predictor = RecurrentPredictor.for_model(model, seed=options.seed, **options.net)
    table = TokenTablePredictor.for_model(model, "decoder")
    return train_on_store(
        predictor,
        table,
        store,
        options,
        out,
        compared_with=TokenTableDecoder(table),
        details=lambda _: {"cost": decoder_cost(predictor, model)},
        started=started,
        progress=progress,
        keep_traces=keep_traces,
    )


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
    argument = cache_argument(facts.stack)
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
                facts.stack,
                input_ids=token,
                encoder_hidden_states=told,
                encoder_attention_mask=mask,
                use_cache=True,
                **{argument: cache},
            )
            theirs.append(1e3 * (time.perf_counter() - middle))
            ours.append(1e3 * (middle - begin))
            cache = output[argument]
        step, whole = statistics.median(ours), statistics.median(theirs)
        found[f"{count}x1"] = {"predictor_ms": step, "model_ms": whole, "share": step / whole}
    return found
