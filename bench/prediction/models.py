"""Two more models, trained here, and their predictors: another number of experts, another kind of text.

    python -m bench.prediction.models               # some ten minutes on 2 idle cores; Ctrl-C and run again to go on
    python -m bench.prediction.models --only        # writes the section again from the figures that are recorded

Models and predictors go to out/predictor_models and are not bundled; the figures go to
bench/results/predictor_models.json and a section of docs/predictor_figures.md. Each model reads one of the corpus's two
kinds of text; the other kind is the foreign domain of its predictor's figures.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from bench.prediction.quality import traced, write
from examples.corpus import MAX_TOKENS, SOURCES, load_sentences
from examples.grouped_experts import grouped_experts
from examples.train_demo_model import Training, argument_parser
from sida_ext.models.classification import SwitchTransformersForSequenceClassification
from sida_ext.prediction.protocol import load_predictor
from sida_ext.training.distill import TrainingOptions, train_predictor
from sida_ext.training.evaluation import evaluate

ROOT = Path(__file__).resolve().parents[2]

RESULTS = ROOT / "bench" / "results" / "predictor_models.json"
# name -> (source of the text, arguments of examples/train_demo_model.py)
MODELS = {
    "64 experts, d_model 64, movie reviews": (
        "movie",
        "--experts 64 --d-model 64 --layers 4 --vocab 4000 --label-epochs 2",
    ),
    "16 experts, d_model 96, editorials": (
        "editorial",
        "--experts 16 --d-model 96 --layers 6 --vocab 4000 --label-epochs 3",
    ),
}
PREDICTOR_EPOCHS = 2
OUT = ROOT / "out" / "predictor_models"


def folder_of(name: str, out: Path) -> Path:
    return out / name.split(",")[0].replace(" ", "_")


def trained_model(name: str, out: Path, threads: int) -> Path:
    """The folder of the model, trained now if it is not there."""
    folder = folder_of(name, out)
    if (folder / "model" / "config.json").is_file():
        return folder / "model"
    source, given = MODELS[name]
    work = folder / "work"
    arguments = argument_parser().parse_args([*given.split(), "--source", source, "--work", str(work)])
    arguments.resume = (work / "last.pt").is_file()
    torch.set_num_threads(threads)
    work.mkdir(parents=True, exist_ok=True)
    training = Training(work, arguments)
    if arguments.resume:
        training.load()
    training.run()
    training.model.load_state_dict(torch.load(work / "best.pt"))
    training.model.eval().to(torch.bfloat16).save_pretrained(folder / "partial")
    training.tokenizer.save_pretrained(folder / "partial")
    (folder / "partial").rename(folder / "model")
    return folder / "model"


def measured(name: str, out: Path, threads: int) -> dict[str, Any]:
    source = MODELS[name][0]
    path = trained_model(name, out, threads)
    model = SwitchTransformersForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    predictor_folder = folder_of(name, out) / "predictor"
    if not (predictor_folder / "report.json").is_file():
        with grouped_experts():
            train_predictor(
                model,
                tokenizer,
                [s.text for s in load_sentences("train", source)],
                predictor_folder,
                TrainingOptions(epochs=PREDICTOR_EPOCHS, max_length=MAX_TOKENS),
                held_out_texts=[s.text for s in load_sentences("held_out", source)],
            )
    report = json.loads((predictor_folder / "report.json").read_text())
    found: dict[str, Any] = {
        "training_tokens": report["tokens"]["train"],
        "parameters": report["network"]["parameters"],
        "layers": report["network"]["layers"],
        "confident": report["confident"],
    }
    own, other = source, next(s for s in SOURCES if s != source)
    for text in (own, other):
        trace = traced(model, tokenizer, "held_out", 800, text)
        for label, predictor in (
            ("token_table", load_predictor(predictor_folder / "token_table", model)),
            ("predictor", load_predictor(predictor_folder, model)),
        ):
            summary = evaluate(predictor, [trace]).summary()
            del summary["reliability"]
            found[f"{label} on {'own' if text == own else 'other'}"] = summary
    return found


def rendered(known: dict[str, Any]) -> list[str]:
    lines = [
        "Held-out sentences (at most 800 of each kind), means over the MoE layers and by layer; predictors of the "
        f"default form, {PREDICTOR_EPOCHS} passes, seed 0. The oracle with full context is the router itself: 1 by "
        "definition.",
        "",
        "| model | text | table top-1 / top-3 | predictor top-1 / top-3 | fewer top-1 errors | fewer top-3 errors |",
        "|---|---|---|---|---|---|",
    ]
    layers = ["", "| model | text | layer | table top-1 / top-3 | predictor top-1 / top-3 |", "|---|---|---|---|---|"]
    for name, found in known.items():
        for text, kind in (("own", "of the same kind"), ("other", "of the other kind")):
            table, ours = found[f"token_table on {text}"], found[f"predictor on {text}"]
            fewer = [1 - (1 - ours[k]) / (1 - table[k]) for k in ("mean_top1", "mean_top3")]
            lines.append(
                f"| {name} | {kind} | {table['mean_top1']:.4f} / {table['mean_top3']:.4f} | "
                f"{ours['mean_top1']:.4f} / {ours['mean_top3']:.4f} | {fewer[0]:.1%} | {fewer[1]:.1%} |"
            )
            for layer in range(found["layers"]):
                cells = [f"{part['top1'][layer]:.4f} / {part['top3'][layer]:.4f}" for part in (table, ours)]
                layers.append(f"| {name} | {kind} | {layer} | {cells[0]} | {cells[1]} |")
    return [*lines, *layers]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    started = time.perf_counter()
    known = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for name in arguments.only:
        known[name] = measured(name, arguments.out, arguments.threads)
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(known, indent=1) + "\n")
    lines = rendered({name: known[name] for name in MODELS if name in known})
    write(ROOT / "docs", {"More models": lines}, {}, time.perf_counter() - started)


if __name__ == "__main__":
    main()
