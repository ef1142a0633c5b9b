"""Predicted beside measured: ``sida plan --verify`` over the configurations of docs/planning.md.

    python -m bench.planning.verify FOLDER [--switch-layers 4] [--causal-layers 4] [--json FILE]
    python -m bench.planning.verify FOLDER --moefit EXECUTABLE GGUF

FOLDER is for the checkpoints, made where they are missing: Switch-base-128's encoder and a decoder of Qwen3-30B-A3B's
shapes, each of a few layers. Stores go to a cache inside it, one at a time: each is removed when its rows are done.
Each configuration runs in a process of its own. Be alone on the machine: a prediction is from rates that are measured
before the load and after the run.

With ``--moefit`` the estimate of PyPI's moe-fit for a GGUF file of the same shapes is printed beside the rows; it reads
no other format.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Configuration:
    """One process: a model, the type of its experts, its budget and the tokens of a prompt."""

    model: str  # switch or causal
    dtype: str
    budget: str
    prompt: int


CONFIGURATIONS = (
    Configuration("switch", "bfloat16", "25%", 32),
    Configuration("switch", "bfloat16", "100%", 32),
    Configuration("switch", "int8", "25%", 32),
    Configuration("switch", "int8", "50%", 128),
    Configuration("switch", "int4", "50%", 32),
    Configuration("causal", "bfloat16", "25%", 128),
    Configuration("causal", "bfloat16", "50%", 128),
    Configuration("causal", "int8", "25%", 128),
    Configuration("causal", "int8", "100%", 128),
    Configuration("causal", "int4", "50%", 128),
)


def made(model: str, layers: int, folder: Path) -> Path:
    """The checkpoint, written if it is not there."""
    path = folder / f"{model}-{layers}"
    if (path / "model.safetensors.index.json").is_file():
        return path
    if model == "switch":
        from bench.engine.checkpoint import write_checkpoint

        write_checkpoint(128, path, layers)
    else:
        subprocess.run(
            [sys.executable, "-m", "bench.causal.checkpoint", str(path), "--layers", str(layers)],
            check=True,
            timeout=3600,
        )
    return path


def rows_of(configuration: Configuration, checkpoint: Path, cache: Path) -> list[dict[str, Any]]:
    """What ``sida plan --verify`` finds; one row for prompts, and one for steps of a model that decodes."""
    command = [sys.executable, "-m", "sida_ext.cli", "plan", str(checkpoint), "--verify", "--json"]
    command += ["--dtype", configuration.dtype, "--expert-memory", configuration.budget]
    command += ["--prompt", str(configuration.prompt)]
    environment = os.environ | {"SIDA_CACHE": str(cache)}
    run = subprocess.run(command, capture_output=True, text=True, timeout=3600, check=False, env=environment)
    if run.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {run.returncode}: {run.stderr.strip()[-500:]}")
    named = {"model": configuration.model, "dtype": configuration.dtype, "budget": configuration.budget}
    return [named | row for row in json.loads(run.stdout)]


def as_markdown(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| model | experts | budget | run | measured, tokens/s | predicted | | without its routing | "
        "hit rate: measured, predicted | MiB read a token: measured, predicted |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = row["predicted"]
        lines.append(
            f"| {row['model']} | {row['dtype']} | {row['budget']} | {row['what']} | {row['measured']:.3g} | "
            f"{low:.3g} to {high:.3g} | {'inside' if row['inside'] else 'outside'} | {row['unrecorded'][0]:.3g} to "
            f"{row['unrecorded'][1]:.3g} | {row['hit_rate']:.1%}, {row['predicted_hit_rate']:.1%} | "
            f"{row['disk_bytes_per_token'] / 2**20:.1f}, {row['predicted_disk_bytes'] / 2**20:.1f} |"
        )
    inside = sum(row["inside"] for row in rows)
    widest = max(row["predicted"][1] / row["predicted"][0] for row in rows)
    lines += ["", f"{inside} of {len(rows)} inside; the widest range's ends are {widest:.2f}x apart."]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--switch-layers", type=int, default=4)
    parser.add_argument("--causal-layers", type=int, default=4)
    parser.add_argument("--only", choices=("switch", "causal"), help="one of the models")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--moefit", nargs=2, metavar=("EXECUTABLE", "GGUF"), help="print moe-fit's plan of a GGUF file")
    arguments = parser.parse_args()
    if arguments.moefit:
        subprocess.run([arguments.moefit[0], "plan", arguments.moefit[1]], check=True, timeout=600)
        return
    rows: list[dict[str, Any]] = []
    cache = arguments.folder / "cache"
    for number, configuration in enumerate(CONFIGURATIONS):
        if arguments.only not in (None, configuration.model):
            continue
        layers = arguments.switch_layers if configuration.model == "switch" else arguments.causal_layers
        rows += rows_of(configuration, made(configuration.model, layers, arguments.folder), cache)
        print("\n".join(as_markdown(rows[-2 if configuration.model == "causal" else -1 :])[2:-2]), flush=True)
        following = CONFIGURATIONS[number + 1 : number + 2]
        if not following or (following[0].model, following[0].dtype) != (configuration.model, configuration.dtype):
            for store in cache.glob(f"*-{configuration.dtype}.sida"):
                store.unlink()
        if arguments.json:
            arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    print("\n".join(as_markdown(rows)))


if __name__ == "__main__":
    main()
