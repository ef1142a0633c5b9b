"""Every family of the installed transformers that uses the experts seam, served and compared: ``python -m
bench.causal.families`` writes docs/families.md.

A tiny random model of each family (bench/causal/tiny_families.py, from its configuration class, no download) is saved,
packed, loaded with sida_ext at a quarter of its experts and compared with transformers' own, eager experts in float32.
"""

from __future__ import annotations

import argparse
import re
import shutil
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

import sida_ext
from bench.causal.tiny_families import FAMILIES, tiny_model
from sida_ext.models.layers import swapped_layers

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "families.md"
BOUND = 1e-4  # of the largest logit
DECORATOR = re.compile(r"^@use_experts_implementation", re.M)


@dataclass(frozen=True)
class Row:
    """One family; ``error`` is the largest difference of logits over the largest logit, None where it does not run."""

    family: str
    model: str
    folder: str
    error: float | None
    gate: str = ""
    experts: str = ""
    layout: str = ""
    why: str = ""

    @property
    def runs(self) -> bool:
        return self.error is not None and self.error <= BOUND


def seam_folders() -> set[str]:
    """Folders of transformers/models whose modeling files use the decorator, counted in the installed source."""
    models = Path(transformers.__file__).parent / "models"
    return {
        file.parent.name
        for file in models.glob("*/modeling_*.py")
        if DECORATOR.search(file.read_text(encoding="utf-8"))
    }


def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(0)  # a diffusion model begins with noise
    output = model(input_ids=ids)
    found = getattr(output, "logits", None)
    return found if found is not None else output[0]


def serve(family: str, folder: Path) -> Row:
    """Pack, load and compare one family; what it raises becomes the row's reason."""
    chosen = FAMILIES[family]
    place = chosen.folder or family
    try:
        _, model = tiny_model(family)
        model = model.float().eval()
        model.save_pretrained(folder)
        model.set_experts_implementation("eager")
        ids = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            expected = logits_of(model, ids)
            served = sida_ext.from_pretrained(
                folder,
                expert_memory="25%",
                expert_dtype="float32",
                dtype=torch.float32,
                store_cache=folder / "store",
                model_class=type(model),
            )
            with served.sida as runtime:
                found = logits_of(served, ids)
                layers: list[Any] = swapped_layers(served)
                header = runtime.header
                gates = {layer.formula or "the module's own function" for layer in layers}
                error = float((found - expected).abs().max() / expected.abs().max())
    except Exception as error_of_family:  # a row of the table, printed with its reason
        reason = f"{type(error_of_family).__name__}: {error_of_family}".splitlines()[0]
        return Row(family, chosen.model, place, None, why=reason[:160])
    top_k = ", ".join(map(str, header.top_k)) or "?"
    return Row(
        family,
        chosen.model,
        place,
        error,
        gate=", ".join(sorted(gates)) + (", biases" if header.biased else ""),
        experts=f"{len(header.layers)} x {header.num_experts}, top-{top_k}",
        layout=header.layout,
        why="" if error <= BOUND else f"differs by {error:.1e} of the largest logit",
    )


def page(rows: list[Row], folders: set[str]) -> str:
    run = {row.folder for row in rows if row.runs}
    missing = sorted(folders - {row.folder for row in rows})
    lines = [
        "# Families",
        "",
        f"Written by `python -m bench.causal.families` with transformers {transformers.__version__} and torch "
        f"{torch.__version__}: a tiny random model of each family, packed and served with a quarter of its experts in "
        "memory, float32, beside transformers' own with eager experts.",
        "",
        f"**{len(run & folders)} of the {len(folders)} folders of `transformers/models` that use the experts seam "
        "run.** *Difference*: the largest of logits, over the largest logit. *Gate*: the kernel's formula, found by "
        "asking module and kernel; where no kernel computes it, the module's own function runs between two matrix "
        "products.",
        "",
        "| family | class | runs | difference | gate | layers x experts | how its checkpoint holds experts |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        difference = "" if row.error is None else f"{row.error:.1e}"
        state = "yes" if row.runs else f"no: {row.why}"
        cells = (row.family, row.model, state, difference, row.gate, row.experts, row.layout)
        lines.append(f"| {' | '.join(cells)} |")
    if missing:
        lines += ["", f"Not tried (no tiny model is made of them yet): {', '.join(missing)}."]
    lines += [
        "",
        "Switch Transformers has a swap of its own. Refused by name, as their experts do not go through the seam: "
        "NLLB-MoE (transformers' own model runs two of its experts only, whatever the router chooses), DBRX, JetMoe, "
        "Llama4, LongCat-Flash, Step3.7.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="only these, printed and not written")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    rows: list[Row] = []
    for family in options.families or FAMILIES:
        folder = Path(tempfile.mkdtemp(prefix="family-"))
        try:
            rows.append(serve(family, folder))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        print(f"{family}: {'runs' if rows[-1].runs else rows[-1].why} {rows[-1].gate}", flush=True)
    if not options.families:
        PAGE.write_text(page(rows, seam_folders()))


if __name__ == "__main__":
    main()
