"""What each part of a predictor is worth: the paper's form, one addition at a time, the shadow, the loss's settings.

    python -m bench.prediction.ablation                     # goes on where it stopped; one or two minutes for each row
    python -m bench.prediction.ablation --seeds 0 1 2       # more seeds for the same rows
    python -m bench.prediction.ablation --only paper shadow # some rows

Every row is trained from the same traces and judged on the same held-out sentences. The forms are all trained by one
rule with one optimiser: at most FORM_PASSES passes, ended by PATIENCE passes without a better validation loss, the best
weights kept. The settings of the loss are compared on the shadow, in SETTING_PASSES passes; the "short" rows are the
forms in as many passes, which ranks additions for less. Results go to
bench/results/predictor_ablation.json after each row, and from there into a section of docs/predictor_figures.md. The
rows see a part of the training sentences: they rank, and none of them is as good as the same form trained on all.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from bench.prediction.quality import Memory, table_predictor, traced, write
from sida_ext.models.classification import SwitchTransformersForSequenceClassification
from sida_ext.prediction.nets import _MASKED, sparsemax
from sida_ext.prediction.protocol import HashPredictor, TokenTablePredictor
from sida_ext.training.evaluation import evaluate
from sida_ext.training.objective import TrainingOptions
from sida_ext.training.traces import Trace
from sida_ext.training.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]

RESULTS = ROOT / "bench" / "results" / "predictor_ablation.json"
HIDDEN = 128


class AblatedNet(nn.Module):
    """The paper's network with additions that can be switched on; without any it is PaperNet.

    It reads rows of the model's embeddings to which `prepared` has added columns: the token id, how often the token
    table saw it, and the table's log probabilities.

    Args:
        both_directions: the LSTM runs both ways, each half as wide.
        kernel: width of a depthwise convolution before the LSTM; 0: none.
        conditioned: a layer's head sees the prediction of the layer before it.
        prior: the table's log probabilities are added to the logits, the less the seldomer the token was seen.
        own_embeddings: learns embeddings of its own instead of reading the model's.
    """

    def __init__(
        self,
        d_model: int,
        layers: int,
        experts: int,
        vocabulary: int,
        hidden: int = HIDDEN,
        both_directions: bool = False,
        kernel: int = 0,
        conditioned: bool = False,
        prior: bool = False,
        own_embeddings: bool = False,
    ) -> None:
        super().__init__()
        self.d_model, self.layers, self.experts = d_model, layers, experts
        self.own = nn.Embedding(vocabulary, d_model) if own_embeddings else None
        self.reduce = nn.Linear(d_model, hidden)
        self.conv = nn.Conv1d(hidden, hidden, kernel, padding=kernel // 2, groups=hidden) if kernel else None
        width = hidden // 2 if both_directions else hidden
        self.lstm = nn.LSTM(hidden, width, num_layers=2, batch_first=True, bidirectional=both_directions)
        self.heads = nn.ModuleList(nn.Linear(hidden, experts) for _ in range(layers))
        self.carry = nn.ModuleList(
            nn.Linear(experts, hidden, bias=False) for _ in range(layers - 1 if conditioned else 0)
        )
        self.trust = nn.Parameter(torch.tensor([[0.0, 0.5]] * layers)) if prior else None

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        x, token, seen, prior = x.split([self.d_model, 1, 1, self.layers * self.experts], dim=-1)
        if self.own is not None:
            x = self.own(token[..., 0].long())
        x = F.relu(self.reduce(x))
        if self.conv is not None:
            x = x + self.conv((x * real[..., None]).transpose(1, 2)).transpose(1, 2)
        if self.lstm.bidirectional:  # must not begin in the padding
            length = real.sum(1).clamp(min=1).cpu()
            packed = nn.utils.rnn.pack_padded_sequence(x, length, batch_first=True, enforce_sorted=False)
            state, _ = nn.utils.rnn.pad_packed_sequence(self.lstm(packed)[0], batch_first=True, total_length=x.shape[1])
        else:
            state, _ = self.lstm(x)
        scores = state @ state.transpose(1, 2) * state.shape[-1] ** -0.5
        state = state + sparsemax(scores.masked_fill(~real[:, None, :], _MASKED)) @ state
        logits: list[Tensor] = []
        for layer, head in enumerate(self.heads):
            if layer and len(self.carry):
                state = state + self.carry[layer - 1](logits[-1].softmax(-1))
            found = head(state)
            if self.trust is not None:
                share = torch.sigmoid(self.trust[layer, 0] + self.trust[layer, 1] * torch.log1p(seen))
                found = found + share * prior.unflatten(-1, (self.layers, self.experts))[..., layer, :]
            logits.append(found)
        return torch.stack(logits, dim=2)


FORM_PASSES, SETTING_PASSES, PATIENCE = 24, 4, 3
FORM: dict[str, Any] = {"batch_sentences": 16}
_ALL_FOUR = {"prior": True, "both_directions": True, "kernel": 5, "conditioned": True}

# name -> (what AblatedNet switches on, or None for the shadow; sizes of the shadow; training options; passes)
ROWS: dict[str, tuple[dict[str, Any] | None, dict[str, Any], dict[str, Any], int]] = {
    "paper": ({}, {}, FORM, FORM_PASSES),
    "paper, lambda = 0.1": ({}, {}, {**FORM, "top1_weight": 0.1}, FORM_PASSES),
    "paper, own embeddings": ({"own_embeddings": True}, {}, FORM, FORM_PASSES),
    "paper + token prior": ({"prior": True}, {}, FORM, FORM_PASSES),
    "paper + both directions": ({"both_directions": True}, {}, FORM, FORM_PASSES),
    "paper + convolution": ({"kernel": 5}, {}, FORM, FORM_PASSES),
    "paper + layer on layer": ({"conditioned": True}, {}, FORM, FORM_PASSES),
    "paper + all four": (_ALL_FOUR, {}, FORM, FORM_PASSES),
    "shadow at half width": (None, {"hidden": 64}, FORM, FORM_PASSES),
    "shadow": (None, {}, FORM, FORM_PASSES),
    "short: paper": ({}, {}, FORM, SETTING_PASSES),
    "short: paper, own embeddings": ({"own_embeddings": True}, {}, FORM, SETTING_PASSES),
    "short: paper + token prior": ({"prior": True}, {}, FORM, SETTING_PASSES),
    "short: paper + both directions": ({"both_directions": True}, {}, FORM, SETTING_PASSES),
    "short: paper + convolution": ({"kernel": 5}, {}, FORM, SETTING_PASSES),
    "short: paper + layer on layer": ({"conditioned": True}, {}, FORM, SETTING_PASSES),
    "short: paper + all four": (_ALL_FOUR, {}, FORM, SETTING_PASSES),
    "setting: T = 30, lambda = 0.005, temperature = 1": (None, {}, FORM, SETTING_PASSES),
    "setting: T = 3": (None, {}, {**FORM, "truncation": 3}, SETTING_PASSES),
    "setting: T = 10": (None, {}, {**FORM, "truncation": 10}, SETTING_PASSES),
    "setting: lambda = 0": (None, {}, {**FORM, "top1_weight": 0.0}, SETTING_PASSES),
    "setting: lambda = 0.1": (None, {}, {**FORM, "top1_weight": 0.1}, SETTING_PASSES),
    "setting: lambda = 1": (None, {}, {**FORM, "top1_weight": 1.0}, SETTING_PASSES),
    "setting: temperature = 0.5": (None, {}, {**FORM, "temperature": 0.5}, SETTING_PASSES),
    "setting: temperature = 2": (None, {}, {**FORM, "temperature": 2.0}, SETTING_PASSES),
}


def prepared(embedding: Tensor, table: TokenTablePredictor) -> Tensor:
    """The model's embeddings with the columns that AblatedNet reads beside them."""
    token = torch.arange(embedding.shape[0])
    prior = table.probabilities(token).clamp(min=1e-6).log().flatten(1)
    return torch.cat([embedding.float(), token[:, None].float(), table.seen(token)[:, None].float(), prior], dim=1)


