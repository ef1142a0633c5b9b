"""moe-fit (PyPI), which answers the same question for llama.cpp, beside ``sida plan`` on the same shapes and memory.

    python -m venv PEER && PEER/bin/pip install moe-fit==0.1.0 gguf numpy
    python -m bench.planning.others CHECKPOINT PEER [--json FILE]

CHECKPOINT is one that ``bench.causal.checkpoint`` wrote; of it config.json and headers are read, as ``sida plan`` does.
moe-fit reads the index of a GGUF file alone, so one of its weights is written beside the checkpoint and removed when
the table is done: Q8_0, whose weights take as much as our int8. Both plan for the same three sizes of memory: of the
file's experts a quarter, a half and all, beside everything else. Neither runs the model: what is true is in the rows of
``bench.planning.verify``.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
from pathlib import Path
from typing import Any

import sida_ext
from sida_ext.experts.budget import format_bytes
from sida_ext.planning.capacity import experts_bytes
from sida_ext.planning.counting import count_experts
from sida_ext.planning.headers import read_headers

SHARES = (0.25, 0.5, 1.0)
KIND, DTYPE = "Q8_0", "int8"
CONTEXT = 4096
SPARE = 1.02  # with all experts in memory, some bytes more than the file has


def estimate(peer: Path, file: Path, memory: int) -> dict[str, Any]:
    """moe-fit's own answer as JSON, for a machine with ``memory`` bytes and no GPU."""
    command = [str(peer / "bin" / "moefit"), "plan", str(file), "--disk", str(file.parent), "--json"]
    command += ["--ram-gb", f"{memory / 1e9:.4f}", "--vram-gb", "0", "--context", str(CONTEXT), "--kv-bits", "16"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    try:
        return json.loads(run.stdout)
    except json.JSONDecodeError:
        raise SystemExit(
            f"{' '.join(command)} ended with {run.returncode} and printed no JSON: "
            f"{(run.stderr or run.stdout).strip()[-500:]}"
        ) from None


def written(checkpoint: Path, peer: Path) -> Path:
    """A GGUF file of the checkpoint's shapes."""
    file = checkpoint.parent / f"{checkpoint.name}-{KIND}.gguf"
    command = [str(peer / "bin" / "python"), "-m", "bench.causal.peer", "write", str(checkpoint)]
    subprocess.run([*command, str(file), "--kind", KIND], check=True, timeout=1800)
    return file


def rows(checkpoint: Path, peer: Path, file: Path) -> list[dict[str, Any]]:
    facts = count_experts(read_headers(checkpoint))
    found = []
    for share in SHARES:
        ours = sida_ext.plan(
            checkpoint, dtype=DTYPE, expert_memory=f"{share:.0%}", context=CONTEXT, measure=share == SHARES[0]
        )
        memory = round(SPARE * (ours.other_bytes + ours.kv_bytes + share * experts_bytes(facts, DTYPE)))
        found.append({"share": share, "memory": memory, "ours": ours.to_dict(), "moefit": estimate(peer, file, memory)})
    return found


def said(answer: dict[str, Any]) -> str:
    """The speed of its answer: a range that may end with infinity, or the reason for none."""
    placement = answer["placement"]
    speeds = placement.get("tokens_per_second_estimate")
    if not speeds:
        return placement.get("reason") or "none given"
    return f"{speeds[0]:.3g} to {'no end' if math.isinf(speeds[1]) else format(speeds[1], '.3g')}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("peer", type=Path, help="the environment with moe-fit and gguf")
    parser.add_argument("--json", type=Path, help="write both answers here, whole")
    arguments = parser.parse_args()
    file = written(arguments.checkpoint, arguments.peer)
    try:
        found = rows(arguments.checkpoint, arguments.peer, file)
    finally:
        file.unlink()
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    print("| experts in memory | memory | decode, tokens/s: sida plan | moe-fit |\n|---|---|---|---|")
    for row in found:
        low, high = row["ours"]["decode_tokens_per_s"]
        print(
            f"| {row['share']:.0%} | {format_bytes(row['memory'])} | {low:.3g} to {high:.3g} | {said(row['moefit'])} |"
        )


if __name__ == "__main__":
    main()
