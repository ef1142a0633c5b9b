"""Perplexity of language models whose routers are replaced by predictions, beside that of their own routers.

    python -m bench.paper.predicted_language                     # all held-out sentences; some minutes on one core
    python -m bench.paper.predicted_language --sentences 300

Two models. The masked language model of bench/paper/masked_language.py (trained before, or now): every feed-forward
layer of its encoder is an MoE layer, and its tokens are guessed. The bundled denoiser (span prediction, one MoE layer
in the encoder and three in the decoder): the next token under teacher forcing. Tables come from predictors that are
trained here, the decoder's from the bundled RecurrentPredictor: over a whole row at once it computes what it computes
step by step in `generate`. A table decides where its probability reaches the threshold: 0 is routing="predicted",
above 1 the router. Two controls, experts chosen by chance and no experts at all, say how much of a perplexity hangs on
the experts.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, SwitchTransformersForConditionalGeneration

from bench.paper import masked_language
from bench.prediction.quality import Memory, table_predictor
from examples.corpus import load_sentences
from examples.grouped_experts import grouped_experts
from examples.train_demo_decoder_predictor import damaged_pairs
from examples.train_demo_denoiser import DEMO_DENOISER, MAX_TOKENS, SEED, batches
from sida_ext.prediction.hash_predictor import HashPredictor
from sida_ext.prediction.hash_table import HashTable
from sida_ext.prediction.moe_facts import stack_facts
from sida_ext.prediction.protocol import load_predictor
from sida_ext.training.evaluation import evaluate
from sida_ext.training.objective import TrainingOptions
from sida_ext.training.routing_curve import confident_routers, routing_curve
from sida_ext.training.traces import Trace, collect_traces, join_traces
from sida_ext.training.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]

THRESHOLDS = (0.0, 0.5, 0.7, 0.9, 0.97)
CONTROLS = {"experts by chance": 1.0, "no experts": 0.0}  # scale of the predicted factors
RESULTS = ROOT / "bench" / "results" / "predicted_language.json"


class Control:
    """What a wrong table costs: another predictor's scaling factors on experts chosen by chance, or no factors at all.

    A model that hardly uses its experts keeps its perplexity with any table; these two rows say how much there is to
    lose.
    """

    def __init__(self, predictor: Any, experts: int, scale: float) -> None:
        self.predictor, self.experts, self.scale = predictor, experts, scale
        self.random = torch.Generator().manual_seed(0)

    def predict(self, *arguments: Any, **named: Any) -> HashTable:
        table = self.predictor.predict(*arguments, **named)
        drawn = torch.randint(0, self.experts, table.expert_index.shape, generator=self.random, dtype=torch.int32)
        index = torch.where(table.expert_index >= 0, drawn, -1)
        return HashTable(index, table.gate * self.scale)


def encoder_predictors(model: Any, inputs: list[list[int]], epochs: int) -> dict[str, Any]:
    """A HashPredictor and a token table of the model's encoder, trained here on the rows of token ids `inputs`."""
    rows = random.Random(0).sample(inputs, len(inputs))

    def traced(part: list[list[int]]) -> Trace:
        part = sorted(part, key=len)
        groups = [part[n : n + 64] for n in range(0, len(part), 64)]
        padded = [torch.tensor([[*row, *([0] * (len(group[-1]) - len(row)))] for row in group]) for group in groups]
        given = [{"input_ids": ids, "attention_mask": (ids != 0).long()} for ids in padded]
        return join_traces(list(collect_traces(model, given)))

    train, validation = traced(rows[len(rows) // 10 :]), traced(rows[: len(rows) // 10])
    options = TrainingOptions(epochs=epochs, batch_sentences=32, warmup=20, max_length=MAX_TOKENS)
    made = HashPredictor.for_model(model, options.variant, options.seed)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(made, Memory(train), Memory(validation), options, Path(folder) / "checkpoint")
        trainer.run(progress=False)
        return {"trained": trainer.finish(), "token table": table_predictor(model, train)}


@torch.no_grad()
def perplexity(
    model: Any,
    given: list[dict[str, Any]],
    encoder: tuple[Any, float] | None = None,
    decoder: tuple[Any, float] | None = None,
) -> dict[str, float]:
    """Perplexity of the next token, the share of right ones, and what the tables decided.

    Args:
        given: batches of `train_demo_denoiser.batches`.
        encoder, decoder: a predictor and the threshold from which its table decides; None: the model's routers.

    Returns:
        perplexity and accuracy of all tokens; `damaged` and `shown`, perplexities of those; by_table, the share of the
        choices of the stacks with a predictor that the tables made.
    """
    facts = {name: stack_facts(model, name) for name in ("encoder", "decoder")}
    wanted = {"encoder": encoder, "decoder": decoder}
    loss, right, hidden = [], [], []
    by_table = choices = 0.0
    opened = {n: confident_routers(facts[n]) if wanted[n] is not None else nullcontext({}) for n in facts}
    with grouped_experts(), opened["encoder"] as in_encoder, opened["decoder"] as in_decoder:
        state = {"encoder": in_encoder, "decoder": in_decoder}

        def decide(name: str, table: Any, real: Any) -> None:
            nonlocal by_table, choices
            threshold = wanted[name][1]  # type: ignore[index]
            state[name].update(table=table, threshold=threshold, chosen=[])
            sure = (table.probability if table.probability is not None else table.gate)[..., 0] >= threshold
            by_table += float(sure[real].sum())
            choices += float(sure[real].numel())

        for batch in given:
            real, mask = batch["labels"] != 0, batch["attention_mask"]
            if encoder is not None:
                decide("encoder", encoder[0].predict(batch["input_ids"], mask), mask.bool())
            told = model.encoder(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
            read = F.pad(batch["labels"][:, :-1], (1, 0))
            # Real tokens, as `generate` reads them; the start token has the id of padding.
            if decoder is not None:
                present = torch.cat([torch.ones_like(real[:, :1]), real[:, :-1]], dim=1) & real
                decide("decoder", decoder[0].predict(read, present.long(), 1, told, mask), present)
            states = model.decoder(
                input_ids=read, encoder_hidden_states=told, encoder_attention_mask=mask, use_cache=False
            ).last_hidden_state[real]
            logits, label = model.lm_head(states * model.config.d_model**-0.5), batch["labels"][real]
            loss.append(F.cross_entropy(logits, label, reduction="none"))
            right.append(logits.argmax(-1) == label)
            hidden.append(batch["hidden"][real])
    losses, damaged = torch.cat(loss), torch.cat(hidden)
    return {
        "perplexity": float(losses.mean().exp()),
        "accuracy": float(torch.cat(right).float().mean()),
        "shown": float(losses[~damaged].mean().exp()),
        "damaged": float(losses[damaged].mean().exp()),
        "by_table": by_table / choices if choices else 0.0,
        "tokens": losses.numel(),
    }


def with_ratios(found: dict[str, Any]) -> dict[str, Any]:
    for row in found.values():
        row["ratio"] = row["perplexity"] / found["router"]["perplexity"]
    return found


def denoiser(sentences: int | None, predictor: Path, train_sentences: int = 2000) -> dict[str, Any]:
    """Rows of the bundled denoiser: name -> what `perplexity` found, and its ratio to the router's."""
    model = SwitchTransformersForConditionalGeneration.from_pretrained(DEMO_DENOISER, dtype=torch.float32).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(DEMO_DENOISER)
    texts = [s.text for s in load_sentences("held_out")]
    if sentences is not None:
        texts = random.Random(0).sample(texts, min(sentences, len(texts)))
    rows = tokenizer(texts, truncation=True, max_length=MAX_TOKENS)["input_ids"]
    given = batches(rows, tokenizer.mask_token_id, random.Random(SEED))
    sources = [source for source, _ in damaged_pairs(tokenizer, "train")]
    with grouped_experts():
        encoders = encoder_predictors(model, random.Random(0).sample(sources, train_sentences), 2)
    trained: Any = load_predictor(predictor, model)
    table: Any = load_predictor(predictor / "token_table", model)
    found: dict[str, Any] = {"router": perplexity(model, given)}
    found["encoder predicted"] = perplexity(model, given, encoder=(encoders["trained"], 0.0))
    for threshold in THRESHOLDS:
        name = "predicted" if threshold == 0 else f"confident from {threshold}"
        found[name] = perplexity(model, given, (encoders["trained"], threshold), (trained, threshold))
    found["predicted, token table"] = perplexity(model, given, (encoders["token table"], 0.0), (table, 0.0))
    for name, scale in CONTROLS.items():
        controls = [Control(p, model.config.num_experts, scale) for p in (encoders["trained"], trained)]
        found[name] = perplexity(model, given, (controls[0], 0.0), (controls[1], 0.0))
    return with_ratios(found)


def masked(sentences: int | None, folder: Path, epochs: int = 8, train_sentences: int | None = 2500) -> dict[str, Any]:
    """Rows of the masked language model, which is trained now if `folder` does not hold it.

    Each has perplexity of the guessed tokens, its ratio to the router's, by_table and, from
    `routing_curve`, transfers_saved; `hits` is of the predictors on the same held-out sentences.
    """
    record = masked_language.train(folder, epochs)
    model = masked_language.load(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(DEMO_DENOISER)

    def prepared(split: str, number: int | None) -> list[dict[str, Any]]:
        rows = masked_language.rows_of(tokenizer, split)
        if number is not None:
            rows = random.Random(0).sample(rows, min(number, len(rows)))
        return masked_language.masked_batches(rows, tokenizer.mask_token_id, len(tokenizer), 0)

    given = prepared("held_out", sentences)
    train = prepared("train", train_sentences)
    inputs = [ids[m].tolist() for b in train for ids, m in zip(b["input_ids"], b["attention_mask"].bool(), strict=True)]
    with grouped_experts():
        predictors = encoder_predictors(model.encoder_model, inputs, 4)
        traces = list(collect_traces(model.encoder_model, given))
        hits = {name: evaluate(predictor, traces).summary() for name, predictor in predictors.items()}
        curve = routing_curve(predictors["trained"], model.encoder_model, traces, 48, (*THRESHOLDS, 2.0))
    saved = {point["threshold"]: point for point in curve}
    facts = stack_facts(model.encoder_model)

    def row(predictor: Any = None, threshold: float = 2.0) -> dict[str, float]:
        """`predictor` decides from `threshold` on; None: the routers."""
        losses, sure, tokens = [], 0.0, 0
        with grouped_experts(), confident_routers(facts) as state:
            for batch in given:
                if predictor is not None:
                    table = predictor.predict(batch["input_ids"], batch["attention_mask"])
                    state.update(table=table, threshold=threshold, chosen=[])
                    probability = table.chance[..., 0]
                    real = batch["attention_mask"].bool()
                    sure, tokens = (
                        sure + float((probability[real] >= threshold).sum()),
                        tokens + probability[real].numel(),
                    )
                losses.append(masked_language.guess_losses(model, [batch]))
        every = torch.cat(losses)
        found = {"perplexity": float(every.mean().exp()), "tokens": every.numel()}
        return {**found, "by_table": sure / tokens if tokens else 0.0}

    found: dict[str, Any] = {"router": row()}
    for threshold in THRESHOLDS:
        name = "predicted" if threshold == 0 else f"confident from {threshold}"
        found[name] = row(predictors["trained"], threshold)
        found[name]["transfers_saved"] = saved[threshold]["transfers_saved"]
    found["predicted, token table"] = row(predictors["token table"], 0.0)
    for name, scale in CONTROLS.items():
        found[name] = row(Control(predictors["trained"], facts.experts, scale), 0.0)
    with_ratios(found)
    return {
        "rows": found,
        "hits": {n: {k: h[k] for k in ("top1", "top3", "mean_top1", "mean_top3", "mean_ece")} for n, h in hits.items()},
        "training": record["epochs"],
        "train_tokens": sum(map(len, inputs)),
        "layers": facts.layers,
        "experts": facts.experts,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sentences", type=int, default=None, help="held-out sentences; default: all")
    parser.add_argument("--predictor", type=Path, default=DEMO_DENOISER / "decoder_predictor")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    found = {
        "masked": masked(arguments.sentences, masked_language.FOLDER),
        "denoiser": denoiser(arguments.sentences, arguments.predictor),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    for name, row in [*found["masked"]["rows"].items(), *found["denoiser"].items()]:
        print(f"{name:32s} perplexity {row['perplexity']:.3f} ratio {row['ratio']:.3f} by table {row['by_table']:.1%}")


if __name__ == "__main__":
    main()
