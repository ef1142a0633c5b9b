"""Prediction on three models, from the text to the figures: ``python -m bench.causal.models STAGE --model NAME``.

    python -m bench.causal.models train --model few       # goes on where it was interrupted
    python -m bench.causal.models fit --model few         # its predictors
    python -m bench.causal.models measure --model few     # coverage, prompts on the clock, grid, lookahead, overlap

The bundled language model has 6 layers of 32 experts, top-4; ``few`` (Qwen3-MoE) 4 of 16, top-3; ``domains`` (OLMoE)
5 of 64, top-2, trained with a reward for windows that keep to few experts, so that literature and documentation use
different ones, as the domains of large models do. Each stage is one process after the other on one thread; what they
print goes to the screen, the figures to ``--work``/NAME/figures. Nothing here takes the time of this machine but
``--engine``, which adds the runs of the engine itself, plain and with slower reads.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from examples.train_demo_language_model import DEMO_LANGUAGE_MODEL

MODELS = ("bundled", "few", "domains")
COMMON = [
    "--characters",
    "2500000",
    "--vocab",
    "2048",
    "--d-model",
    "64",
    "--length",
    "256",
    "--batch",
    "8",
    "--eval-tokens",
    "10000",
    "--table-tokens",
    "16384",
    "--steps",
    "400",
]
SHAPES = {
    "few": ["--family", "qwen3_moe", "--layers", "4", "--experts", "16", "--top-k", "3", "--width", "64"],
    "domains": ["--layers", "5", "--experts", "64", "--top-k", "2", "--width", "32", "--information", "4.0"],
}
FIT = ["--passages", "500", "--held-out", "60", "--seconds", "240", "--lr", "1e-3"]
TOKENS = 12  # of the prompts of which a small model does not want nearly every expert


def commands(stage: str, name: str, work: Path, engine: bool) -> Iterator[list[str]]:
    """What is run, as arguments of ``python -m``."""
    home = work / name
    model = DEMO_LANGUAGE_MODEL if name == "bundled" else home / "model"
    predictor, figures = home / "predictor", home / "figures"
    if stage == "train" and name != "bundled":
        going_on = ["--resume"] if (home / "last.pt").is_file() else []
        yield ["examples.train_demo_language_model", *COMMON, *SHAPES[name], *going_on, *both(work=home, out=model)]
    if stage == "fit":
        yield ["examples.train_demo_language_predictor", *FIT, *both(model=model, out=predictor)]
    if stage == "measure":
        here = both(model=model, predictor=predictor)
        short = ["--tokens", str(TOKENS)]
        if not engine:
            yield ["bench.causal.prompts", *here, *short, *both(out=figures / "clock.json")]
            yield ["bench.causal.prompts", *here, *short, "--grid", *both(out=figures / "grid.json")]
            yield ["bench.causal.lookahead", *both(model=model, out=figures / "lookahead.json")]
            yield ["bench.causal.overlap", *here, *both(out=figures / "overlap.json")]
            return
        yield ["bench.causal.prompts", *here, *short, "--engine", *both(out=figures / "engine.json")]
        slow = ["--engine", "--delay", "0.5"]
        yield ["bench.causal.prompts", *here, *short, *slow, *both(out=figures / "engine_slow.json")]


def both(**paths: Path) -> list[str]:
    return [part for name, path in paths.items() for part in (f"--{name}", str(path))]


def coverage(report: dict[str, Any]) -> str:
    """Rows for the table of docs/predictor.md."""
    held_out = report["held_out"]
    lines = []
    for name in ("token_table", "predictor"):
        row = held_out[name]
        lines.append(
            f"| {name.replace('_', ' ')} | {shares(row['among_k'])} | {mean(row['among_k']):.1%} "
            f"| {shares(row['among_2k'])} | {mean(row['among_2k']):.1%} | {row['mean_ece']:.3f} |"
        )
    for key in ("among_k", "among_2k"):
        missed = [1 - mean(held_out[name][key]) for name in ("token_table", "predictor")]
        lines.append(f"missed {key}: {1 - missed[1] / missed[0]:.0%} fewer than the token table")
    return "\n".join(lines)


def shares(of_layers: list[float]) -> str:
    return ", ".join(f"{100 * share:.1f}" for share in of_layers)


def mean(of_layers: list[float]) -> float:
    return sum(of_layers) / len(of_layers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("train", "fit", "measure"))
    parser.add_argument("--model", choices=MODELS, nargs="+", default=MODELS)
    parser.add_argument("--work", type=Path, default=Path("out/models"))
    parser.add_argument("--engine", action="store_true", help="with measure: real runs alone, on an idle machine")
    arguments = parser.parse_args()
    failed = []
    for name in arguments.model:
        (arguments.work / name / "figures").mkdir(parents=True, exist_ok=True)
        for command in commands(arguments.stage, name, arguments.work, arguments.engine):
            print("python -m", *command, flush=True)
            if subprocess.run([sys.executable, "-m", *command], check=False).returncode:
                failed.append(" ".join(command))
        if arguments.stage == "measure" and not arguments.engine:
            report = json.loads((arguments.work / name / "predictor" / "report.json").read_text())
            print(f"{name}\n{coverage(report)}", flush=True)
    if failed:
        raise SystemExit("failed: " + "; ".join(failed))


if __name__ == "__main__":
    main()
