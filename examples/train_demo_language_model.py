"""Train a small decoder-only MoE language model from scratch on the bundled text: examples/demo_language_model.

    python -m examples.train_demo_language_model                     # about an hour on one core
    python -m examples.train_demo_language_model --resume            # go on after an interruption
    python -m examples.train_demo_language_model --export-only       # write and measure the last checkpoint
    python -m examples.train_demo_language_model --family qwen3_moe --layers 4 --experts 16 --top-k 2 \\
        --minutes 10 --work out/lm_qwen --out out/lm_qwen/model     # another family and shape

The learning rate falls to zero with the share of `--tokens` that were read, or of `--minutes` that went by if that is
more: a slow machine ends in time and a fast one reads the same tokens in the same order each time. The figures in
metrics.json are those of the rounded (bfloat16) weights on held-out works and pages, beside a Kneser-Ney model of the
same training tokens.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    OlmoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
)

from examples import gated_experts
from examples.kneser_ney import KneserNey
from examples.running_text import DOMAINS, load_documents, token_stream, train_byte_tokenizer

DEMO_LANGUAGE_MODEL = Path(__file__).parent / "demo_language_model"
FAMILIES = ("olmoe", "qwen3_moe")
SEED = 20261
BALANCE, Z_LOSS = 0.02, 0.001
CLIP, WEIGHT_DECAY = 1.0, 0.05
WARMUP = 0.02  # share of the training in which the learning rate rises
SAVE_SECONDS, SHOW_STEPS = 300.0, 25
SHORT = 0.75  # share of the training with windows of half the length
N_GRAMS = (3, 5)
VALIDATION_WINDOWS = 16
SAMPLE = 4  # windows of a domain whose perplexity stands apart, to check a model by in a moment


def make_config(arguments: argparse.Namespace, vocab_size: int) -> PreTrainedConfig:
    """The family's configuration of the wanted shape; everything else is the family's default."""
    heads = arguments.d_model // arguments.head_dim
    shape = {
        "vocab_size": vocab_size,
        "hidden_size": arguments.d_model,
        "num_hidden_layers": arguments.layers,
        "num_attention_heads": heads,
        "num_experts": arguments.experts,
        "num_experts_per_tok": arguments.top_k,
        "max_position_embeddings": arguments.length,
        "norm_topk_prob": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 1,
    }
    if arguments.family == "olmoe":
        return OlmoeConfig(**shape, intermediate_size=arguments.width, num_key_value_heads=heads)
    # Two heads share keys and values, as in the family's published models.
    return Qwen3MoeConfig(
        **shape,
        intermediate_size=arguments.width * arguments.top_k,
        moe_intermediate_size=arguments.width,
        num_key_value_heads=max(1, heads // 2),
        head_dim=arguments.head_dim,
        mlp_only_layers=[],
    )


@torch.no_grad()
def initialise(model: PreTrainedModel) -> None:
    """Weights by the width that they sum over, for a model too narrow for the families' fixed deviation. Branches start
    small beside the embeddings, so that the token decides the first routing, and router logits near 1 give the
    balancing loss a gradient."""
    small = (2 * model.config.num_hidden_layers) ** -0.5
    for name, weight in model.named_parameters():
        if weight.ndim < 2:
            weight.fill_(1.0)
        elif "embed_tokens" in name:
            weight.normal_(std=0.5)
        elif "lm_head" in name:
            weight.normal_(std=0.02)
        else:
            branch_end = "o_proj" in name or "down_proj" in name
            weight.normal_(std=weight.shape[-1] ** -0.5 * (small if branch_end else 1.0))


def router_losses(router_logits: tuple[Tensor, ...], top_k: int) -> tuple[Tensor, Tensor]:
    """The load balancing loss of each layer over its top-k choices (Switch, arXiv 2101.03961, section 2.2) and the
    z-loss, averaged over the layers. router_logits: [tokens, experts] for each layer."""
    balance = z = torch.zeros(())
    for layer in router_logits:
        logits = layer.float()
        experts = logits.shape[-1]
        share = F.one_hot(logits.topk(top_k, dim=-1).indices, experts).sum(1).float().mean(0) / top_k
        balance = balance + experts * (share * logits.softmax(-1).mean(0)).sum()
        z = z + logits.logsumexp(-1).square().mean()
    return balance / len(router_logits), z / len(router_logits)


def window_information(router_logits: tuple[Tensor, ...], rows: int) -> Tensor:
    """The mutual information between the window and the expert, as a share of the most there can be (the logarithm of
    the number of experts), averaged over the layers: high where each window keeps to few experts and the windows
    together use all. Rewarded, it makes experts of domains (Mod-Squad, arXiv 2212.08066, has it for tasks).
    router_logits: [rows * length, experts] for each layer."""
    found = torch.zeros(())
    for layer in router_logits:
        share = layer.float().softmax(-1).unflatten(0, (rows, -1)).mean(1)

        def entropy(p: Tensor) -> Tensor:
            return -(p * p.clamp(min=1e-9).log()).sum(-1)

        found = found + (entropy(share.mean(0)) - entropy(share).mean()) / math.log(layer.shape[-1])
    return found / len(router_logits)


def windows(tokens: np.ndarray, length: int) -> Tensor:
    """The tokens cut into windows that overlap by one, int64 [windows, length + 1]: each token but the first is
    predicted once. The last window is filled up with -100."""
    count = max(1, math.ceil((len(tokens) - 1) / length))
    padded = np.full(count * length + 1, -100, np.int64)
    padded[: len(tokens)] = tokens
    return torch.from_numpy(np.stack([padded[i * length : (i + 1) * length + 1] for i in range(count)]))


@torch.no_grad()
def negative_log_likelihood(model: PreTrainedModel, rows: Tensor, batch: int = 8) -> tuple[float, int]:
    """The sum over the predicted tokens of these windows [windows, length + 1] in nats, and the tokens' number."""
    model.eval()
    total, count = 0.0, 0
    for part in rows.split(batch):
        labels = part[:, 1:]
        logits = model(part[:, :-1].clamp(min=0), use_cache=False).logits.float()
        total += F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum").item()
        count += int((labels != -100).sum())
    return total, count


