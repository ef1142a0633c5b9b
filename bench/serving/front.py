"""What the HTTP server costs and gains: latency beside a direct call, throughput at 16 clients beside one by one and
beside transformers' own batch of 16. ``python -m bench.serving.front [MODEL ...] [--requests N] [--json FILE]``.

All rows of one model are measured in one process, one after the other; clients run in a process of their own and speak
plain ``http.client``, so that what they cost is not counted as the server's.
"""

from __future__ import annotations

import argparse
import gzip
import http.client
import json
import multiprocessing
import statistics
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

import sida_ext
from sida_ext.serving.scheduler import Limits
from tests.support.served import served_here

ROOT = Path(__file__).parents[2]
NEW_TOKENS = 32


def corpus(count: int) -> list[str]:
    """The first texts of the bundled corpus."""
    with gzip.open(ROOT / "examples/data/corpus.jsonl.gz", "rt") as file:
        return [json.loads(line)["text"] for line, _ in zip(file, range(count), strict=False)]


def _clients(port: int, path: str, bodies: Sequence[dict[str, Any]], clients: int, answer: Any) -> None:
    todo = iter(enumerate(bodies))
    lock = threading.Lock()
    latencies: list[float] = [0.0] * len(bodies)
    written = [0] * len(bodies)

    def one() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
        while True:
            with lock:
                number, body = next(todo, (None, None))
            if number is None:
                return
            begin = time.perf_counter()
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            reply = connection.getresponse()
            found = json.loads(reply.read())
            latencies[number] = time.perf_counter() - begin
            if reply.status != 200:
                raise RuntimeError(f"status {reply.status}: {found}")
            written[number] = found["usage"].get("completion_tokens", 0)

    threads = [threading.Thread(target=one) for _ in range(clients)]
    begin = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    answer.put((time.perf_counter() - begin, latencies, sum(written)))


def drive(port: int, path: str, bodies: Sequence[dict[str, Any]], clients: int) -> tuple[float, list[float], int]:
    """Seconds for all requests, each request's latency, tokens written."""
    context = multiprocessing.get_context("spawn")
    answer: Any = context.Queue()
    process = context.Process(target=_clients, args=(port, path, list(bodies), clients, answer))
    process.start()
    found = answer.get(timeout=600)
    process.join()
    return found


def classifier(folder: str, requests: int) -> dict[str, Any]:
    """Classification: the front's cost at the median, and texts a second."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = sida_ext.from_pretrained(folder, expert_memory="auto")
    texts = [text for text in corpus(4 * requests) if len(tokenizer(text)["input_ids"]) <= 64][:requests]
    with served_here(model, tokenizer, name="bench", limits=Limits(queue=1024)) as server:
        port = int(server.url.rsplit(":", 1)[1])
        served = server.service.model
        ids = [tokenizer(text)["input_ids"] for text in texts]
        bodies = [{"input": text} for text in texts]
        drive(port, "/classify", bodies[:32], 4)
        direct = []
        for row in ids:
            begin = time.perf_counter()
            served.classify([row])
            direct.append(time.perf_counter() - begin)
        alone, latencies, _ = drive(port, "/classify", bodies, 1)
        together, _, _ = drive(port, "/classify", bodies, 16)
        begin = time.perf_counter()
        for start in range(0, len(texts), 16):
            batch = tokenizer(texts[start : start + 16], return_tensors="pt", padding=True)
            with torch.no_grad():
                model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        library = time.perf_counter() - begin
    return {
        "direct_ms": 1e3 * statistics.median(direct),
        "http_ms": 1e3 * statistics.median(latencies),
        "front_ms": 1e3 * (statistics.median(latencies) - statistics.median(direct)),
        "one_by_one_per_s": len(texts) / alone,
        "clients_16_per_s": len(texts) / together,
        "library_16_per_s": len(texts) / library,
        "over_one_by_one": alone / together,
        "over_library": library / together,
    }


def generator(folder: str, requests: int) -> dict[str, Any]:
    """Generation: tokens a second, and what a step costs beside the model's own."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = sida_ext.from_pretrained(folder, expert_memory="auto")
    texts = [" ".join(text.split()[:12]) for text in corpus(requests)]
    model.generation_config.eos_token_id = None  # every row writes as many tokens
    with served_here(model, tokenizer, name="bench", limits=Limits(queue=1024)) as server:
        port = int(server.url.rsplit(":", 1)[1])
        served, counts = server.service.model, server.service.driver.counts
        bodies = [{"prompt": text, "max_tokens": NEW_TOKENS, "temperature": 0} for text in texts]
        drive(port, "/v1/completions", bodies[:16], 16)
        row = served.start(tokenizer(texts[0])["input_ids"], NEW_TOKENS)[1]
        direct = []
        for _ in range(NEW_TOKENS - 1):
            begin = time.perf_counter()
            served.step([row], [5])
            direct.append(time.perf_counter() - begin)
        served.drop(row)
        steps, seconds = counts.steps, counts.step_seconds
        alone, _, written = drive(port, "/v1/completions", bodies[: max(requests // 4, 4)], 1)
        in_steps, steps = counts.step_seconds - seconds, counts.steps - steps
        together, _, all_written = drive(port, "/v1/completions", bodies, 16)
        begin = time.perf_counter()
        for start in range(0, len(texts), 16):
            batch = tokenizer(texts[start : start + 16], return_tensors="pt", padding=True)
            ids, mask = batch["input_ids"], batch["attention_mask"]
            model.generate(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False)
        library = time.perf_counter() - begin
    rate = {"one": written / alone, "sixteen": all_written / together, "library": len(texts) * NEW_TOKENS / library}
    return {
        "direct_step_ms": 1e3 * statistics.median(direct),
        "http_per_step_ms": 1e3 * alone / steps,
        "outside_steps_share": 1 - in_steps / alone,
        "one_by_one_tokens_per_s": rate["one"],
        "clients_16_tokens_per_s": rate["sixteen"],
        "library_16_tokens_per_s": rate["library"],
        "over_one_by_one": rate["sixteen"] / rate["one"],
        "over_library": rate["sixteen"] / rate["library"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=["demo_model", "demo_denoiser"], help="folders of examples/")
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--json", type=Path, default=None)
    given = parser.parse_args()
    found = {}
    for name in given.models:
        folder = str(ROOT / "examples" / name)
        kind = json.loads((ROOT / "examples" / name / "config.json").read_text())["architectures"][0]
        measure = classifier if kind.endswith("Classification") else generator
        found[name] = measure(folder, given.requests)
        print(name, json.dumps({key: round(value, 3) for key, value in found[name].items()}, indent=1))
    if given.json is not None:
        given.json.write_text(json.dumps({"threads": torch.get_num_threads(), "models": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
