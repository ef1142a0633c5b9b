"""What the page's live events cost: processor time of one event, as a share of the second between two of them.
``python -m bench.serving.events [--layers 48] [--experts 128] [--json FILE]``. The model is tiny but for the number of
its layers and experts, on which alone an event depends; rows run meanwhile, as the counters are taken from under them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from pathlib import Path

import httpx

import sida_ext
from sida_ext.serving.answers import encode_event
from tests.support.served import served_here
from tests.support.tiny_models import tiny_causal, tiny_tokenizer


def measure(layers: int, experts: int, events: int) -> dict[str, float]:
    """Milliseconds of processor time, bytes and share of one event a second and watcher."""
    model = tiny_causal("olmoe", num_hidden_layers=layers, num_experts=experts)
    with tempfile.TemporaryDirectory() as folder:
        model = sida_ext.swap_experts(model, expert_memory="25%", store=Path(folder) / "experts.sida")
        with served_here(model, tiny_tokenizer()) as server:
            body = {"prompt": [5, 6, 7], "max_tokens": 1000, "temperature": 0}
            busy = threading.Thread(
                target=httpx.post, args=(f"{server.url}/v1/completions",), kwargs={"json": body, "timeout": 600}
            )
            busy.start()
            while not server.service.driver.counts.tokens:
                time.sleep(0.01)
            costs, size = [], 0
            for _ in range(events):
                begin = time.thread_time()
                size = len(encode_event(server.service.metrics.snapshot()))
                costs.append(time.thread_time() - begin)
                time.sleep(0.02)
            interval = server.service.settings.events
            server.service.driver.cut()
            busy.join()
    cost = statistics.median(costs)
    return {"event_ms": 1e3 * cost, "event_bytes": size, "share_of_a_core": cost / interval}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--events", type=int, default=60)
    parser.add_argument("--json", type=Path, default=None)
    given = parser.parse_args()
    found = measure(given.layers, given.experts, given.events)
    print(json.dumps({key: round(value, 4) for key, value in found.items()}, indent=1))
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
