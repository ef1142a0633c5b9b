"""What ``on_miss="low_bit"`` costs and gives: perplexity against the share of choices that 4-bit copies serve, against
tokens/s, the bundled language model stepped token by token over held-out text.

    python -m bench.causal.low_bit [--settled] [--json FILE] [--png FILE]

Each row is one bound ``max_low_bit``. Expert memory holds a quarter of the bfloat16 experts, from cold, and a read is
made ``--read-us`` microseconds longer, as those of larger experts are. Which choices are late depends on timing, so
perplexity and share are of this very run. ``--settled`` takes the timing out: a layer begins when no read is under way,
and what is not there then is late; with one lane every run has the same perplexity and share, and no speed.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

import sida_ext
from examples.running_text import DOMAINS, load_documents, token_stream
from sida_ext import _C
from sida_ext.prediction.cache_names import cache_argument, cache_of

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples" / "demo_language_model"
BOUNDS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 1.0)


def passages(count: int, length: int) -> list[torch.Tensor]:
    """``count`` of each domain, [length + 1] token ids each."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    rows = []
    for domain in DOMAINS:
        texts = [document.text for document in load_documents("held_out", domain)]
        stream = torch.as_tensor(token_stream(tokenizer, texts, count * (length + 1)))
        rows += list(stream[: count * (length + 1)].view(count, length + 1))
    return rows


def step(model: Any, rows: list[torch.Tensor]) -> tuple[float, int, float]:
    """Negative log-likelihood, tokens, and seconds of stepping through the rows one token at a time."""
    total, tokens = 0.0, 0
    begin = time.perf_counter()
    for row in rows:
        cache, name = None, cache_argument(model)
        for position in range(len(row) - 1):
            output = model(input_ids=row[None, position : position + 1], use_cache=True, **{name: cache})
            cache = cache_of(output)
            total -= float(torch.log_softmax(output.logits[0, -1].float(), -1)[row[position + 1]])
            tokens += 1
    return total, tokens, time.perf_counter() - begin


def measured(bound: float, rows: list[torch.Tensor], arguments: argparse.Namespace) -> dict[str, Any]:
    """One row of the table."""
    read = 0 if arguments.settled else arguments.read_us
    model = sida_ext.from_pretrained(
        arguments.model,
        dtype=torch.float32,
        expert_memory=arguments.expert_memory,
        lanes=1,
        on_miss="low_bit",
        max_low_bit=bound,
        faults=_C.Faults(delay_us_min=read, delay_us_max=read),
    )
    with model.sida as runtime, torch.no_grad():
        runtime.set_settled(arguments.settled)
        total, tokens, seconds = step(model, rows)
        stats = runtime.stats()
        return {
            "max_low_bit": bound,
            "share": stats.low_bit_share,
            "hit_rate": stats.hit_rate,
            "perplexity": math.exp(total / tokens),
            "tokens": tokens,
            "tokens_per_s": None if arguments.settled else tokens / seconds,
            "stall_seconds": None if arguments.settled else stats.stall_seconds,
            "bytes_read": stats.bytes_read,
            "low_bit_memory": runtime.low_bit_memory,
            "expert_memory": runtime.expert_memory,
        }


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Perplexity, and tokens/s where it was measured, over the share."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, left = pyplot.subplots(figsize=(7, 4), layout="constrained")
    shares = [100 * row["share"] for row in rows]
    left.plot(shares, [row["perplexity"] for row in rows], "o-", color="tab:blue")
    left.set_xlabel("choices served by int4 copies, %")
    left.set_ylabel("perplexity of held-out text", color="tab:blue")
    left.grid(alpha=0.3)
    if rows[0]["tokens_per_s"] is not None:
        right = left.twinx()
        right.plot(shares, [row["tokens_per_s"] for row in rows], "s--", color="tab:orange")
        right.set_ylabel("tokens/s", color="tab:orange")
        right.set_ylim(bottom=0)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--passages", type=int, default=16, help="of each domain")
    parser.add_argument("--tokens", type=int, default=128, help="of a passage")
    parser.add_argument("--expert-memory", default="25%")
    parser.add_argument("--read-us", type=int, default=1000, help="by which each read is longer")
    parser.add_argument("--settled", action="store_true")
    parser.add_argument("--bounds", type=float, nargs="+", default=list(BOUNDS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--png", type=Path)
    arguments = parser.parse_args()
    rows = passages(arguments.passages, arguments.tokens)
    found = []
    print("| max_low_bit | served by copies | perplexity | | hits | tokens/s | stalled |")
    print("|---|---|---|---|---|---|---|")
    for bound in arguments.bounds:
        row = measured(bound, rows, arguments)
        found.append(row)
        speed = "" if row["tokens_per_s"] is None else f"{row['tokens_per_s']:.0f}"
        stalled = "" if row["stall_seconds"] is None else f"{row['stall_seconds']:.1f} s"
        print(
            f"| {bound:g} | {row['share']:.1%} | {row['perplexity']:.3f} | "
            f"{row['perplexity'] / found[0]['perplexity'] - 1:+.2%} | {row['hit_rate']:.1%} | {speed} | {stalled} |",
            flush=True,
        )
    if arguments.json:
        arguments.json.write_text(json.dumps({"settled": arguments.settled, "rows": found}, indent=1) + "\n")
    if arguments.png:
        draw(found, arguments.png)


if __name__ == "__main__":
    main()
