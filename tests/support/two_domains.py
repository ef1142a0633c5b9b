"""A tiny classifier whose experts fall into two domains: even token ids want the first half, odd ones the rest."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from transformers import SwitchTransformersConfig

import sida_ext
from sida_ext.models.layers import swapped_layers
from sida_ext.prediction.protocol import TokenTablePredictor
from tests.support.tiny_models import VOCABULARY, tiny_tokenizer

__all__ = ["EXPERTS", "LAYERS", "save_two_domains", "texts_of_two_domains"]

EXPERTS, LAYERS = 32, 2
FIRST = 10  # ids below are left out


def save_two_domains(folder: Path, seed: int = 0) -> None:
    """Write checkpoint and tokenizer to ``folder``, and the token table of its routing to ``folder/table``."""
    torch.manual_seed(seed)
    config = SwitchTransformersConfig(
        vocab_size=VOCABULARY,
        d_model=64,
        d_kv=16,
        num_heads=4,
        d_ff=128,
        num_layers=2 * LAYERS,
        num_sparse_encoder_layers=LAYERS,
        num_decoder_layers=2,
        num_sparse_decoder_layers=1,
        num_experts=EXPERTS,
        expert_capacity=64,
        router_jitter_noise=0.0,
        num_labels=2,
    )
    model = sida_ext.SwitchTransformersForSequenceClassification(config).eval()
    domain = torch.arange(VOCABULARY) % 2
    with torch.no_grad():
        # The first number of a token's embedding tells its domain, and the layers between leave it nearly alone.
        for name, parameter in model.named_parameters():
            if "router" not in name and parameter.dim() > 1:
                parameter.mul_(0.1)
        model.shared.weight.copy_(torch.randn(VOCABULARY, 64))
        model.shared.weight[:, 0] = 8.0 * (2.0 * domain - 1)
        for block in model.encoder.block:
            router = getattr(block.layer[-1].mlp, "router", None)
            if router is not None:
                router.classifier.weight.copy_(torch.randn(EXPERTS, 64))
                router.classifier.weight[:, 0] = torch.where(torch.arange(EXPERTS) < EXPERTS // 2, -4.0, 4.0)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    served = sida_ext.from_pretrained(
        folder, expert_memory="100%", model_class=sida_ext.SwitchTransformersForSequenceClassification
    )
    _count(served, folder / "table", seed)
    served.sida.close()


def _count(served: torch.nn.Module, out: Path, seed: int) -> None:
    """Count the true routing of random texts of either domain, and save the table."""
    table = TokenTablePredictor.for_model(served)
    chosen: list[torch.Tensor] = []
    for layer in swapped_layers(served):
        layer.observer = lambda name, index: chosen.append(index.reshape(-1))
    for ids in texts_of_two_domains(400, seed):
        chosen.clear()
        with torch.no_grad():
            served(input_ids=torch.tensor([ids]))
        index = torch.stack(chosen, dim=-1)  # [tokens, layers]
        kept = index.min(-1).values >= 0
        table.update(torch.tensor(ids)[kept], index[kept].long(), torch.ones(int(kept.sum()), LAYERS))
    table.save_pretrained(out)


def texts_of_two_domains(count: int, seed: int, tokens: int = 6) -> list[list[int]]:
    """Token ids of random texts, of either domain by turns of chance."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        domain = draw.randrange(2)
        found.append([2 * draw.randrange(FIRST // 2, VOCABULARY // 2) + domain for _ in range(tokens)])
    return found