@torch.no_grad()
def routing_figures(model: PreTrainedModel, rows: Tensor, fitted: Tensor) -> list[dict[str, float]]:
    """For each MoE layer: the entropy of the experts' use (1: uniform) on `rows`, the share of experts that a window
    touches, and how many of a token's top-k experts a table by token id names that was made from `fitted`."""
    model.eval()
    top_k, vocab = model.config.num_experts_per_tok, model.config.vocab_size

    def choices(windows: Tensor) -> list[Tensor]:
        parts = [model(w[None], use_cache=False, output_router_logits=True).router_logits for w in windows]
        return [torch.stack([logits.topk(top_k, -1).indices for logits in layer]) for layer in zip(*parts, strict=True)]

    figures = []
    given, known = rows[:, :-1].clamp(min=0), fitted[:, :-1].clamp(min=0)
    for chosen, seen in zip(choices(given), choices(known), strict=True):
        experts = model.config.num_experts
        used = torch.bincount(chosen.flatten(), minlength=experts).float()
        used = used / used.sum()
        table = torch.zeros(vocab, experts)
        table.index_put_((known.flatten()[:, None].expand(-1, top_k), seen.flatten(0, 1)), torch.ones(()), True)
        table += 1e-3 * used  # a token that was not seen gets the most used experts
        named = table[given.flatten()].topk(2 * top_k, -1).indices
        hits = (chosen.flatten(0, 1)[:, :, None] == named[:, None, :]).float()
        figures.append(
            {
                "entropy": round(-(used * used.clamp(min=1e-9).log()).sum().item() / math.log(experts), 4),
                "busiest_expert_share": round(used.max().item(), 4),
                "experts_touched": round(sum(len(w.unique()) for w in chosen) / (len(chosen) * experts), 4),
                "token_table_names": round(hits[:, :, :top_k].sum(-1).mean().item(), 4),
                "token_table_names_among_2k": round(hits.sum(-1).mean().item(), 4),
            }
        )
    return figures


def training_texts(domain: str, arguments: argparse.Namespace) -> list[str]:
    """A domain's training documents, as many as ``--documents`` and ``--characters`` say; the last one is cut."""
    texts = [document.text for document in load_documents("train", domain)[: arguments.documents]]
    if arguments.characters is None:
        return texts
    before = [0, *accumulate(map(len, texts))]
    most = arguments.characters
    return [text[: most - at] for text, at in zip(texts, before, strict=False) if at < most]


