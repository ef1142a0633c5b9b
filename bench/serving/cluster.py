"""What routing by experts saves on Ray, beside Ray's own routing, on this machine: bytes read a request and the load of
the replicas, over two domains. ``python -m bench.serving.cluster [--replicas 2] [--requests 600] [--json FILE]``.

``made``: a small model made for two domains. ``phrases``: the bundled classifier and its token table, on phrases of
three words from its own training texts; the domains are the 5 % of phrases at either end of the axis on which their
experts differ most, so that about half of the experts belong to both.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

import sida_ext
from examples.corpus import load_sentences
from sida_ext.prediction.protocol import load_predictor
from sida_ext.serving.cluster_batch_order import by_experts
from sida_ext.serving.model import predicted_experts
from tests.support.cluster import Application, cluster
from tests.support.two_domains import save_two_domains, texts_of_two_domains

ROOT = Path(__file__).parents[2]


def phrases(count: int, seed: int) -> list[list[int]]:
    """Token ids of phrases of either domain, in random order."""
    folder = ROOT / "examples/demo_model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = sida_ext.from_pretrained(folder, expert_memory="25%")
    table = load_predictor(ROOT / "examples/demo_predictor/token_table", model)
    found = set()
    for sentence in load_sentences("train"):
        words = re.findall(r"[a-z']+", sentence.text.lower())
        found |= {" ".join(words[start : start + 3]) for start in range(0, len(words) - 2, 3)}
    draw = random.Random(seed)
    chosen = draw.sample(sorted(found), 4000)
    ids = [list(tokenizer(text)["input_ids"]) for text in chosen]
    order = by_experts([predicted_experts(table, row) for row in ids])
    ends = [ids[at] for at in order[:200] + order[-200:]]
    model.sida.close()
    return draw.choices(ends, k=count)


def measured(application: Application, texts: list[list[int]], clients: int) -> dict[str, Any]:
    """One application under load, once its memories are full."""
    application.load(texts[: len(texts) // 4], clients)
    before, begin = application.totals(), time.perf_counter()
    statuses, _ = application.load(texts, clients)
    seconds = time.perf_counter() - begin
    after = application.totals()
    if set(statuses) != {200}:
        raise RuntimeError(f"statuses {dict(statuses)}, expected 200 alone")
    rise = {
        name: [after[name][replica] - before[name][replica] for replica in after[name]]
        for name in ("read_bytes", "prompt_tokens", "hits", "wanted", "stall_seconds")
    }
    return {
        "read_bytes_a_request": sum(rise["read_bytes"]) / len(texts),
        "load_over_mean": max(rise["prompt_tokens"]) * len(rise["prompt_tokens"]) / sum(rise["prompt_tokens"]),
        "hit_rate": sum(rise["hits"]) / sum(rise["wanted"]),
        "stall_ms_a_request": 1e3 * sum(rise["stall_seconds"]) / len(texts),
        "requests_per_s": len(texts) / seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--requests", type=int, default=600)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--json", type=Path, default=None)
    given = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as made, cluster(port, cpus=2 * given.replicas):
        save_two_domains(Path(made))
        cases = {
            "made": (made, f"{made}/table", "40%", texts_of_two_domains(given.requests, seed=1)),
            "phrases": (
                str(ROOT / "examples/demo_model"),
                str(ROOT / "examples/demo_predictor/token_table"),
                "50%",
                phrases(given.requests, seed=1),
            ),
        }
        for case, (model, predictor, budget, texts) in cases.items():
            rows = {}
            for routing, imbalance in (("ray", "0"), ("experts", "1.25")):
                application = Application(
                    port,
                    f"{case}-{routing}",
                    model=model,
                    predictor=predictor,
                    expert_memory=budget,
                    replicas=str(given.replicas),
                    imbalance=imbalance,
                    report_seconds="0.5",
                )
                rows[routing] = measured(application, texts, given.clients)
                application.delete()
            share = rows["experts"]["read_bytes_a_request"] / rows["ray"]["read_bytes_a_request"]
            found[case] = {**rows, "read_over_ray": share}
            print(case, json.dumps(found[case], indent=1))
    if given.json is not None:
        given.json.write_text(json.dumps({"threads": torch.get_num_threads(), **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
