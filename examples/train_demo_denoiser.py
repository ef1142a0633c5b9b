"""Train a small Switch encoder-decoder from scratch to restore damaged sentences; write it to examples/demo_denoiser.

    python -m examples.train_demo_denoiser                 # some minutes on one core
    python -m examples.train_demo_denoiser --resume        # go on after an interruption
    python -m examples.train_demo_denoiser --export-only   # write the last checkpoint

The encoder reads a sentence in which spans of one to three tokens are replaced by one <mask> each; the decoder writes
the whole sentence. It also learns, with a small weight, to name the token that it has just read: that keeps the token's
identity in the residual stream, which is what makes routing follow the token. The figures are those of the rounded
(bfloat16) weights on held-out sentences, beside a unigram model of the training sentences.
"""

import argparse
import json
import math
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

from examples.corpus import load_sentences, train_tokenizer
from examples.grouped_experts import grouped_experts
from examples.train_demo_model import balance_loss

DEMO_DENOISER = Path(__file__).parent / "demo_denoiser"
SEED = 20241
MAX_TOKENS = 48
TOKENS_PER_BATCH = 768
SPAN_START = 0.09  # probability that a span is damaged at a token; spans have 1 to 3 tokens
KEEP_SHARE, KEEP = 0.15, 0.1  # share of positions whose own token is predicted, and the weight of that
BALANCE, Z_LOSS = 0.02, 0.001
CLIP = 1.0


def make_config(vocab_size: int, encoder_layers: int = 2) -> SwitchTransformersConfig:
    return SwitchTransformersConfig(
        vocab_size=vocab_size,
        d_model=96,
        d_kv=24,
        d_ff=128,
        num_heads=4,
        num_layers=encoder_layers,
        num_sparse_encoder_layers=1,
        num_decoder_layers=6,
        num_sparse_decoder_layers=3,
        num_experts=16,
        expert_capacity=64,
        router_jitter_noise=0.0,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )


@torch.no_grad()
def initialise(model: SwitchTransformersForConditionalGeneration) -> None:
    """Smaller than transformers' defaults, as for the demo's classifier: branches that start small let the token
    dominate the residual stream, and router logits near 1 leave the balancing loss a gradient."""
    model.shared.weight.normal_(std=0.3)
    for name, weight in model.named_parameters():
        if name.endswith((".o.weight", ".wo.weight")):
            weight.mul_(0.3)
        elif "router.classifier" in name:
            weight.mul_(model.config.d_model**-0.5)
    # The tied head divides by sqrt(d_model); this puts its first logits near 1.
    model.decoder.final_layer_norm.weight.fill_(4.0)


def damage(ids: list[int], mask_id: int, rng: random.Random) -> tuple[list[int], list[bool]]:
    """The sentence with damaged spans, and for each token of `ids` whether it was in one; `</s>` stays."""
    damaged, hidden = [], [False] * len(ids)
    place, last = 0, len(ids) - 1
    while place < last:
        if rng.random() < SPAN_START:
            until = min(last, place + rng.randint(1, 3))
            hidden[place:until] = [True] * (until - place)
            damaged.append(mask_id)
            place = until
        else:
            damaged.append(ids[place])
            place += 1
    return [*damaged, ids[last]], hidden


def collate(rows: list[list[int]], mask_id: int, rng: random.Random) -> dict[str, Tensor]:
    """input_ids and attention_mask of the damaged sentences, labels (0: padding) and `hidden`, each [B, S]."""
    pairs = [damage(ids, mask_id, rng) for ids in rows]

    def padded(lists: list[list[Any]]) -> Tensor:
        width = max(map(len, lists))
        return torch.tensor([[*row, *([0] * (width - len(row)))] for row in lists])

    input_ids = padded([damaged for damaged, _ in pairs])
    return {
        "input_ids": input_ids,
        "attention_mask": (input_ids != 0).long(),
        "labels": padded(rows),
        "hidden": padded([hidden for _, hidden in pairs]).bool(),
    }


def batches(rows: list[list[int]], mask_id: int, rng: random.Random) -> list[dict[str, Tensor]]:
    """Padded batches of about TOKENS_PER_BATCH target tokens, of similar lengths, in a random order."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]) + rng.uniform(0, 4))
    groups: list[list[int]] = [[]]
    for i in order:
        if groups[-1] and (len(groups[-1]) + 1) * max(len(rows[j]) for j in [*groups[-1], i]) > TOKENS_PER_BATCH:
            groups.append([])
        groups[-1].append(i)
    rng.shuffle(groups)
    return [collate([rows[i] for i in group], mask_id, rng) for group in groups]


def decode(model: Any, batch: dict[str, Tensor], routers: bool = True) -> tuple[Any, Any, Tensor]:
    """Teacher forcing: the encoder's and the decoder's outputs, and the tokens that the decoder read."""
    read = F.pad(batch["labels"][:, :-1], (1, 0))
    encoded = model.encoder(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_router_logits=routers
    )
    decoded = model.decoder(
        input_ids=read,
        encoder_hidden_states=encoded.last_hidden_state,
        encoder_attention_mask=batch["attention_mask"],
        use_cache=False,
        output_router_logits=routers,
    )
    return encoded, decoded, read


def losses(model: Any, keep: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every term of the objective for one batch, each a scalar."""
    encoded, decoded, read = decode(model, batch)
    real = batch["labels"] != 0
    states, scale = decoded.last_hidden_state, model.config.d_model**-0.5
    some = real & (torch.rand(real.shape) < KEEP_SHARE)
    some[0, 0] = True
    balance, z = balance_loss(decoded.router_logits, real)
    encoder_balance, encoder_z = balance_loss(encoded.router_logits, batch["attention_mask"].bool())
    return {
        "next": F.cross_entropy(model.lm_head(states[real] * scale), batch["labels"][real]),
        "keep": F.cross_entropy(model.lm_head(keep(states[some]) * scale), read[some]),
        "balance": balance + encoder_balance,
        "z": z + encoder_z,
    }


