"""Switch-base's shapes for the paper's tables: checkpoints with random weights, their traces, predictors and timings.

    python -m bench.paper.base 128 --until predictors      # what `bench/paper/__main__.py` does for its base stages,
    by hand

Nothing pre-trained is at hand, so the weights are random (bench/engine/checkpoint.py) and the text is the bundled
sentences with the bundled tokenizer's ids. Such a model routes by token and context as its random weights have it; its
predictors are trained here on traces of that routing. Every step's result is kept in the work folder and not made
again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

import sida_ext
from bench.engine.checkpoint import write_checkpoint
from bench.prediction.quality import Memory, table_predictor
from bench.prediction.stall import oracle_tables
from examples.corpus import DEMO_MODEL, MAX_TOKENS, load_sentences
from sida_ext.prediction.hash_predictor import HashPredictor
from sida_ext.prediction.protocol import load_predictor
from sida_ext.training.distill import tokenized_batches
from sida_ext.training.evaluation import evaluate
from sida_ext.training.objective import TrainingOptions
from sida_ext.training.traces import Trace, collect_traces, join_traces
from sida_ext.training.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]

EXPERTS = (8, 64, 128)
SENTENCES = {"train": 800, "validation": 60, "held_out": 200}
EPOCHS = 3
TRACE_MEMORY = "1GiB"  # of experts, while tracing
PREDICTORS = ("none", "token table", "hash predictor", "oracle")


class BaseShapes:
    """One encoder of base-`experts` shapes in folder `work`.

    Args:
        sentences: how many of each split are traced.
        epochs: passes of the predictor's training.
        blocks: of the encoder; fewer than Switch-base's 12 for a test.
    """

    def __init__(
        self,
        experts: int,
        work: Path,
        sentences: dict[str, int] | None = None,
        epochs: int = EPOCHS,
        blocks: int = 12,
    ) -> None:
        self.experts, self.folder, self.blocks = experts, work / f"base_{experts}", blocks
        self.sentences, self.epochs = sentences or SENTENCES, epochs
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO_MODEL)

    def checkpoint(self) -> Path:
        """The checkpoint's folder, written now if it is not there."""
        folder = self.folder / "checkpoint"
        if not folder.is_dir():
            partial = self.folder / "checkpoint.partial"
            shutil.rmtree(partial, ignore_errors=True)
            write_checkpoint(self.experts, partial, self.blocks)
            partial.rename(folder)
        return folder

    def model(self, expert_memory: str | int, **arguments: Any) -> Any:
        """The served model, bf16 experts and the rest float32."""
        return sida_ext.from_pretrained(
            self.checkpoint(),
            expert_memory=expert_memory,
            dtype=torch.float32,
            store_cache=self.folder / "store",
            **arguments,
        )

    def texts(self, split: str) -> list[str]:
        return [s.text for s in load_sentences(split, "movie")[: self.sentences[split]]]

    def trace(self, split: str) -> Trace:
        """The router's choices on one split, kept in the folder."""
        path = self.folder / f"trace_{split}.safetensors"
        if not path.is_file():
            model = self.model(TRACE_MEMORY)
            found = list(collect_traces(model, tokenized_batches(self.tokenizer, self.texts(split), MAX_TOKENS, 128)))
            model.sida.close()
            save_file(join_traces(found).tensors(), path.with_suffix(".partial"))
            path.with_suffix(".partial").rename(path)
        return Trace(**load_file(path))

    def predictors(self) -> dict[str, Any]:
        """The token table and the hash predictor, trained now if they are not in the folder."""
        folder = self.folder / "predictor"
        model = self.model("256MiB")
        if not (folder / "predictor.safetensors").is_file():
            train, validation = self.trace("train"), self.trace("validation")
            table_predictor(model, train).save_pretrained(folder / "token_table")
            options = TrainingOptions(epochs=self.epochs, batch_sentences=32, warmup=20, max_length=MAX_TOKENS)
            made = HashPredictor.for_model(model, options.variant, options.seed)
            trainer = Trainer(made, Memory(train), Memory(validation), options, self.folder / "training")
            trainer.run()
            trainer.finish().save_pretrained(folder)
            (folder / "history.json").write_text(json.dumps(trainer.history, indent=1) + "\n")
            trainer.file.unlink()
        found = {
            "token table": load_predictor(folder / "token_table", model),
            "hash predictor": load_predictor(folder, model),
        }
        model.sida.close()
        return found

    def hits(self, budgets: tuple[int, ...]) -> dict[str, Any]:
        """Hit rates on held-out sentences, how much of the experts a sentence touches, by its length, and memory."""
        trace = self.trace("held_out")
        found: dict[str, Any] = {
            "tokens": trace.input_ids.numel(),
            "train_tokens": self.trace("train").input_ids.numel(),
        }
        for name, predictor in self.predictors().items():
            summary = evaluate(predictor, [trace]).summary()
            found[name] = {key: summary[key] for key in ("top1", "top3", "mean_top1", "mean_top3", "mean_ece")}
        found["touched"] = touched(trace, self.experts)
        model = self.model("256MiB")
        found["memory"] = {str(budget): memory_of(model, budget) for budget in budgets}
        model.sida.close()
        return found

    def timings(self, budgets: tuple[int, ...], sentences: int, warm_up: int, rounds: int) -> dict[str, Any]:
        """Throughput and latency by budget and predictor, one sentence at a time, from a cold start.

        A budget is loaded once; between two rows all of its experts are given up. The rounds of a budget's rows are
        interleaved.
        """
        batches = self.batches(warm_up + sentences)
        predictors: dict[str, Any] = {"none": None, **self.predictors()}
        scale = {"sentences": sentences, "warm_up": warm_up, "rounds": rounds}
        # Kept budget by budget: a run that is cut off goes on after the last whole one. `forget_timings` ends that.
        kept = self.folder / "timings.json"
        known: dict[str, Any] = json.loads(kept.read_text()) if kept.is_file() else {}
        if known.get("scale") != scale:
            known = {"scale": scale, "rows": {}, "done": []}
        for budget in budgets:
            if budget in known["done"]:
                continue
            model = self.model(f"{budget}%")
            if "oracle" not in predictors:
                predictors["oracle"] = oracle_tables(model, batches)
            whole = model.sida.expert_memory
            rows: dict[str, list[dict[str, float]]] = {}
            for _ in range(rounds):
                for name in PREDICTORS:
                    model.sida.set_budget(model.sida.header.record_bytes)
                    model.sida.set_budget(whole)
                    rows.setdefault(f"{budget} {name}", []).append(timed(model, batches, predictors[name], warm_up))
            known["rows"] |= rows
            known["done"].append(budget)
            model.sida.close()
            kept.with_suffix(".partial").write_text(json.dumps(known))
            kept.with_suffix(".partial").replace(kept)
        return {"rows": known["rows"], **scale}

    def forget_timings(self) -> None:
        (self.folder / "timings.json").unlink(missing_ok=True)

    def transformers_row(self, sentences: int) -> dict[str, float] | None:
        """transformers' own model with every expert in memory, float32; None where the memory is not free for it."""
        model: Any
        sizes = json.loads((self.checkpoint() / "model.safetensors.index.json").read_text())
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) << 10
        # Twice the bf16 bytes, and the largest shard while it is read.
        files = {self.folder / "checkpoint" / name for name in sizes["weight_map"].values()}
        if 2 * sum(file.stat().st_size for file in files) + (3 << 30) > free:
            return None
        batches = self.batches(sentences)
        model = transformers.SwitchTransformersEncoderModel.from_pretrained(self.checkpoint(), dtype=torch.float32)
        model.eval()
        times = []
        with torch.inference_mode():
            for batch in [batches[0], *batches]:
                begin = time.perf_counter()
                model(**batch)
                times.append(time.perf_counter() - begin)
        times = times[1:]
        tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
        return {
            "tokens_per_s": tokens / sum(times),
            "median_ms": 1e3 * statistics.median(times),
            "p95_ms": 1e3 * sorted(times)[int(0.95 * (len(times) - 1))],
        }

    def batches(self, number: int) -> list[dict[str, Any]]:
        """Held-out sentences one by one, in a fixed random order."""
        tokenized = list(tokenized_batches(self.tokenizer, self.texts("held_out"), MAX_TOKENS, 1))
        order = torch.randperm(len(tokenized), generator=torch.Generator().manual_seed(0))[:number].tolist()
        return [{k: tokenized[n][k] for k in ("input_ids", "attention_mask")} for n in order]