def train_row(model: Any, traces: dict[str, Trace], table: TokenTablePredictor, name: str, seed: int) -> dict[str, Any]:
    switches, sizes, given, passes = ROWS[name]
    options = TrainingOptions(
        variant="shadow" if switches is None else "paper",
        net=sizes,
        epochs=passes,
        patience=PATIENCE,
        warmup=50,
        seed=seed,
        **given,
    )
    made = HashPredictor.for_model(model, options.variant, seed, **sizes)
    if switches is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made.net = AblatedNet(
                made.embedding.shape[1], made.layers, made.experts, made.embedding.shape[0], **switches
            )
        made.embedding = prepared(made.embedding, table)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(made, Memory(traces["train"]), Memory(traces["validation"]), options, Path(folder) / "c")
        history = trainer.run(progress=False)
        predictor = trainer.finish()
    summary = evaluate(predictor, [traces["held_out"]]).summary()
    return {
        "parameters": predictor.parameter_count(),
        "top1": summary["mean_top1"],
        "top3": summary["mean_top3"],
        "ece": summary["mean_ece"],
        "gate_error": statistics.fmean(summary["gate_error"]),
        "passes": len(history),
        "validation_loss": min(entry["validation_loss"] for entry in history),
        "last_gain": history[-2]["validation_loss"] - history[-1]["validation_loss"],
    }