class Training:
    """One run: the tokenizer, the tokens, the model and how far it is; a checkpoint goes on exactly.

    Several workers are processes that each take a part of every batch and average their gradients. On a machine that
    others use too they wait for each other once a step, where threads wait at every product.
    """

    def __init__(self, arguments: argparse.Namespace, rank: int = 0) -> None:
        self.arguments, self.work, self.rank = arguments, arguments.work, rank
        going_on = arguments.resume or arguments.export_only
        if going_on and not (self.work / "last.pt").is_file():
            raise FileNotFoundError(
                f"{self.work} holds no run to go on from: expected {self.work / 'last.pt'}; start afresh"
            )
        if not going_on and not rank:
            train = [text for domain in DOMAINS for text in training_texts(domain, arguments)]
            tokenizer = train_byte_tokenizer(train, arguments.vocab, arguments.length)
            tokenizer.save_pretrained(self.work / "tokenizer")
            np.save(self.work / "train.npy", token_stream(tokenizer, train))
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(self.work / "tokenizer")
        self.train = np.load(self.work / "train.npy")
        self.validation = self.by_domain("validation", VALIDATION_WINDOWS * arguments.length)
        self.held_out = self.by_domain("held_out", arguments.eval_tokens)
        torch.manual_seed(SEED)
        config = make_config(arguments, len(self.tokenizer))
        self.model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        self.model.set_experts_implementation(gated_experts.NAME)
        initialise(self.model)
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self.elapsed = 0.0  # of the first worker; `seconds` is what all workers know of it
        self.log: list[dict[str, Any]] = []
        matrices = [p for n, p in self.model.named_parameters() if p.ndim > 1 and "embed_tokens" not in n]
        others = [p for n, p in self.model.named_parameters() if p.ndim < 2 or "embed_tokens" in n]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}],
            lr=arguments.lr,
            betas=(0.9, 0.97),
            fused=True,
        )

    def by_domain(self, split: str, predicted: int) -> dict[str, np.ndarray]:
        """A split's tokens by domain, the first `predicted` + 1 of them, or all for 0."""
        return {
            domain: token_stream(
                self.tokenizer, [d.text for d in load_documents(split, domain)], predicted + 1 if predicted else None
            )
            for domain in DOMAINS
        }

    def share(self) -> float:
        """How much of the training is done, from 0 to 1."""
        done = self.tokens / self.arguments.tokens
        if self.arguments.minutes is not None:
            done = max(done, self.seconds / (60 * self.arguments.minutes))
        if self.arguments.steps is not None:
            done = max(done, self.step / self.arguments.steps)
        return min(1.0, done)

    def batch(self) -> Tensor:
        """The windows of this step [batch, length + 1]: every pass over the text cuts it elsewhere, in another order.

        For the first part of the training they are half as long and twice as many: attention is then cheaper.
        """
        parts = 2 if self.share() < SHORT and self.arguments.length % 2 == 0 else 1
        length, size = self.arguments.length // parts, self.arguments.batch * parts
        blocks = (len(self.train) - 1) // length - 1
        steps = max(1, blocks // size)
        rng = np.random.default_rng(SEED + self.step // steps)
        offset, order = int(rng.integers(length)), rng.permutation(blocks)
        at = self.step % steps * size
        starts = offset + order[at : at + size][self.rank :: self.arguments.workers] * length
        return torch.from_numpy(np.stack([self.train[start : start + length + 1] for start in starts]))

    def one_step(self) -> dict[str, float]:
        share = self.share()
        for group in self.optimizer.param_groups:
            group["lr"] = self.arguments.lr * min(1.0, (share + 1e-3) / WARMUP, max(0.0, (1 - share) / (1 - WARMUP)))
        given = self.batch()
        self.model.train()
        with torch.autocast("cpu", torch.bfloat16):
            out = self.model.model(given[:, :-1], use_cache=False, output_router_logits=True)
            logits = self.model.lm_head(out.last_hidden_state)
            balance, z = router_losses(out.router_logits, self.arguments.top_k)
            information = window_information(out.router_logits, len(given))
        loss = F.cross_entropy(logits.float().flatten(0, 1), given[:, 1:].flatten())
        self.optimizer.zero_grad()
        (loss + BALANCE * balance + Z_LOSS * z - self.arguments.information * information).backward()
        self.average()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.step += 1
        self.tokens += self.arguments.batch * self.arguments.length
        return {
            "loss": loss.item(),
            "balance": balance.item(),
            "z": z.item(),
            "information": information.item(),
        }

    def average(self) -> None:
        """Gradients averaged over the workers, and the first worker's clock for all: it decides when the end is."""
        if self.arguments.workers == 1:
            self.seconds = self.elapsed
            return
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        together = torch.cat([gradient.flatten() for gradient in gradients])
        distributed.all_reduce(together)
        together /= self.arguments.workers
        for gradient, part in zip(gradients, together.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))
        clock = torch.tensor(self.elapsed, dtype=torch.float64)
        distributed.broadcast(clock, 0)
        self.seconds = clock.item()

    def run(self) -> None:
        sums: dict[str, float] = {}
        since, seen, begun = self.step, self.tokens, self.elapsed
        saved = clock = time.monotonic()
        while self.share() < 1.0:
            for name, value in self.one_step().items():
                sums[name] = sums.get(name, 0.0) + value
            now = time.monotonic()
            if self.rank:
                continue
            # The other workers hear of this at the next step: all see the same share when they ask for it.
            self.elapsed += now - clock
            clock = now
            if self.step % SHOW_STEPS == 0:
                share, rate = self.share(), (self.tokens - seen) / max(1e-9, self.elapsed - begun)
                means = {name: round(value / (self.step - since), 3) for name, value in sums.items()}
                print(
                    f"step {self.step} {self.tokens / 1e6:.2f} M tokens, {rate:.0f}/s, {100 * share:.1f} % done, "
                    f"{self.elapsed * (1 / share - 1) / 60:.1f} min left, {means}",
                    flush=True,
                )
            if now - saved >= SAVE_SECONDS or self.share() >= 1.0:
                self.note(sums, max(1, self.step - since))
                sums, since, seen, begun = {}, self.step, self.tokens, self.elapsed
                saved = clock = time.monotonic()

    def note(self, sums: dict[str, float], steps: int) -> None:
        """Judge on a little of the validation text, write the log and a checkpoint."""
        record: dict[str, Any] = {"step": self.step, "tokens": self.tokens, "seconds": round(self.elapsed)}
        record |= {name: round(value / steps, 4) for name, value in sums.items()}
        for domain, tokens in self.validation.items():
            total, count = negative_log_likelihood(self.model, windows(tokens, self.arguments.length))
            record[f"validation_{domain}"] = round(math.exp(total / count), 2)
        self.log.append(record)
        print(json.dumps(record), flush=True)
        self.save()

    def save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "progress": {"step": self.step, "tokens": self.tokens, "seconds": self.elapsed, "log": self.log},
        }
        torch.save(state, self.work / "last.pt.tmp")
        (self.work / "last.pt.tmp").replace(self.work / "last.pt")

    def load(self) -> None:
        state = torch.load(self.work / "last.pt", weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        progress = state["progress"]
        self.step, self.tokens, self.seconds = progress["step"], progress["tokens"], progress["seconds"]
        self.elapsed = self.seconds
        self.log = progress["log"]


def measure(model: PreTrainedModel, training: Training) -> dict[str, Any]:
    """Held-out perplexity by domain beside the n-gram models', and how the model routes."""
    length, held_out = training.arguments.length, training.held_out
    report: dict[str, Any] = {}
    samples: dict[str, Any] = {}
    sums: dict[str, float] = {}
    predicted = 0
    for domain, tokens in held_out.items():
        total, count = negative_log_likelihood(model, windows(tokens, length))
        report[domain] = {"tokens": count, "perplexity": round(math.exp(total / count), 3)}
        total_of_sample, count_of_sample = negative_log_likelihood(model, windows(tokens, length)[:SAMPLE])
        samples[domain] = {
            "tokens": count_of_sample,
            "perplexity": round(math.exp(total_of_sample / count_of_sample), 4),
        }
        sums["perplexity"] = sums.get("perplexity", 0.0) + total
        predicted += count
    for order in N_GRAMS:
        baseline = KneserNey(training.train, order, model.config.vocab_size)
        for domain, tokens in held_out.items():
            total = -float(baseline.log_probabilities(tokens)[1:].sum())
            name = f"kneser_ney_{order}_gram_perplexity"
            report[domain][name] = round(math.exp(total / (len(tokens) - 1)), 3)
            sums[name] = sums.get(name, 0.0) + total
    report["both"] = {"tokens": predicted} | {n: round(math.exp(v / predicted), 3) for n, v in sums.items()}
    sample = torch.cat([windows(tokens, length)[:16] for tokens in held_out.values()])
    rng = np.random.default_rng(SEED)
    starts = rng.integers(len(training.train) - length - 1, size=max(1, training.arguments.table_tokens // length))
    fitted = torch.from_numpy(np.stack([training.train[s : s + length + 1] for s in starts]))
    return {"held_out": report, "held_out_sample": samples, "routing": routing_figures(model, sample, fitted)}


def export(training: Training, out: Path) -> None:
    """Write the model in bfloat16, load it again with transformers alone, and measure what was written."""
    training.model.to(torch.bfloat16).save_pretrained(out)
    training.tokenizer.save_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, experts_implementation="grouped_mm").eval()
    arguments = training.arguments
    metrics = {
        "what": "the stored (bfloat16) weights computed in float32; each token after those before it in its window",
        "parameters": sum(p.numel() for p in model.parameters()),
        "file_bytes": (out / "model.safetensors").stat().st_size,
        "training_seconds": round(training.seconds),
        "workers": arguments.workers,
        "training_steps": training.step,
        "training_tokens": training.tokens,
        "corpus_tokens": len(training.train),
        "vocab_size": len(training.tokenizer),
        "window": arguments.length,
        "batch": arguments.batch,
        "lr": arguments.lr,
        "seed": SEED,
        **measure(model, training),
        "log": training.log,
    }
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    print(json.dumps({name: value for name, value in metrics.items() if name != "log"}, indent=1))


def parse(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DEMO_LANGUAGE_MODEL, help="where the model goes")
    parser.add_argument("--work", type=Path, default=Path("out/language_model"), help="where the checkpoints go")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--export-only", action="store_true", help="train no further, write the last checkpoint")
    parser.add_argument("--family", choices=FAMILIES, default="olmoe")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--top-k", type=int, default=4, help="experts for each token")
    parser.add_argument("--d-model", type=int, default=128)
    parser.add_argument("--width", type=int, default=128, help="inner width of an expert")
    parser.add_argument("--head-dim", type=int, default=32)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument(
        "--information", type=float, default=0.0, help="weight of the information between window and expert"
    )
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--batch", type=int, default=4, help="windows of a step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--tokens", type=int, default=12_000_000, help="tokens to train on")
    parser.add_argument("--minutes", type=float, help="end after so many minutes of training, however few tokens")
    parser.add_argument("--steps", type=int, help="end after so many steps, however few tokens")
    parser.add_argument("--documents", type=int, help="train on so many documents of each domain only")
    parser.add_argument("--characters", type=int, help="train on so many characters of each domain only")
    parser.add_argument("--eval-tokens", type=int, default=0, help="held-out tokens of a domain to measure, 0: all")
    parser.add_argument("--table-tokens", type=int, default=131_072, help="tokens behind the token table's figure")
    parser.add_argument("--threads", type=int, default=1, help="of each worker")
    parser.add_argument("--workers", type=int, default=1, help="processes that share each batch")
    arguments = parser.parse_args(given)
    for name in ("layers", "experts", "top_k", "width", "vocab", "length", "batch", "tokens", "threads", "workers"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(arguments, name)}, expected at least 1")
    if arguments.batch % arguments.workers:
        parser.error(f"--batch is {arguments.batch}, expected a multiple of --workers {arguments.workers}")
    if arguments.top_k > arguments.experts:
        parser.error(f"--top-k is {arguments.top_k}, expected at most the {arguments.experts} experts")
    if arguments.head_dim < 2 or arguments.d_model % arguments.head_dim:
        parser.error(f"--d-model is {arguments.d_model}, expected a multiple of --head-dim {arguments.head_dim}")
    return arguments


def work(rank: int, arguments: argparse.Namespace, meeting: str) -> None:
    """One of several workers; the first leaves the result as the last checkpoint."""
    torch.set_num_threads(arguments.threads)
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=arguments.workers)
    if rank:  # the first one writes the tokenizer that the others read
        distributed.barrier()
    training = Training(arguments, rank)
    if not rank:
        distributed.barrier()
    if arguments.resume:
        training.load()
    training.run()
    distributed.destroy_process_group()


def main(given: list[str] | None = None) -> None:
    arguments = parse(given)
    torch.set_num_threads(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)
    if arguments.workers > 1 and not arguments.export_only:
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(work, (arguments, f"file://{folder}/meeting"), arguments.workers)
        arguments.export_only = True
    training = Training(arguments)
    if arguments.resume or arguments.export_only:
        training.load()
    if not arguments.export_only:
        training.run()
    export(training, arguments.out)


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(line_buffering=True)
    main()
