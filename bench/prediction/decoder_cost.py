"""What a predicted step costs beside a step of the decoder: ``python -m bench.prediction.decoder_cost``, a minute when
idle.

Two decoders in transformers, float32: the bundled denoiser's, and one of Switch-base's shapes with random weights, 12
blocks of which 6 are sparse. It has 8 experts in a layer: a row's step computes one of them however many there are. The
predictor's step is timed with its weights folded (decoder_step.py, as it is used) and as the network is written; naming
the experts to read ahead from its table is timed apart. Medians, one thread.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

from examples.train_demo_denoiser import DEMO_DENOISER
from sida_ext.prediction.moe_facts import stack_facts
from sida_ext.prediction.protocol import RecurrentPredictor, load_predictor

ROOT = Path(__file__).resolve().parents[2]

RESULTS = ROOT / "bench" / "results" / "decoder_cost.json"


def base_model() -> Any:
    """A decoder of base shapes; its encoder is dense, and no step runs it."""
    config = SwitchTransformersConfig(
        d_model=768, d_kv=64, d_ff=3072, num_heads=12, num_experts=8, vocab_size=32128, num_layers=12,
        num_sparse_encoder_layers=0, num_decoder_layers=12, num_sparse_decoder_layers=6, decoder_start_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return SwitchTransformersForConditionalGeneration(config).eval()


@torch.no_grad()
def measured(model: Any, predictor: RecurrentPredictor, rows: int, steps: int, source: int = 32) -> dict[str, float]:
    """Milliseconds of each part, medians over `steps` steps in which the parts take turns."""
    facts = stack_facts(model, "decoder")
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, facts.embedding.shape[0], (rows, steps + 2), generator=random)
    told = torch.randn(rows, source, facts.embedding.shape[1], generator=random)
    mask = torch.ones(rows, source, dtype=torch.int64)
    state, cache = predictor.start(told, mask), None
    folded = predictor._folded_step
    times: dict[str, list[float]] = {"step": [], "step, not folded": [], "naming experts": [], "decoder": []}

    def timed(name: str, call: Any) -> Any:
        begin = time.perf_counter()
        found = call()
        times[name].append(1e3 * (time.perf_counter() - begin))
        return found

    for token in tokens.split(1, dim=1):
        predictor._folded_step = lambda: predictor.net  # type: ignore[method-assign, assignment]
        timed("step, not folded", lambda t=token, s=state: predictor.step(s, t))
        predictor._folded_step = folded  # type: ignore[method-assign]
        table, state = timed("step", lambda t=token, s=state: predictor.step(s, t))
        timed(
            "naming experts",
            lambda t=table: t.experts_by_layer(predictor.experts, predictor.min_need),
        )
        output = timed(
            "decoder",
            lambda t=token, c=cache: facts.stack(
                input_ids=t, encoder_hidden_states=told, encoder_attention_mask=mask, cache=c, use_cache=True
            ),
        )
        cache = output.cache
    found = {name: statistics.median(values[2:]) for name, values in times.items()}
    found["share"] = found["step"] / found["decoder"]
    found["share with naming"] = (found["step"] + found["naming experts"]) / found["decoder"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    found: dict[str, Any] = {}
    bundled = SwitchTransformersForConditionalGeneration.from_pretrained(DEMO_DENOISER, dtype=torch.float32).eval()
    predictors: dict[str, tuple[Any, Any]] = {
        "bundled": (bundled, load_predictor(DEMO_DENOISER / "decoder_predictor", bundled))
    }
    big = base_model()
    for name, sizes in (("base shapes, width 160", {}), ("base shapes, width 160, one cell", {"cells": 1})):
        made = RecurrentPredictor.for_model(big, **sizes).eval().requires_grad_(False)
        predictors[name] = (big, made)
    for name, (model, predictor) in predictors.items():
        for rows in (1, 4):
            found[f"{name}, {rows}"] = measured(model, predictor, rows, arguments.steps)
            print(f"{name}, rows {rows}: {json.dumps(found[f'{name}, {rows}'])}", flush=True)
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