def rendered(known: dict[str, Any]) -> list[str]:
    sizes, table = known["sizes"], known["token_table"]
    lines = [
        f"{sizes['train_tokens']:,} training tokens, LSTM forms {HIDDEN} wide; {sizes['held_out_tokens']:,} held-out "
        f"tokens; means over the MoE layers and over seeds, ± half the range. Forms: at most {FORM_PASSES} passes, "
        f"ended by {PATIENCE} without a better validation loss. Settings of the loss: the shadow in {SETTING_PASSES} "
        "passes; short: the forms in as many, far from their end. Fewer errors: than the token table of the same "
        "training tokens.",
        "",
        "| predictor | seeds | passes | parameters | top-1 | top-3 | fewer top-1 errors | fewer top-3 errors | ECE | "
        "gate error |",
        "|---|---|---|---|---|---|---|---|---|---|",
        f"| token table | | | | {table['top1']:.4f} | {table['top3']:.4f} | | | {table['ece']:.4f} | "
        f"{table['gate_error']:.4f} |",
    ]
    for name in ROWS:
        runs = [run for key, run in known["rows"].items() if key.split("#")[0] == name]
        if not runs:
            continue
        mean = {field: statistics.fmean(run[field] for run in runs) for field in runs[0]}
        fewer = [1 - (1 - mean[k]) / (1 - table[k]) for k in ("top1", "top3")]

        def shown(field: str, runs: list[Any] = runs) -> str:
            values = [run[field] for run in runs]
            spread = f" ± {(max(values) - min(values)) / 2:.4f}" if len(values) > 1 else ""
            return f"{statistics.fmean(values):.4f}{spread}"

        lines.append(
            f"| {name} | {len(runs)} | {mean['passes']:.0f} | {mean['parameters']:,.0f} | {shown('top1')} | "
            f"{shown('top3')} | {fewer[0]:.1%} | {fewer[1]:.1%} | {mean['ece']:.4f} | {mean['gate_error']:.4f} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "examples" / "demo_model")
    parser.add_argument("--only", nargs="*", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1])
    parser.add_argument("--sentences", type=int, default=2500, help="training sentences")
    parser.add_argument("--held-out", type=int, default=800, help="held-out sentences")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = SwitchTransformersForSequenceClassification.from_pretrained(arguments.model, dtype=torch.float32).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(arguments.model)
    started = time.perf_counter()
    sentences = {"train": arguments.sentences, "validation": 300, "held_out": arguments.held_out}
    traces = {split: traced(model, tokenizer, split, number) for split, number in sentences.items()}
    table = table_predictor(model, traces["train"])
    sizes = {
        "model_fingerprint": table.model_fingerprint,
        "train_tokens": traces["train"].input_ids.numel(),
        "held_out_tokens": traces["held_out"].input_ids.numel(),
        "passes": [FORM_PASSES, SETTING_PASSES, PATIENCE],
    }
    known = json.loads(arguments.results.read_text()) if arguments.results.is_file() else {}
    if known.get("sizes") != sizes:  # of another model or other sizes: nothing of it can be compared
        summary = evaluate(table, [traces["held_out"]]).summary()
        found = {"top1": summary["mean_top1"], "top3": summary["mean_top3"], "ece": summary["mean_ece"]}
        found["gate_error"] = statistics.fmean(summary["gate_error"])
        known = {"sizes": sizes, "token_table": found, "rows": {}}
    for seed in arguments.seeds:
        for name in arguments.only:
            if f"{name}#{seed}" in known["rows"]:
                continue
            known["rows"][f"{name}#{seed}"] = row = train_row(model, traces, table, name, seed)
            print(f"{name}, seed {seed}: {json.dumps(row)}", flush=True)
            arguments.results.parent.mkdir(parents=True, exist_ok=True)
            partial = arguments.results.with_suffix(".partial")
            partial.write_text(json.dumps(known, indent=1) + "\n")
            partial.replace(arguments.results)
    write(arguments.docs, {"Ablation": rendered(known)}, {}, time.perf_counter() - started)


if __name__ == "__main__":
    main()
