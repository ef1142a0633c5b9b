"""Tokens a second that a model would reach: its routing run through the engine's own Residency on a virtual clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sida_ext.planning.capacity import other_bytes, record_bytes
from sida_ext.planning.counting import ModelFacts
from sida_ext.planning.engine import engine
from sida_ext.planning.rates import Rates
from sida_ext.planning.routing import LEAST_LOCAL, MOST_LOCAL, Batches, Recorded, Tokens, prompts, steps

__all__ = ["FAST", "SLOW", "Speed", "decode_speed", "prompt_speed"]

FAST, SLOW = 0, 1  # the end of a range: which of a rate's pair it takes
# Steps that fill the expert memory and find what is in demand, and steps that count.
FEWEST_STEPS, MOST_STEPS, COUNTED_STEPS = 24, 160, 48
PROMPTS_BEFORE, PROMPTS_COUNTED = 3, 3
# What the clock leaves out slows a run and never speeds it up: lanes that check what they read take time from the cores
# that compute, waves of few experts fill them worse, memory is touched for the first time. The slow end's seconds are
# longer by this: measured runs took 0.8 to 1.4 times what the medians add up to (docs/planning.md).
LEFT_OUT = 1.4


@dataclass(frozen=True)
class Speed:
    """Ranges, each (low, high): tokens a second, bytes read from the disk for each token, hit rate of the experts."""

    tokens_per_s: tuple[float, float]
    disk_bytes_per_token: tuple[float, float]
    hit_rate: tuple[float, float]


@dataclass(frozen=True)
class _Run:
    seconds: float
    loads: int
    wanted: int


@dataclass(frozen=True)
class _Times:
    """Seconds, as the virtual clock takes them: a read that is alone, what it occupies the shared disk for, what is
    computed before a layer, and one expert of it."""

    read: float
    shared: float
    before: float
    compute: float


def _clock(facts: ModelFacts, found: Recorded, slots: int, times: _Times, lanes: int) -> _Run:
    """Of the batches that count: the run of all less the run of those before them, both the same every time."""
    totals = {"seconds": 0.0, "loads": 0.0, "wanted": 0.0}
    for batches, sign in ((found.batches, 1), (found.batches[: found.warm_up], -1)):
        if not batches:
            continue
        result = engine().run_clock(
            len(facts.layers),
            facts.experts,
            batches,
            "next_use",
            slots,
            0,
            times.read,
            times.before,
            times.compute,
            lanes,
            [],  # no tables: what a model does whose experts nobody predicts
            shared=times.shared,
        )
        for name in totals:
            totals[name] += sign * result[name]
    return _Run(totals["seconds"], int(totals["loads"]), int(totals["wanted"]))


def _slots(facts: ModelFacts, dtype: str, budget: int) -> int:
    return max(1, min(budget // record_bytes(facts.shape, dtype), len(facts.layers) * facts.experts))


def _times(
    facts: ModelFacts,
    dtype: str,
    rates: Rates,
    routing: Recorded,
    tokens: int,
    head: bool,
    end: int,
    dense_bytes: float,
) -> _Times:
    """At one end of the range.

    Args:
        dense_bytes: of one parameter of a dense matrix.
    """
    record = record_bytes(facts.shape, dtype)
    counted = routing.batches[routing.warm_up :]
    layers = max(1, sum(len(batch) for batch in counted))  # MoE layers run
    distinct = max(1, sum(len(experts) for batch in counted for _, experts in batch))
    if routing.tokens is None:
        each = [max(1.0, facts.top_k * tokens * layers / distinct)]
    else:
        each = [count for batch in routing.tokens[routing.warm_up :] for layer in batch for count in layer]
    # All the weights that one forward reads: what of them a cache still holds is found faster.
    dense = facts.layer_numbers + (facts.head_numbers if head else 0)
    held = rates.held((record * distinct / max(1, len(counted))) + dense_bytes * dense, end)
    # A dense layer's time goes to the MoE layer that follows; the head's and the rest of a forward to all of them.
    before = facts.depth / len(facts.layers) * rates.layer_seconds(facts.layer_numbers / facts.depth, tokens, end, held)
    if head:
        before += facts.head_numbers * rates.number.seconds(1, end, held) * len(counted) / layers
    if rates.rest is not None:
        before += rates.rest.seconds(tokens, end) * len(counted) / layers
    shared = record / rates.disk[end]
    # A lane whose rate alone is not known has its share of the disk, whatever the others do.
    read = max(shared, record / rates.alone) if rates.alone else shared * rates.lanes
    compute = sum(rates.expert.seconds(count, end, held) for count in each) / len(each)
    return _Times(read, shared if rates.alone else 0.0, before, compute)


def _speed(
    facts: ModelFacts,
    dtype: str,
    budget: int,
    rates: Rates,
    ends: Sequence[Recorded],
    tokens: int,
    head: bool,
    dense_dtype: str | None,
) -> Speed:
    """From the routing of the fast end and of the slow one.

    Args:
        tokens: of a batch that counts; head: each batch ends with the distribution of one token.
    """
    slots, record = _slots(facts, dtype, budget), record_bytes(facts.shape, dtype)
    dense_bytes = other_bytes(facts, dense_dtype) / max(1, facts.other_numbers)
    found = []
    for end, routing in zip((FAST, SLOW), ends, strict=True):
        times = _times(facts, dtype, rates, routing, tokens, head, end, dense_bytes)
        result = _clock(facts, routing, slots, times, rates.lanes)
        seconds = result.seconds * (LEFT_OUT if end == SLOW else 1.0)
        count = (len(routing.batches) - routing.warm_up) * tokens
        found.append((count / seconds, result.loads * record / count, 1 - result.loads / max(1, result.wanted)))
    speeds, read, hits = ((min(pair), max(pair)) for pair in zip(*found, strict=True))
    return Speed(speeds, read, hits)


def _steady(
    facts: ModelFacts, batches: Batches, warm_up: int, layers: Sequence[int], tokens: Tokens | None = None
) -> Recorded:
    """Batches whose layers are counted from 0, after one that fills the expert memory with whatever it holds."""
    fill = [(layer, list(range(facts.experts))) for layer in layers]
    steady = [fill, *([(layers[n], experts) for n, experts in batch] for batch in batches)]
    return Recorded(steady, warm_up + 1, None if tokens is None else [[], *tokens])


def decode_speed(
    facts: ModelFacts,
    dtype: str,
    budget: int,
    rates: Rates,
    recorded: Recorded | None = None,
    dense_dtype: str | None = None,
) -> Speed:
    """One token after the other, one sequence.

    Args:
        budget: expert memory, bytes.
        recorded: steps of a real run; None: the most local routing that is plausible for the high end of the range, the
            least local for the low one.
        dense_dtype: of every other large matrix; the rates are of it.
    """
    if recorded is not None:
        return _speed(facts, dtype, budget, rates, [recorded] * 2, 1, True, dense_dtype)
    layers = facts.decode_layers
    fill = round(2 * _slots(facts, dtype, budget) / (len(layers) * facts.top_k))
    warm_up = max(FEWEST_STEPS, min(MOST_STEPS, fill))
    ends = []
    for kind in (MOST_LOCAL, LEAST_LOCAL):
        found = steps(kind, len(layers), facts.experts, facts.top_k, warm_up + COUNTED_STEPS)
        ends.append(_steady(facts, found, warm_up, layers))
    return _speed(facts, dtype, budget, rates, ends, 1, True, dense_dtype)


def prompt_speed(
    facts: ModelFacts,
    dtype: str,
    budget: int,
    rates: Rates,
    tokens: int,
    recorded: Recorded | None = None,
    dense_dtype: str | None = None,
) -> Speed:
    """Prompts of ``tokens`` tokens, one after the other; as :func:`decode_speed`."""
    if recorded is not None:
        return _speed(facts, dtype, budget, rates, [recorded] * 2, tokens, not facts.encoder_only, dense_dtype)
    layers = facts.prompt_layers
    ends = []
    for kind in (MOST_LOCAL, LEAST_LOCAL):
        count = PROMPTS_BEFORE + PROMPTS_COUNTED
        found, numbers = prompts(kind, len(layers), facts.experts, facts.top_k, tokens, count)
        ends.append(_steady(facts, found, PROMPTS_BEFORE, layers, numbers))
    return _speed(facts, dtype, budget, rates, ends, tokens, not facts.encoder_only, dense_dtype)