@torch.no_grad()
def judge(model: Any, given: list[dict[str, Tensor]], unigram: Tensor) -> dict[str, Any]:
    """Accuracy and perplexity of the next token under teacher forcing, on shown, damaged and all tokens, beside a
    unigram model [vocabulary] of log-probabilities."""
    model.eval()
    found: dict[str, list[Tensor]] = {"right": [], "loss": [], "hidden": [], "unigram": [], "common": []}
    for batch in given:
        real = batch["labels"] != 0
        label = batch["labels"][real]
        states = decode(model, batch, routers=False)[1].last_hidden_state[real]
        logits = model.lm_head(states * model.config.d_model**-0.5)
        found["right"].append(logits.argmax(-1) == label)
        found["loss"].append(F.cross_entropy(logits, label, reduction="none"))
        found["hidden"].append(batch["hidden"][real])
        found["unigram"].append(-unigram[label])
        found["common"].append(label == unigram.argmax())
    all_of = {name: torch.cat(parts).float() for name, parts in found.items()}
    hidden = all_of["hidden"].bool()
    report = {}
    for name, where in (("all", torch.ones_like(hidden)), ("shown", ~hidden), ("damaged", hidden)):
        report[name] = {
            "tokens": int(where.sum()),
            "accuracy": round(all_of["right"][where].mean().item(), 4),
            "perplexity": round(all_of["loss"][where].mean().exp().item(), 2),
            "unigram_accuracy": round(all_of["common"][where].mean().item(), 4),
            "unigram_perplexity": round(all_of["unigram"][where].mean().exp().item(), 2),
        }
    return report