def touched(trace: Trace, experts: int) -> dict[str, list[float]]:
    """By length of the sentence ("9-16"): number of sentences, and the share of a layer's experts that one touches."""
    bounds = [(1, 8), (9, 16), (17, 24), (25, 32), (33, 48), (49, 64)]
    shares: dict[tuple[int, int], list[float]] = {bound: [] for bound in bounds}
    first = 0
    for length in trace.length.tolist():
        chosen = trace.top1[first : first + length]
        first += length
        share = statistics.fmean(len(chosen[:, layer].unique()) / experts for layer in range(chosen.shape[1]))
        for low, high in bounds:
            if low <= length <= high:
                shares[low, high].append(share)
    return {f"{low}-{high}": [len(v), statistics.fmean(v)] for (low, high), v in shares.items() if v}


def timed(model: Any, batches: list[dict[str, Any]], predictor: Any, warm_up: int) -> dict[str, float]:
    """One run through `stream`; what is measured begins after `warm_up` batches."""
    stream: Iterator[Any] = sida_ext.stream(model, batches, predictor, drift=False)
    times = []
    begin = last = time.perf_counter()
    model.sida.reset_stats()
    for number, _ in enumerate(stream):
        now = time.perf_counter()
        times.append(now - last)
        last = now
        if number + 1 == warm_up:
            model.sida.reset_stats()
            begin = last = time.perf_counter()
    stats, times = model.sida.stats(), times[warm_up:]
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches[warm_up:])
    return {
        "tokens_per_s": tokens / (last - begin),
        "median_ms": 1e3 * statistics.median(times),
        "p95_ms": 1e3 * sorted(times)[int(0.95 * (len(times) - 1))],
        "stall_ms": 1e3 * stats.stall_seconds / len(times),
        "hit_rate": stats.hit_rate,
        "read_mb": stats.bytes_read / len(times) / 1e6,
    }


def memory_of(model: Any, budget: int) -> dict[str, float]:
    """Experts in memory at once under a budget of per cents, and bytes of weights in memory, of all that there are."""
    record, total = model.sida.header.record_bytes, model.sida.header.total_experts
    rest = sum(p.numel() * p.element_size() for p in model.parameters())
    slots = total * budget // 100
    return {"slots": slots, "experts": total, "used": slots * record + rest, "whole": total * record + rest}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experts", type=int, choices=EXPERTS)
    parser.add_argument("--until", choices=("traces", "predictors"), default="predictors")
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "paper")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shapes = BaseShapes(arguments.experts, arguments.work)
    started = time.perf_counter()
    for split in SENTENCES:
        shapes.trace(split)
        print(f"traced {split} after {time.perf_counter() - started:.0f} s", flush=True)
    if arguments.until == "predictors":
        print(json.dumps(shapes.hits((10, 25, 50, 100)), indent=1))


if __name__ == "__main__":
    main()
