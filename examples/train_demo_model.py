"""Train the demo's Switch classifier from scratch on the bundled sentences and write it to examples/demo_model.

    python -m examples.train_demo_model                 # five minutes on 2 idle cores
    python -m examples.train_demo_model --resume        # go on after an interruption
    python -m examples.train_demo_model --export-only   # write the best model so far

It learns the ratings and, at the same time, denoises: masked and unmasked tokens are both predicted from the encoder's
output, with tied embeddings. Predicting the unmasked tokens too keeps each token's identity in the residual stream,
which is what makes routing follow the token. The model is chosen on the validation split alone; the figures are those
of the rounded (bfloat16) weights, on both splits.
"""

import argparse
import copy
import json
import math
import random
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoTokenizer, SwitchTransformersConfig
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersAttention

from examples.corpus import DEMO_MODEL, MAX_TOKENS, SOURCES, Sentence, load_sentences, train_tokenizer
from examples.grouped_experts import grouped_experts
from examples.routing_report import routing_report, trace
from sida_ext.models.classification import SwitchTransformersForSequenceClassification, masked_mean

SEED = 20240
TOKENS_PER_BATCH = 2048
DENOISE_EPOCHS, LABEL_EPOCHS = 0, 3
PATIENCE = 2  # labelled epochs without a better validation accuracy before the run stops
MASK_SHARE = 0.15
UNMASKED_SHARE = 0.2  # of the unmasked tokens, so many are predicted: the vocabulary's softmax is the dear part
# Weights of the terms in the labelled phase. The gradient of the masked tokens is large and, on so little text, mostly
# noise: at full weight it drowns the labels' in Adam's scaling of the embeddings. The unmasked tokens are soon solved.
LABEL, MASKED, UNMASKED = 2.0, 0.03, 0.6
BALANCE, Z_LOSS = 0.01, 0.0003
# A rating near 0 says little about the sign: the target is the sigmoid of the rating, this much sharpened.
RATING_SHARPNESS = 1.5
FAST = 10.0  # learning rate of embeddings and head, relative to the others'
AVERAGING = 0.99  # exponential average of the weights over steps of the labelled phase


def make_config(vocab_size: int, d_model: int = 128, layers: int = 8, experts: int = 32) -> SwitchTransformersConfig:
    return SwitchTransformersConfig(
        vocab_size=vocab_size,
        d_model=d_model,
        d_kv=32,
        d_ff=2 * d_model,
        num_heads=4,
        num_layers=layers,
        num_sparse_encoder_layers=layers // 2,
        num_decoder_layers=2,
        num_sparse_decoder_layers=1,
        num_experts=experts,
        expert_capacity=64,
        router_jitter_noise=0.0,
        dropout_rate=0.1,
        is_encoder_decoder=False,
        decoder_start_token_id=0,
        num_labels=2,
        id2label={0: "negative", 1: "positive"},
        label2id={"negative": 0, "positive": 1},
    )


@torch.no_grad()
def initialise(model: SwitchTransformersForSequenceClassification) -> None:
    """Branches that start small beside the embeddings let the token dominate the residual stream, and router logits
    near 1 leave the balancing loss a gradient."""
    model.shared.weight.normal_(std=1.0)
    for name, weight in model.encoder.named_parameters():
        if name.endswith((".o.weight", ".wo.weight")):
            weight.mul_(0.2)
        elif "router.classifier" in name:
            weight.mul_(model.config.d_model**-0.5)


class Batches:
    """Sentences as padded batches of about TOKENS_PER_BATCH tokens, of similar lengths, in a new order each epoch."""

    def __init__(self, tokenizer, sentences: list[Sentence]):
        self.ids = tokenizer([s.text for s in sentences], truncation=True, max_length=MAX_TOKENS)["input_ids"]
        self.target = [1 / (1 + math.exp(-RATING_SHARPNESS * s.mean)) for s in sentences]
        self.movie = [float(s.source == "movie") for s in sentences]

    def epoch(self, rng: random.Random) -> list[dict[str, torch.Tensor]]:
        order = sorted(range(len(self.ids)), key=lambda i: len(self.ids[i]) + rng.uniform(0, 4))
        groups, group = [], []
        for i in order:
            if group and (len(group) + 1) * max(len(self.ids[j]) for j in [*group, i]) > TOKENS_PER_BATCH:
                groups.append(group)
                group = []
            group.append(i)
        groups.append(group)
        rng.shuffle(groups)
        return [self.collate(group) for group in groups]

    def collate(self, rows: list[int]) -> dict[str, torch.Tensor]:
        width = max(len(self.ids[i]) for i in rows)
        ids = torch.tensor([self.ids[i] + [0] * (width - len(self.ids[i])) for i in rows])
        return {
            "input_ids": ids,
            "attention_mask": (ids != 0).long(),
            "target": torch.tensor([self.target[i] for i in rows]),
            "movie": torch.tensor([self.movie[i] for i in rows]),
        }


