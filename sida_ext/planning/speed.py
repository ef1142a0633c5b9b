"""Tokens a second that a model would reach: its routing run through the engine's own Residency on a virtual clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sida_ext.planning.capacity import record_bytes
from sida_ext.planning.counting import ModelFacts
from sida_ext.planning.engine import engine
from sida_ext.planning.rates import Rates
from sida_ext.planning.routing import LEAST_LOCAL, MOST_LOCAL, Batches, prompts, steps

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
class _End:
    seconds: float
    loads: int
    wanted: int


def _clock(
    facts: ModelFacts, batches: Batches, warm_up: int, slots: int, times: tuple[float, float, float], lanes: int
) -> _End:
    """Of the batches after the first ``warm_up``: the run of all less the run of these, both the same every time."""
    read, before, compute = times
    results = []
    for part in (batches, batches[:warm_up]):
        if not part:
            results.append({"seconds": 0.0, "loads": 0, "wanted": 0})
            continue
        # Without tables: what a model does whose experts nobody predicts.
        results.append(
            engine().run_clock(
                len(facts.layers), facts.experts, part, "next_use", slots, 0, read, before, compute, lanes, []
            )
        )
    whole, first = results
    return _End(
        whole["seconds"] - first["seconds"],
        int(whole["loads"] - first["loads"]),
        int(whole["wanted"] - first["wanted"]),
    )


def _slots(facts: ModelFacts, dtype: str, budget: int) -> int:
    record = max(record_bytes(shape, dtype) for shape in facts.shapes)
    return max(1, min(budget // record, len(facts.layers) * facts.experts))


def _speed(
    facts: ModelFacts, dtype: str, budget: int, rates: Rates, ends: Sequence[tuple[Batches, int]], tokens: int
) -> Speed:
    """From the batches of the fast end and of the slow one, each with how many of them only fill the memory.

    Args:
        tokens: of a batch.
    """
    slots = _slots(facts, dtype, budget)
    record = record_bytes(facts.shape, dtype)
    found = []
    for end, (batches, warm_up) in zip((FAST, SLOW), ends, strict=True):
        counted = batches[warm_up:]
        distinct = sum(len(experts) for batch in counted for _, experts in batch) / max(
            1, sum(len(batch) for batch in counted)
        )
        each = max(1.0, facts.top_k * tokens / max(distinct, 1.0))
        per_layer = facts.depth / len(facts.layers)  # dense layers' time goes to the MoE layer that follows
        head = facts.head_numbers * rates.number_seconds(1, end) / len(facts.layers)
        before = per_layer * rates.layer_seconds(facts.layer_numbers / facts.depth, tokens, end) + head
        read = record * rates.lanes / rates.disk[end]
        times = (read, before, rates.expert_seconds(each, end))
        result = _clock(facts, batches, warm_up, slots, times, rates.lanes)
        seconds = result.seconds * (LEFT_OUT if end == SLOW else 1.0)
        count = len(counted) * tokens
        found.append((count / seconds, result.loads * record / count, 1 - result.loads / max(1, result.wanted)))
    (fast, few, hits), (slow, many, misses) = found
    return Speed(
        (min(slow, fast), max(slow, fast)), (min(few, many), max(few, many)), (min(hits, misses), max(hits, misses))
    )


def decode_speed(facts: ModelFacts, dtype: str, budget: int, rates: Rates, recorded: Batches | None = None) -> Speed:
    """One token after the other, one sequence.

    Args:
        budget: expert memory, bytes.
        recorded: steps of a real run; None: the most local routing that is plausible for the high end of the range, the
            least local for the low one.
    """
    if recorded is not None:
        warm_up = len(recorded) // 2
        return _speed(facts, dtype, budget, rates, [(recorded, warm_up)] * 2, 1)
    layers = len(facts.layers)
    slots = _slots(facts, dtype, budget)
    fill = round(2 * slots / (layers * facts.top_k))
    warm_up = max(FEWEST_STEPS, min(MOST_STEPS, fill))
    count = warm_up + COUNTED_STEPS
    ends = [(steps(kind, layers, facts.experts, facts.top_k, count), warm_up) for kind in (MOST_LOCAL, LEAST_LOCAL)]
    return _speed(facts, dtype, budget, rates, ends, 1)


def prompt_speed(
    facts: ModelFacts, dtype: str, budget: int, rates: Rates, tokens: int, recorded: Batches | None = None
) -> Speed:
    """Prompts of ``tokens`` tokens, one after the other; as :func:`decode_speed`."""
    if recorded is not None:
        return _speed(facts, dtype, budget, rates, [(recorded, len(recorded) // 2)] * 2, tokens)
    ends = [
        (
            prompts(kind, len(facts.layers), facts.experts, facts.top_k, tokens, PROMPTS_BEFORE + PROMPTS_COUNTED),
            PROMPTS_BEFORE,
        )
        for kind in (MOST_LOCAL, LEAST_LOCAL)
    ]
    return _speed(facts, dtype, budget, rates, ends, tokens)
