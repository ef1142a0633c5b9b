"""A masked language model that leans on its experts, trained here: the hard case for predicted routing.

    python -m bench.paper.masked_language            # train it: some fifteen minutes of one core; run again to go on

Every feed-forward layer of this encoder is an MoE layer, so what its experts compute is what its feed-forward layers
compute. The bundled denoiser keeps its perplexity almost whatever its experts are, and shows little therefore.
15 % of the tokens are to be guessed: of these 80 % are replaced by <mask>, 10 % by another token, 10 % stay. With a
small weight it also names some of the tokens that it can see, which keeps the token in the residual stream.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, SwitchTransformersConfig, SwitchTransformersEncoderModel

from examples.corpus import load_sentences
from examples.grouped_experts import grouped_experts
from examples.train_demo_denoiser import DEMO_DENOISER
from examples.train_demo_model import balance_loss

ROOT = Path(__file__).resolve().parents[2]

FOLDER = ROOT / "out" / "masked_language"
MAX_TOKENS = 48
TOKENS_PER_BATCH = 1024
GUESSED, KEEP_SHARE, KEEP = 0.15, 0.15, 0.1
BALANCE, Z_LOSS = 0.02, 0.001


def make_config(vocabulary: int, experts: int = 16) -> SwitchTransformersConfig:
    return SwitchTransformersConfig(
        vocab_size=vocabulary,
        d_model=96,
        d_kv=24,
        d_ff=192,
        num_heads=4,
        num_layers=4,
        num_sparse_encoder_layers=4,
        num_experts=experts,
        expert_capacity=64,
        router_jitter_noise=0.0,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
        is_encoder_decoder=False,
        architectures=["SwitchTransformersEncoderModel"],
    )


class MaskedLanguageModel(nn.Module):
    """An encoder with a tied head; `keep` transforms the states from which tokens that it can see are named."""

    def __init__(self, config: SwitchTransformersConfig) -> None:
        super().__init__()
        self.encoder_model = SwitchTransformersEncoderModel(config)
        self.transform = nn.Linear(config.d_model, config.d_model)
        self.norm = nn.LayerNorm(config.d_model)
        self.keep = nn.Linear(config.d_model, config.d_model, bias=False)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        with torch.no_grad():
            # Branches that start small let the token dominate the residual stream.
            self.encoder_model.shared.weight.normal_(std=0.3)
            for name, weight in self.encoder_model.named_parameters():
                if name.endswith((".o.weight", ".wo.weight")):
                    weight.mul_(0.3)
                elif "router.classifier" in name:
                    weight.mul_(config.d_model**-0.5)

    def guess(self, states: Tensor) -> Tensor:
        """Logits over the vocabulary for states [n, d_model] of the encoder."""
        return self.norm(F.gelu(self.transform(states))) @ self.encoder_model.shared.weight.T + self.bias


def masked_batches(rows: list[list[int]], mask_id: int, vocabulary: int, seed: Any) -> list[dict[str, Tensor]]:
    """input_ids and attention_mask of damaged rows, `labels` and `guessed`, each [B, S]; similar lengths together."""
    rng = random.Random(seed)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]) + rng.uniform(0, 4))
    groups: list[list[int]] = [[]]
    for i in order:
        if groups[-1] and (len(groups[-1]) + 1) * max(len(rows[j]) for j in [*groups[-1], i]) > TOKENS_PER_BATCH:
            groups.append([])
        groups[-1].append(i)
    rng.shuffle(groups)
    found = []
    for group in groups:
        width = max(len(rows[i]) for i in group)
        labels = torch.tensor([[*rows[i], *([0] * (width - len(rows[i])))] for i in group])
        chance = torch.tensor([[rng.random() for _ in range(width)] for _ in group])
        guessed = (labels > 1) & (chance < GUESSED)
        other = torch.tensor([[rng.randrange(4, vocabulary) for _ in range(width)] for _ in group])
        input_ids = torch.where(guessed & (chance < 0.8 * GUESSED), mask_id, labels)
        input_ids = torch.where(guessed & (chance >= 0.9 * GUESSED), other, input_ids)
        found.append(
            {"input_ids": input_ids, "attention_mask": (labels != 0).long(), "labels": labels, "guessed": guessed}
        )
    return found


def rows_of(tokenizer: PreTrainedTokenizerFast, split: str) -> list[list[int]]:
    texts = [s.text for s in load_sentences(split)]
    return tokenizer(texts, truncation=True, max_length=MAX_TOKENS)["input_ids"]


@torch.no_grad()
def guess_losses(model: MaskedLanguageModel, batches: list[dict[str, Tensor]]) -> Tensor:
    """-log p of every token that is to be guessed."""
    found = []
    for batch in batches:
        states = model.encoder_model(batch["input_ids"], batch["attention_mask"]).last_hidden_state
        logits = model.guess(states[batch["guessed"]])
        found.append(F.cross_entropy(logits, batch["labels"][batch["guessed"]], reduction="none"))
    return torch.cat(found)


def load(folder: Path = FOLDER) -> MaskedLanguageModel:
    """The model of the last finished epoch, in eval mode."""
    with safe_open(folder / "last.safetensors", "pt") as opened:
        names = [name for name in opened.keys() if name.startswith("model.")]  # noqa: SIM118
        tensors = {name.removeprefix("model."): opened.get_tensor(name) for name in names}
    model = MaskedLanguageModel(make_config(tensors["bias"].numel()))
    tensors["encoder_model.encoder.embed_tokens.weight"] = tensors["encoder_model.shared.weight"]
    model.load_state_dict(tensors)
    return model.eval()


def train(folder: Path, epochs: int, lr: float = 2.5e-3) -> dict[str, Any]:
    """Trains to the end of `epochs`, going on after the last finished one; returns the state's record."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(DEMO_DENOISER)
    rows, vocabulary = rows_of(tokenizer, "train"), len(tokenizer)
    torch.manual_seed(1)
    model = MaskedLanguageModel(make_config(vocabulary))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.02, fused=True)
    record: dict[str, Any] = {"epochs": [], "all_epochs": epochs}
    path = folder / "last.safetensors"
    if path.is_file():
        with safe_open(path, "pt") as opened:
            record = json.loads(opened.metadata()["record"])
        if record["all_epochs"] != epochs:
            raise ValueError(f"{path} is of a run of {record['all_epochs']} epochs; delete it to train {epochs}")
        model = load(folder)
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.02, fused=True)
        with safe_open(path, "pt") as opened:
            state = optimizer.state_dict()
            for name in opened.keys():  # noqa: SIM118
                if name.startswith("optimizer."):
                    _, number, field = name.split(".")
                    state["state"].setdefault(int(number), {})[field] = opened.get_tensor(name)
        optimizer.load_state_dict(state)
    mask_id = tokenizer.mask_token_id
    validation = masked_batches(rows_of(tokenizer, "validation"), mask_id, vocabulary, 0)
    with grouped_experts():
        for epoch in range(len(record["epochs"]), epochs):
            given = masked_batches(rows, mask_id, vocabulary, 1 + epoch)
            torch.manual_seed(epoch)
            started, cpu, total = time.monotonic(), time.process_time(), 0.0
            model.train()
            for index, batch in enumerate(given):
                done = epoch + index / len(given)
                share = min(1.0, done / 0.5 + 0.01) * (0.02 + 0.49 * (1 + math.cos(math.pi * done / epochs)))
                for group in optimizer.param_groups:
                    group["lr"] = lr * share
                real = batch["attention_mask"].bool()
                output = model.encoder_model(batch["input_ids"], batch["attention_mask"], output_router_logits=True)
                states = output.last_hidden_state
                guessed = F.cross_entropy(model.guess(states[batch["guessed"]]), batch["labels"][batch["guessed"]])
                some = real & ~batch["guessed"] & (torch.rand(real.shape) < KEEP_SHARE)
                some[0, 0] = True
                seen = F.cross_entropy(
                    model.keep(states[some]) @ model.encoder_model.shared.weight.T, batch["input_ids"][some]
                )
                balance, z = balance_loss(output.router_logits, real)
                optimizer.zero_grad()
                (guessed + KEEP * seen + BALANCE * balance + Z_LOSS * z).backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                total += guessed.item()
            model.eval()
            entry = {
                "loss": total / len(given),
                "validation_perplexity": guess_losses(model, validation).mean().exp().item(),
                "seconds": time.monotonic() - started,
                "cpu_seconds": time.process_time() - cpu,
            }
            record["epochs"].append(entry)
            print(json.dumps(entry), flush=True)
            tensors = {f"model.{n}": t for n, t in model.state_dict().items() if "embed_tokens" not in n}
            for number, state in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{number}.{name}": t for name, t in state.items()}
            folder.mkdir(parents=True, exist_ok=True)
            save_file(
                {n: t.contiguous() for n, t in tensors.items()},
                path.with_suffix(".tmp"),
                {"record": json.dumps(record)},
            )
            path.with_suffix(".tmp").replace(path)
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    train(arguments.folder, arguments.epochs)


if __name__ == "__main__":
    main()
