"""What the engine's counters, decisions and trace cost of a step: ``python -m bench.kernels.counters``, about a minute.

  decisions   everything that the state machine does for a batch, counters included: announcing, demands, releases,
              evictions, completions, on a recorded routing with copies that take no time. Counters are a few additions
              among this, so that they cost less.
  trace       a forward with the trace recording and without, in turns in one process, all experts in memory
  stats()     one call, which nobody makes within a step, and which a scraper makes every few seconds

The step is a forward of the bundled model, one sentence; the routing is its own. A larger model spends more on the step
and no more on a decision: the number of decisions grows with the experts that a batch wants.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from statistics import median
from typing import Any

import torch
import transformers

import sida_ext
from bench.engine.policy import demo_routing, sentence_batches
from examples.corpus import DEMO_MODEL
from sida_ext import _C


def seconds(call: Any) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sentences", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=12)
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(2)
    batches = sentence_batches(arguments.sentences)
    routing = replace(demo_routing(arguments.sentences), predicted=[])
    wanted = sum(len(experts) for batch in routing.batches for _, experts in batch) / len(routing.batches)
    slots = routing.layers * routing.experts // 4

    def decide() -> None:
        _C.run_policy(routing.layers, routing.experts, routing.batches, "next_use", slots, 4, [])

    decisions = min(seconds(decide) for _ in range(7)) / len(routing.batches)
    model = sida_ext.from_pretrained(DEMO_MODEL, expert_memory="100%", dtype=torch.float32)
    runtime = model.sida
    off, on, ratios, events = [], [], [], 0
    with torch.inference_mode():
        for batch in batches:
            model(**batch)

        def forwards() -> None:
            for batch in batches:
                model(**batch)

        for number in range(arguments.rounds):
            # Which of the two goes first takes turns, so that a drift of the machine is nobody's.
            pair = {}
            for tracing in (number % 2 == 0, number % 2 == 1):
                if tracing:
                    runtime.start_trace()
                pair[tracing] = seconds(forwards) / len(batches)
                if tracing:
                    events = len(runtime.take_trace())
            off.append(pair[False])
            on.append(pair[True])
            ratios.append(pair[True] / pair[False])
    stats = median(seconds(runtime.stats) for _ in range(200))
    runtime.close()
    step = median(off)
    print(f"step: {step * 1e3:.2f} ms, {wanted:.0f} experts wanted in {routing.layers} layers")
    print(f"decisions and counters: {decisions * 1e6:.0f} us a batch, {decisions / step:.2%} of a step")
    print(
        f"trace: {median(on) * 1e3:.2f} ms with it, {median(ratios) - 1:+.2%} (pairs {min(ratios) - 1:+.2%} to "
        f"{max(ratios) - 1:+.2%}), {events / len(batches):.0f} events a step"
    )
    print(f"stats(): {stats * 1e6:.0f} us a call")


if __name__ == "__main__":
    main()
