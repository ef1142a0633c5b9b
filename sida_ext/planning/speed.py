"""Tokens a second that a model would reach: its routing run through the engine's own Residency on a virtual clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sida_ext.planning.capacity import record_bytes
from sida_ext.planning.counting import ModelFacts
from sida_ext.planning.engine import engine
from sida_ext.planning.rates import Rates
from sida_ext.planning.routing import LEAST_LOCAL, MOST_LOCAL, Batches, Recorded, prompts, steps

__all__ = ["FAST", "SLOW", "Speed", "decode_speed", "prompt_speed"]

FAST, SLOW = 0, 1  # the end of a range: which of a rate's pair it takes
# Steps that fill the expert memory and find what is in demand, and steps that count.
FEWEST_STEPS, MOST_STEPS, COUNTED_STEPS = 24, 160, 48
PROMPTS_BEFORE, PROMPTS_COUNTED = 3, 3
# What the clock leaves out slows a run and never speeds it up: lanes that check what they read take time from the cores
# that compute, waves of few experts fill them worse. The slow end's seconds are longer by this.
LEFT_OUT = 1.25


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


def _clock(facts: ModelFacts, found: Recorded, slots: int, times: tuple[float, float, float], lanes: int) -> _Run:
    """Of the batches that count: the run of all less the run of those before them, both the same every time."""
    read, before, compute = times
    totals = {"seconds": 0.0, "loads": 0.0, "wanted": 0.0}
    for batches, sign in ((found.batches, 1), (found.batches[: found.warm_up], -1)):
        if not batches:
            continue
        # Without tables: what a model does whose experts nobody predicts.
        result = engine().run_clock(
            len(facts.layers), facts.experts, batches, "next_use", slots, 0, read, before, compute, lanes, []
        )
        for name in totals:
            totals[name] += sign * result[name]
    return _Run(totals["seconds"], int(totals["loads"]), int(totals["wanted"]))


def _slots(facts: ModelFacts, dtype: str, budget: int) -> int:
    return max(1, min(budget // record_bytes(facts.shape, dtype), len(facts.layers) * facts.experts))


def _speed(
    facts: ModelFacts, dtype: str, budget: int, rates: Rates, ends: Sequence[Recorded], tokens: int, head: bool
) -> Speed:
    """From the routing of the fast end and of the slow one.

    Args:
        tokens: of a batch that counts; head: each batch ends with the distribution of one token.
    """
    slots, record = _slots(facts, dtype, budget), record_bytes(facts.shape, dtype)
    found = []
    for end, routing in zip((FAST, SLOW), ends, strict=True):
        counted = routing.batches[routing.warm_up :]
        layers = sum(len(batch) for batch in counted)  # MoE layers run
        distinct = sum(len(experts) for batch in counted for _, experts in batch) / max(1, layers)
        each = max(1.0, facts.top_k * tokens / max(distinct, 1.0))
        # A dense layer's time goes to the MoE layer that follows, the head's to all of them.
        before = facts.depth / len(facts.layers) * rates.layer_seconds(facts.layer_numbers / facts.depth, tokens, end)
        if head:
            before += facts.head_numbers * rates.number_seconds(1, end) * len(counted) / max(1, layers)
        # A lane's own time for one expert: lanes share the disk.
        times = (record * rates.lanes / rates.disk[end], before, rates.expert_seconds(each, end))
        result = _clock(facts, routing, slots, times, rates.lanes)
        seconds = result.seconds * (LEFT_OUT if end == SLOW else 1.0)
        count = len(counted) * tokens
        found.append((count / seconds, result.loads * record / count, 1 - result.loads / max(1, result.wanted)))
    speeds, read, hits = ((min(pair), max(pair)) for pair in zip(*found, strict=True))
    return Speed(speeds, read, hits)


def _steady(facts: ModelFacts, batches: Batches, warm_up: int, layers: Sequence[int]) -> Recorded:
    """Batches whose layers are counted from 0, after one that fills the expert memory with whatever it holds."""
    fill = [(layer, list(range(facts.experts))) for layer in layers]
    return Recorded([fill, *([(layers[n], experts) for n, experts in batch] for batch in batches)], warm_up + 1)


def decode_speed(facts: ModelFacts, dtype: str, budget: int, rates: Rates, recorded: Recorded | None = None) -> Speed:
    """One token after the other, one sequence.

    Args:
        budget: expert memory, bytes.
        recorded: steps of a real run; None: the most local routing that is plausible for the high end of the range, the
            least local for the low one.
    """
    if recorded is not None:
        return _speed(facts, dtype, budget, rates, [recorded] * 2, 1, head=True)
    layers = facts.decode_layers
    fill = round(2 * _slots(facts, dtype, budget) / (len(layers) * facts.top_k))
    warm_up = max(FEWEST_STEPS, min(MOST_STEPS, fill))
    ends = []
    for kind in (MOST_LOCAL, LEAST_LOCAL):
        found = steps(kind, len(layers), facts.experts, facts.top_k, warm_up + COUNTED_STEPS)
        ends.append(_steady(facts, found, warm_up, layers))
    return _speed(facts, dtype, budget, rates, ends, 1, head=True)


def prompt_speed(
    facts: ModelFacts, dtype: str, budget: int, rates: Rates, tokens: int, recorded: Recorded | None = None
) -> Speed:
    """Prompts of ``tokens`` tokens, one after the other; as :func:`decode_speed`."""
    if recorded is not None:
        return _speed(facts, dtype, budget, rates, [recorded] * 2, tokens, head=not facts.encoder_only)
    layers = facts.prompt_layers
    ends = []
    for kind in (MOST_LOCAL, LEAST_LOCAL):
        found = prompts(kind, len(layers), facts.experts, facts.top_k, tokens, PROMPTS_BEFORE + PROMPTS_COUNTED)
        ends.append(_steady(facts, found, PROMPTS_BEFORE, layers))
    return _speed(facts, dtype, budget, rates, ends, tokens, head=not facts.encoder_only)