class Training:
    """One run: a checkpoint after each epoch, from which it goes on exactly."""

    def __init__(self, work: Path, arguments: argparse.Namespace) -> None:
        self.work, self.arguments = work, arguments
        train = [s.text for s in load_sentences("train")]
        if arguments.resume or arguments.export_only:
            if not (work / "last.pt").is_file():
                raise FileNotFoundError(f"{work} holds no run to go on from: expected {work / 'last.pt'}; start afresh")
            self.tokenizer = PreTrainedTokenizerFast.from_pretrained(work / "tokenizer")
        else:
            self.tokenizer = train_tokenizer(train, arguments.vocab)
            self.tokenizer.save_pretrained(work / "tokenizer")
        self.rows = self.ids(train)
        held_out = self.ids([s.text for s in load_sentences("held_out")])
        validation = self.ids([s.text for s in load_sentences("validation")])
        self.held_out = batches(held_out, self.tokenizer.mask_token_id, random.Random(SEED))
        self.validation = batches(validation, self.tokenizer.mask_token_id, random.Random(SEED))[:20]
        counts = Counter(token for row in self.rows for token in row)
        seen = torch.tensor([counts[token] for token in range(len(self.tokenizer))]) + 1.0
        self.unigram = (seen / seen.sum()).log()
        torch.manual_seed(SEED)
        self.model = SwitchTransformersForConditionalGeneration(make_config(len(self.tokenizer)))
        initialise(self.model)
        self.keep = nn.Linear(self.model.config.d_model, self.model.config.d_model, bias=False)
        self.epoch = 0
        self.log: list[dict[str, Any]] = []
        matrices = [p for p in self.model.parameters() if p.ndim == 2 and p is not self.model.shared.weight]
        vectors = [p for p in self.model.parameters() if p.ndim != 2]
        # A token is seen a few times an epoch, a weight of a layer at every step: the embeddings take longer steps.
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [*matrices, self.keep.weight], "weight_decay": 0.02, "factor": 1.0},
                {"params": [self.model.shared.weight], "weight_decay": 0.0, "factor": 2.0},
                {"params": vectors, "weight_decay": 0.0, "factor": 1.0},
            ],
            lr=arguments.lr,
            betas=(0.9, 0.98),
            fused=True,
        )

    def ids(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, truncation=True, max_length=MAX_TOKENS)["input_ids"]

    def run(self) -> None:
        with grouped_experts():
            while self.epoch < self.arguments.epochs:
                self.one_epoch()
                self.epoch += 1
                self.save()

    def one_epoch(self) -> None:
        # Seeded by the epoch, so that a resumed run goes the same way.
        rng = random.Random(SEED + self.epoch)
        torch.manual_seed(SEED + self.epoch)
        given = batches(self.rows, self.tokenizer.mask_token_id, rng)
        sums: dict[str, float] = {}
        started, cpu = time.monotonic(), time.process_time()
        self.model.train()
        parameters = [*self.model.parameters(), self.keep.weight]
        for index, batch in enumerate(given):
            done = self.epoch + index / len(given)
            share = min(1.0, done / 0.5 + 0.01) * (0.02 + 0.49 * (1 + math.cos(math.pi * done / self.arguments.epochs)))
            for group in self.optimizer.param_groups:
                group["lr"] = self.arguments.lr * share * group["factor"]
            terms = losses(self.model, self.keep, batch)
            total = terms["next"] + KEEP * terms["keep"] + BALANCE * terms["balance"] + Z_LOSS * terms["z"]
            self.optimizer.zero_grad()
            total.backward()
            nn.utils.clip_grad_norm_(parameters, CLIP)
            self.optimizer.step()
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + value.item()
            if index % 50 == 49:
                shown = {name: round(value / (index + 1), 3) for name, value in sums.items()}
                spent = time.monotonic() - started
                print(f"  epoch {self.epoch} step {index + 1}/{len(given)} {spent:.0f} s {shown}", flush=True)
        record: dict[str, Any] = {"epoch": self.epoch}
        record |= {name: round(value / len(given), 4) for name, value in sums.items()}
        record["seconds"] = round(time.monotonic() - started, 1)
        record["cpu_seconds"] = round(time.process_time() - cpu, 1)
        record["validation"] = judge(self.model, self.validation, self.unigram)
        self.log.append(record)
        print(json.dumps(record), flush=True)

    def save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "keep": self.keep.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "epoch": self.epoch,
            "log": self.log,
        }
        torch.save(state, self.work / "last.pt.tmp")
        (self.work / "last.pt.tmp").replace(self.work / "last.pt")

    def load(self) -> None:
        state = torch.load(self.work / "last.pt", weights_only=True)
        self.model.load_state_dict(state["model"])
        self.keep.load_state_dict(state["keep"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch, self.log = state["epoch"], state["log"]


@torch.no_grad()
def with_deep_encoder(model: SwitchTransformersForConditionalGeneration) -> SwitchTransformersForConditionalGeneration:
    """The same function with as many encoder blocks as decoder blocks; those behind the trained ones are all zero.

    transformers sizes the cache of `generate` by `num_layers`, the depth of the encoder, and fails in the first decoder
    block that has no place in it (seen with 5.24). A block whose weights are zero adds nothing to the residual stream.
    """
    depth = model.config.num_layers
    config = make_config(model.config.vocab_size, model.config.num_decoder_layers)
    deep = SwitchTransformersForConditionalGeneration(config).to(model.dtype).eval()
    missing, unexpected = deep.load_state_dict(model.state_dict(), strict=False)
    added = deep.encoder.block[depth:]
    if unexpected or any(int(name.split(".")[2]) < depth for name in missing):
        raise ValueError(f"the trained weights do not fit a deeper encoder: {missing + unexpected}")
    for parameter in added.parameters():
        parameter.zero_()
    return deep


def export(training: Training, out: Path) -> None:
    """Write the model in bfloat16, load it again with transformers alone, and measure what was written."""
    with_deep_encoder(training.model.eval().to(torch.bfloat16)).save_pretrained(out)
    training.tokenizer.save_pretrained(out)
    model = SwitchTransformersForConditionalGeneration.from_pretrained(out, dtype=torch.float32).eval()
    with grouped_experts():
        held_out = judge(model, training.held_out, training.unigram)
    metrics = {
        "what": "the stored (bfloat16) weights computed in float32; next token under teacher forcing",
        "parameters": sum(p.numel() for p in model.parameters()),
        "file_bytes": (out / "model.safetensors").stat().st_size,
        "training_seconds": round(sum(epoch["seconds"] for epoch in training.log)),
        "training_cpu_seconds": round(sum(epoch["cpu_seconds"] for epoch in training.log)),
        "epochs": training.epoch,
        "train_tokens": sum(map(len, training.rows)),
        "held_out": held_out,
        "log": training.log,
    }
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    print(json.dumps({name: value for name, value in metrics.items() if name != "log"}, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DEMO_DENOISER, help="where the model goes")
    parser.add_argument("--work", type=Path, default=Path("out/denoiser_training"), help="where the checkpoints go")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--export-only", action="store_true", help="train no further, write the last checkpoint")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--vocab", type=int, default=4000)
    parser.add_argument("--lr", type=float, default=2.5e-3)
    parser.add_argument("--epochs", type=int, default=8)
    arguments = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    torch.set_num_threads(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)
    training = Training(arguments.work, arguments)
    if arguments.resume or arguments.export_only:
        training.load()
    if not arguments.export_only:
        training.run()
    export(training, arguments.out)


if __name__ == "__main__":
    main()