def balance_loss(router_logits: tuple[torch.Tensor, ...], real: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Switch's load balancing loss (arXiv 2101.03961, section 2.2) and z-loss over the tokens that are not padding."""
    balance = z = torch.zeros(())
    for layer in router_logits:
        logits = layer[real]
        experts = logits.shape[-1]
        share = F.one_hot(logits.argmax(-1), experts).float().mean(0)
        balance = balance + experts * (share * logits.softmax(-1).mean(0)).sum()
        z = z + logits.logsumexp(-1).square().mean()
    return balance / len(router_logits), z / len(router_logits)


def losses(model, scale: torch.Tensor, batch: dict[str, torch.Tensor], mask_id: int) -> dict[str, torch.Tensor]:
    """Every term of the objective for one batch, each a scalar."""
    ids, attention = batch["input_ids"], batch["attention_mask"]
    real = attention.bool()
    masked = real & (torch.rand(ids.shape) < MASK_SHARE)
    encoded = model.encoder(
        input_ids=ids.masked_fill(masked, mask_id), attention_mask=attention, output_router_logits=True
    )
    hidden = encoded.last_hidden_state

    def denoise(where: torch.Tensor) -> torch.Tensor:
        if not bool(where.any()):
            return hidden.new_zeros(())
        return F.cross_entropy(hidden[where] @ model.shared.weight.T * scale, ids[where])

    logits = model.classifier(model.dropout(masked_mean(hidden, attention)))
    log_probs = logits.log_softmax(-1)
    soft = -(batch["target"] * log_probs[:, 1] + (1 - batch["target"]) * log_probs[:, 0])
    weight = 0.3 + 0.7 * batch["movie"]
    balance, z = balance_loss(encoded.router_logits, real)
    return {
        "masked": denoise(masked),
        "unmasked": denoise(real & ~masked & (torch.rand(ids.shape) < UNMASKED_SHARE)),
        "label": (soft * weight).sum() / weight.sum(),
        "balance": balance,
        "z": z,
    }


@torch.no_grad()
def classify(model, tokenizer, sentences: list[Sentence], batch_size: int = 64) -> torch.Tensor:
    """Logits [sentences, 2] in the given order."""
    model.eval()
    rows = []
    for start in range(0, len(sentences), batch_size):
        texts = [s.text for s in sentences[start : start + batch_size]]
        batch = tokenizer(texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        rows.append(model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits)
    return torch.cat(rows)


def accuracy(logits: torch.Tensor, sentences: list[Sentence]) -> float:
    labels = torch.tensor([s.label for s in sentences])
    return (logits.argmax(-1) == labels).float().mean().item()


class Training:
    """One run: both phases, a checkpoint after each epoch, the best averaged weights beside it."""

    def __init__(self, work: Path, arguments: argparse.Namespace):
        self.work = work
        self.arguments = arguments
        train = load_sentences("train", arguments.source)
        # Trained once a run: a model is of no use with another tokenizer's numbers.
        if arguments.resume or arguments.export_only:
            if not (work / "tokenizer").is_dir():
                raise FileNotFoundError(
                    f"{work} holds no run to go on from: expected {work / 'tokenizer'}; start afresh"
                )
            self.tokenizer = AutoTokenizer.from_pretrained(work / "tokenizer")
        else:
            self.tokenizer = train_tokenizer([s.text for s in train], arguments.vocab)
            self.tokenizer.save_pretrained(work / "tokenizer")
        self.batches = Batches(self.tokenizer, train)
        self.validation = load_sentences("validation", arguments.source or "movie")
        torch.manual_seed(SEED)
        self.model = SwitchTransformersForSequenceClassification(
            make_config(len(self.tokenizer), arguments.d_model, arguments.layers, arguments.experts)
        )
        initialise(self.model)
        self.scale = nn.Parameter(torch.tensor(0.15))
        self.average: list[torch.Tensor] | None = None
        self.epoch, self.best, self.waited = 0, 0.0, 0
        # A word is seen a few times an epoch, a weight of a layer at every step: the embeddings take longer steps.
        fast = [self.model.shared.weight, self.model.classifier.weight]
        slow = [p for p in self.model.parameters() if p.ndim == 2 and all(p is not other for other in fast)]
        plain = [p for p in self.model.parameters() if p.ndim != 2] + [self.scale]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": slow, "weight_decay": 0.05, "factor": 1.0},
                {"params": fast, "weight_decay": 0.02, "factor": FAST},
                {"params": plain, "weight_decay": 0.0, "factor": 1.0},
            ],
            lr=arguments.lr,
            betas=(0.9, 0.98),
            fused=True,
        )

    def set_dropout(self, rate: float) -> None:
        """Dropout of embeddings, experts, pooled output. That of attention and of residual branches is left out: its
        random numbers would take a fifth of the training time."""
        for module in self.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = rate
            elif isinstance(module, SwitchTransformersAttention):
                module.dropout = 0.0
        for block in self.model.encoder.block:
            for layer in block.layer:
                layer.dropout.p = 0.0

    def rate(self, epoch: int, done: float) -> float:
        """Learning rate as a share of its peak: warm-up, then a cosine for each phase."""
        first, second = self.arguments.denoise_epochs, self.arguments.label_epochs
        step, length = (epoch + done, first) if epoch < first else (epoch + done - first, second)
        return min(1.0, step / 0.5 + 0.01) * (0.5 + 0.5 * math.cos(math.pi * min(1.0, step / length)))

    def run(self) -> None:
        total = self.arguments.denoise_epochs + self.arguments.label_epochs
        with grouped_experts():
            while self.epoch < total and self.waited < PATIENCE:
                self.one_epoch()
                self.epoch += 1
                self.save()

    def one_epoch(self) -> None:
        labelled = self.epoch >= self.arguments.denoise_epochs
        self.set_dropout(0.2 if labelled else 0.1)
        # Seeded by the epoch, so that a resumed run goes the same way.
        rng = random.Random(SEED + self.epoch)
        torch.manual_seed(SEED + self.epoch)
        batches = self.batches.epoch(rng)
        sums: dict[str, float] = {}
        started = time.monotonic()
        self.model.train()
        parameters = list(self.model.parameters())
        for index, batch in enumerate(batches):
            share = self.rate(self.epoch, index / len(batches))
            for group in self.optimizer.param_groups:
                group["lr"] = self.arguments.lr * share * group["factor"]
            terms = losses(self.model, self.scale, batch, self.tokenizer.mask_token_id)
            label, masked, unmasked = (LABEL, MASKED, UNMASKED) if labelled else (0.0, 1.0, 1.0)
            total = label * terms["label"] + masked * terms["masked"] + unmasked * terms["unmasked"]
            total = total + BALANCE * terms["balance"] + Z_LOSS * terms["z"]
            self.optimizer.zero_grad()
            total.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            self.optimizer.step()
            if labelled:
                with torch.no_grad():
                    if self.average is None:
                        self.average = [p.detach().clone() for p in parameters]
                    torch._foreach_lerp_(self.average, [p.detach() for p in parameters], 1 - AVERAGING)
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + value.item()
            if index % 50 == 49:
                spent = time.monotonic() - started
                so_far = sums["label"] / (index + 1)
                print(f"  epoch {self.epoch} step {index + 1}/{len(batches)} {spent:.0f} s {so_far:.4f}", flush=True)
        record = {"epoch": self.epoch, "phase": "labels" if labelled else "denoise"}
        record |= {name: round(value / len(batches), 4) for name, value in sums.items()}
        record["seconds"] = round(time.monotonic() - started, 1)
        if labelled:
            model = self.averaged()
            logits = classify(model, self.tokenizer, self.validation)
            record["validation_accuracy"] = round(accuracy(logits, self.validation), 4)
            labels = torch.tensor([s.label for s in self.validation])
            record["validation_loss"] = round(F.cross_entropy(logits, labels).item(), 4)
            self.waited += 1
            if record["validation_accuracy"] > self.best:
                self.best, self.waited = record["validation_accuracy"], 0
                torch.save(model.state_dict(), self.work / "best.pt")
        print(json.dumps(record), flush=True)
        with (self.work / "log.jsonl").open("a") as log:
            log.write(json.dumps(record) + "\n")

    def averaged(self) -> SwitchTransformersForSequenceClassification:
        model = copy.deepcopy(self.model)
        with torch.no_grad():
            for target, value in zip(model.parameters(), self.average, strict=True):
                target.copy_(value)
        return model

    def save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "scale": self.scale.data,
            "optimizer": self.optimizer.state_dict(),
            "average": self.average,
            "epoch": self.epoch,
            "best": self.best,
            "waited": self.waited,
        }
        torch.save(state, self.work / "last.pt.tmp")
        (self.work / "last.pt.tmp").replace(self.work / "last.pt")

    def load(self) -> None:
        state = torch.load(self.work / "last.pt")
        self.model.load_state_dict(state["model"])
        self.scale.data = state["scale"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.average, self.epoch = state["average"], state["epoch"]
        self.best, self.waited = state["best"], state["waited"]


def export(training: Training, out: Path) -> None:
    """Write the best model in bfloat16, load it again with transformers alone, and measure what was written."""
    model = training.model
    model.load_state_dict(torch.load(training.work / "best.pt"))
    training.set_dropout(model.config.dropout_rate)
    model.eval().to(torch.bfloat16).save_pretrained(out)
    training.tokenizer.save_pretrained(out)
    log = (training.work / "log.jsonl").read_text()
    (out / "training_log.jsonl").write_text(log)

    model = SwitchTransformersForSequenceClassification.from_pretrained(out, dtype=torch.float32).eval()
    some = load_sentences("held_out", "movie")
    logits = classify(model, training.tokenizer, some)
    with grouped_experts():
        grouped = classify(model, training.tokenizer, some)
    editorial = load_sentences("held_out", "editorial")
    validation = training.validation
    with grouped_experts():
        other = {
            name: accuracy(classify(model, training.tokenizer, sentences), sentences)
            for name, sentences in (("validation_movie", validation), ("held_out_editorial", editorial))
        }
    known = trace(model, training.tokenizer, load_sentences("train"))
    epochs = [json.loads(line) for line in log.splitlines()]
    metrics = {
        "what": "the stored (bfloat16) weights, computed in float32 by transformers' own modules",
        "parameters": sum(p.numel() for p in model.parameters()),
        "file_bytes": (out / "model.safetensors").stat().st_size,
        "training_seconds": round(sum(epoch["seconds"] for epoch in epochs)),
        "accuracy": {
            "validation_movie": other["validation_movie"],
            "held_out_movie": accuracy(logits, some),
            "held_out_editorial": other["held_out_editorial"],
        },
        "majority_class": {
            "validation_movie": majority(validation),
            "held_out_movie": majority(some),
            "held_out_editorial": majority(editorial),
        },
        "sentences": {
            "validation_movie": len(validation),
            "held_out_movie": len(some),
            "held_out_editorial": len(editorial),
        },
        "largest_difference_from_training_forward": (grouped - logits).abs().max().item(),
        "routing": {
            name: routing_report(model, training.tokenizer, known, sentences)
            for name, sentences in (("held_out_movie", some), ("held_out_editorial", editorial))
        },
    }
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    print(json.dumps(metrics, indent=2))


def majority(sentences: list[Sentence]) -> float:
    positive = sum(s.label for s in sentences) / len(sentences)
    return max(positive, 1 - positive)


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DEMO_MODEL, help="where the model goes")
    parser.add_argument("--work", type=Path, default=Path("out/demo_training"), help="where the checkpoints go")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--export-only", action="store_true", help="train no further, write the best model so far")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--vocab", type=int, default=6000)
    parser.add_argument("--d-model", type=int, default=128)
    parser.add_argument("--layers", type=int, default=8, help="blocks, every second with experts")
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--source", choices=SOURCES, default=None, help="sentences to learn from; default: all")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--denoise-epochs", type=int, default=DENOISE_EPOCHS)
    parser.add_argument("--label-epochs", type=int, default=LABEL_EPOCHS)
    return parser


def main() -> None:
    arguments = argument_parser().parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)
    training = Training(arguments.work, arguments)
    if arguments.resume:
        training.load()
    elif not arguments.export_only:
        (arguments.work / "log.jsonl").unlink(missing_ok=True)
    if not arguments.export_only:
        training.run()
    export(training, arguments.out)


if __name__ == "__main__":
    main()
