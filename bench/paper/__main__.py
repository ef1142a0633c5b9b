"""The tables of the SiDA-MoE paper, ours: the published numbers beside those of models trained here.

    python -m bench.paper                   # docs/paper.md and .png; goes on after what is already measured
    python -m bench.paper --fresh           # measures everything anew: what `make paper` does
    python -m bench.paper --stages language base-8          # some stages; --list names them
    python -m bench.paper --part prepare    # the stages that may share the machine; --part timings: those that may not
    python -m bench.paper --smoke           # a few sentences and small shapes: does it run at all

Each stage's figures are kept in bench/results/paper.json, with the seconds that it took; the page is
written from them. The published numbers are those of arXiv 2310.18859 (one A100 with 80 GB, batch 1, Switch-base).
The models trained here are small, base shapes have random weights, and experts are on a disk and computed on a CPU:
what can be compared is the shape of a curve and not its height, and a sentence under each table says what differs.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers

from bench.paper import bundled as paper_bundled
from bench.paper import predicted_language
from bench.paper.base import EPOCHS, SENTENCES, BaseShapes
from bench.paper.figure import draw
from bench.paper.tables import page
from bench.prediction import models as predictor_models
from sida_ext.files import written_whole

ROOT = Path(__file__).resolve().parents[2]

WORK = ROOT / "out" / "paper"


@dataclass(frozen=True)
class Scale:
    """How much is run.

    Attributes:
        fidelity, sparsity, timed: held-out sentences of the bundled model; language: of each language model, None: all.
        rounds: of the bundled model's timings; base_rounds, base_timed: of the base shapes', and their sentences.
        base: numbers of experts of the base shapes; blocks: of their encoder. base_sentences: that are traced.
        train: whether the masked language model is trained; else it is left out.
    """

    fidelity: int
    sparsity: int
    timed: int
    rounds: int
    language: int | None
    base: tuple[int, ...]
    base_sentences: dict[str, int]
    base_timed: int
    base_rounds: int
    budgets: tuple[int, ...] = (10, 25, 50, 100)
    blocks: int = 12
    epochs: int = EPOCHS
    train: bool = True


FULL = Scale(1563, 1563, 60, 2, 400, (8, 64, 128), SENTENCES, 12, 1)
SMOKE = Scale(
    8,
    40,
    4,
    1,
    8,
    (8,),
    {"train": 12, "validation": 4, "held_out": 6},
    2,
    1,
    (25, 100),
    blocks=4,
    epochs=1,
    train=False,
)


class Paper:
    """The stages: each method's result is what paper.json keeps of it."""

    def __init__(self, scale: Scale, work: Path) -> None:
        self.scale, self.work = scale, work
        self.stages: dict[str, tuple[str, Callable[[], Any]]] = {
            "models": ("prepare", self.models),
            "fidelity": ("prepare", lambda: paper_bundled.fidelity(self.bundled, scale.fidelity)),
            "sparsity": ("prepare", lambda: paper_bundled.sparsity(self.bundled, scale.sparsity, scale.budgets)),
            "language": ("prepare", self.language),
        }
        for experts in scale.base:
            self.stages[f"base-{experts}"] = (
                "prepare",
                lambda experts=experts: self.shapes(experts).hits(scale.budgets),
            )
        self.stages["time bundled"] = ("timings", self.time_bundled)
        for experts in scale.base:
            self.stages[f"time base-{experts}"] = ("timings", lambda experts=experts: self.time_base(experts))

    @cached_property
    def bundled(self) -> paper_bundled.Bundled:
        return paper_bundled.Bundled()

    def shapes(self, experts: int) -> BaseShapes:
        scale = self.scale
        return BaseShapes(experts, self.work, scale.base_sentences, scale.epochs, scale.blocks)

    def models(self) -> dict[str, Any]:
        """Hit rates of the bundled model and, as recorded by its last run, of those of bench/prediction/models.py."""
        found = {"bundled, 32 experts, 4 MoE layers": self.bundled.report["held_out"]}
        for name, known in json.loads(predictor_models.RESULTS.read_text()).items():
            rows = {"predictor": known["predictor on own"], "token_table": known["token_table on own"]}
            found[f"{name}, {known['layers']} MoE layers"] = rows
        return {n: {w: {k: r[k] for k in ("mean_top1", "mean_top3")} for w, r in v.items()} for n, v in found.items()}

    def language(self) -> dict[str, Any]:
        sentences, folder = self.scale.language, predicted_language.DEMO_DENOISER / "decoder_predictor"
        found: dict[str, Any] = {
            "denoiser": predicted_language.denoiser(sentences, folder, 2000 if self.scale.train else 60)
        }
        if self.scale.train:
            found["masked"] = predicted_language.masked(sentences, predicted_language.masked_language.FOLDER)
        return found

    def time_bundled(self) -> dict[str, Any]:
        return paper_bundled.timings(self.bundled, self.scale.budgets, self.scale.timed, self.scale.rounds)

    def time_base(self, experts: int) -> dict[str, Any]:
        shapes, scale = self.shapes(experts), self.scale
        found = shapes.timings(scale.budgets, scale.base_timed, min(3, scale.base_timed), scale.base_rounds)
        found["transformers"] = shapes.transformers_row(scale.base_timed)
        shapes.forget_timings()
        return found


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="seconds: does it run at all")
    parser.add_argument(
        "--fresh", action="store_true", help="forget what was measured and trained for this page before"
    )
    parser.add_argument("--stages", nargs="+", help="only these, measured anew")
    parser.add_argument("--part", choices=("prepare", "timings"), help="only the stages of this part")
    parser.add_argument("--list", action="store_true", help="name the stages and what is known of each")
    parser.add_argument("--base", nargs="+", type=int, help="numbers of experts of the base shapes; default 8 64 128")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    parser.add_argument("--record", type=Path, default=ROOT / "bench" / "results" / "paper.json")
    parser.add_argument("--work", type=Path, default=WORK, help="checkpoints, traces and predictors of the base shapes")
    arguments = parser.parse_args(given)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    record = arguments.record
    if arguments.fresh:
        record.unlink(missing_ok=True)
        shutil.rmtree(arguments.work, ignore_errors=True)
        shutil.rmtree(predicted_language.masked_language.FOLDER, ignore_errors=True)
    scale = SMOKE if arguments.smoke else FULL
    if arguments.base:
        scale = replace(scale, base=tuple(arguments.base))
    # As JSON has it, to be compared with what was kept; which base shapes there are is in the stages' names.
    scale_found = {k: v for k, v in json.loads(json.dumps(asdict(scale))).items() if k != "base"}
    known: dict[str, Any] = json.loads(record.read_text()) if record.is_file() else {}
    if known.get("scale") != scale_found:
        known = {"scale": scale_found, "stages": {}}
    paper = Paper(scale, arguments.work)
    if arguments.list:
        for name, (part, _) in paper.stages.items():
            done = known["stages"].get(name)
            took = "to do" if done is None else f"{done['seconds']:.0f} s"
            print(f"{name:16s} {part:8s} {took}")
        return
    unknown = set(arguments.stages or ()) - set(paper.stages)
    if unknown:
        parser.error(f"there is no stage {', '.join(sorted(unknown))}; known: {', '.join(paper.stages)}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, (part, measure) in paper.stages.items():
        if arguments.part not in (None, part) or (arguments.stages and name not in arguments.stages):
            continue
        if name in known["stages"] and not arguments.stages:
            continue
        print(f"{name} ...", flush=True)
        started = time.perf_counter()
        data = measure()
        seconds = time.perf_counter() - started
        # Read again: another part may have run beside this one.
        if record.is_file() and (other := json.loads(record.read_text()))["scale"] == scale_found:
            known = other
        known["stages"][name] = {"seconds": seconds, "data": data}
        with written_whole(record) as partial:
            partial.write_text(json.dumps(known, indent=1) + "\n")
        print(f"{name}: {seconds:.0f} s", flush=True)
    missing = [name for name in paper.stages if name not in known["stages"]]
    if missing:
        print(f"to do: {', '.join(missing)}")
    done = [name for name in paper.stages if name in known["stages"]]
    found = {name: known["stages"][name]["data"] for name in done}
    seconds = {name: known["stages"][name]["seconds"] for name in done}
    chosen = (" --smoke" if arguments.smoke else "") + (
        f" --base {' '.join(map(str, scale.base))}" if arguments.base else ""
    )
    (arguments.out / "paper.md").write_text(page(found, seconds, list(paper.stages), chosen))
    draw(arguments.out / "paper.png", found)
    print(f"{arguments.out / 'paper.md'}: {sum(seconds.values()):.0f} s in all")


if __name__ == "__main__":
    main()
