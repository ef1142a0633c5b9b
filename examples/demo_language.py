"""The bundled language model, decoder-only: score held-out text and write on from a quarter of its experts, beside
transformers; part of ``python -m examples.demo``.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

import sida_ext
from examples.running_text import DOMAINS, load_documents, passages
from sida_ext.experts.budget import format_bytes
from sida_ext.serving.language import continuations, likelihoods, perplexity

MODEL = Path(__file__).resolve().parent / "demo_language_model"
WINDOW = 256  # tokens of a scored passage
PROMPT, WRITTEN = 32, 48  # tokens


@dataclass
class Run:
    """What one way of serving gave and took."""

    name: str
    scored: list[tuple[float, int]]  # of each passage: sum of log-probabilities, tokens
    written: list[list[int]]
    score_seconds: float
    write_seconds: float
    expert_memory: int
    stats: sida_ext.Stats | None


def plain_likelihoods(model: Any, texts: list[list[int]]) -> list[tuple[float, int]]:
    found = []
    with torch.no_grad():
        for ids in texts:
            row = torch.tensor([ids])
            logits = model(input_ids=row, attention_mask=torch.ones_like(row), use_cache=False).logits[0, :-1]
            chosen = logits.float().log_softmax(-1).gather(1, row[0, 1:, None])
            found.append((float(chosen.sum(dtype=torch.float64)), len(ids) - 1))
    return found


def measure(name: str, model: Any, texts: list[list[int]], memory: int) -> Run:
    runtime = getattr(model, "sida", None)
    begin = time.perf_counter()
    scored = plain_likelihoods(model, texts) if runtime is None else list(likelihoods(model, texts))
    middle = time.perf_counter()
    written = list(continuations(model, [ids[:PROMPT] for ids in texts[:: max(1, len(texts) // 4)]], WRITTEN))
    end = time.perf_counter()
    return Run(
        name, scored, written, middle - begin, end - middle, memory, None if runtime is None else runtime.stats()
    )


def demo(count: int, budget: str) -> None:
    """Print one table: ``count`` held-out passages scored, a few of them gone on with."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    documents = [passages(load_documents("held_out", domain), 4 * WINDOW)[: count // 2] for domain in DOMAINS]
    texts = [
        tokenizer(passage.text, truncation=True, max_length=WINDOW)["input_ids"]
        for part in documents
        for passage in part
    ]
    tokens = sum(map(len, texts))
    print(f"\n{len(texts)} held-out passages of two domains, {tokens} tokens; then {WRITTEN} tokens after 4 prompts")
    # One type for everything that is not an expert, so that only the experts' place differs.
    model = transformers.OlmoeForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    model.set_experts_implementation("eager")
    experts = sum(p.numel() * p.element_size() for name, p in model.named_parameters() if ".experts." in name)
    runs = [measure("transformers, all experts", model, texts, experts)]
    del model
    for name, dtype in (("ours, float32", "float32"), ("ours, bfloat16", "bfloat16"), ("ours, int4", "int4")):
        served = sida_ext.from_pretrained(MODEL, expert_memory=budget, expert_dtype=dtype, dtype=torch.float32)
        with served.sida as runtime:
            runs.append(measure(name, served, texts, runtime.expert_memory))
    table = Table(title=f"The bundled language model, {budget} of its experts in memory")
    for column in ("", "perplexity", "scored/s", "written/s", "expert memory", "hit rate", "stalled", "read"):
        table.add_column(column, justify="left" if not column else "right")
    for run in runs:
        stats, written = run.stats, sum(map(len, run.written))
        table.add_row(
            run.name,
            f"{perplexity(run.scored):.3f}",
            f"{tokens / run.score_seconds:.0f}",
            f"{written / run.write_seconds:.1f}",
            format_bytes(run.expert_memory),
            f"{stats.hit_rate:.1%}" if stats else "-",
            f"{stats.stall_seconds:.2f} s" if stats else "-",
            format_bytes(stats.bytes_read) if stats else "-",
        )
    Console(width=120).print(table)
    print(f"it writes: {tokenizer.decode(runs[1].written[0])!r}")
    same = runs[1].written == runs[0].written
    print(f"the same tokens as transformers, float32: {same}")
