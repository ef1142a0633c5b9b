"""What a predictor is trained for: the options and the truncated-distillation loss."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sida_ext.training.causal_traces import CausalTrace
from sida_ext.training.traces import KEPT, Trace


@dataclass(frozen=True)
class TrainingOptions:
    """How a predictor is trained; the defaults are justified in docs/predictor.md.

    Attributes:
        variant, net: HashPredictor's variant (None: the one of ours for the model) and the sizes of its network.
        truncation: T, the teacher's most likely experts that are distilled; at most 30 and the number of experts.
        top1_weight: lambda, the weight of the cross-entropy with the router's first choice.
        temperature: divides the teacher's and the student's logits inside the distillation term.
        learning_rate, weight_decay, warmup: of AdamW; linear warm-up over ``warmup`` steps, then cosine decay.
        batch_sentences: sentences in a step; None: 64, of a decoder-only model 8, whose prompts are longer.
        epochs: at most so many passes; ``patience`` passes without a better held-out loss end it earlier.
        seconds: at most so much training time (checked after each pass and step); None: no limit.
        validation: share of documents that decide when to stop and how probabilities are calibrated.
        held_out: share of documents that nothing but the report reads.
        max_length: tokens of a sentence; longer ones are cut.
        seed: of the split, the initial weights and the order.
    """

    variant: str | None = None
    net: dict[str, Any] = field(default_factory=dict)
    truncation: int = KEPT
    top1_weight: float = 0.005
    temperature: float = 1.0
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    warmup: int = 100
    batch_sentences: int | None = None
    epochs: int = 20
    patience: int = 3
    seconds: float | None = None
    validation: float = 0.05
    held_out: float = 0.1
    max_length: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        positive = ["truncation", "temperature", "learning_rate", "epochs", "patience", "max_length"]
        for name in positive if self.batch_sentences is None else [*positive, "batch_sentences"]:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected more than 0")
        if self.truncation > KEPT:
            raise ValueError(f"truncation is {self.truncation}; traces keep the router's {KEPT} most likely experts")
        for name in ("top1_weight", "weight_decay", "warmup"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 0")
        if not (self.validation > 0 and self.held_out >= 0 and self.validation + self.held_out < 1):
            raise ValueError(
                f"validation is {self.validation} and held_out {self.held_out}, expected shares that leave documents "
                "to train on"
            )
        if self.seconds is not None and not self.seconds > 0:
            raise ValueError(f"seconds is {self.seconds}, expected more than 0, or None for no limit")


def truncated_distillation(
    student: Tensor, teacher: Tensor, candidates: Tensor, truncation: int, temperature: float = 1.0
) -> Tensor:
    """TKD(T): L1 between student and teacher, each renormalised over the teacher's T most likely experts.

    Source: arXiv 2310.18859, the training objective of the hash function.

    Args:
        student: [n, layers, experts] float32 logits.
        teacher: [n, layers, kept] logits of ``candidates``, most likely first (a constant shift does not matter).
        candidates: [n, layers, kept] integer experts.
        truncation: T; more than ``kept`` means all that are kept.

    Returns:
        A scalar: the mean over tokens and layers of the summed absolute difference (between 0 and 2).
    """
    if truncation < 1:
        raise ValueError(f"truncation is {truncation}, expected at least 1 expert")
    candidates = candidates[..., :truncation].long()
    wanted = (teacher[..., :truncation].float() / temperature).softmax(dim=-1)
    given = (student.gather(-1, candidates) / temperature).softmax(dim=-1)
    return (given - wanted).abs().sum(dim=-1).mean()


def membership_loss(student: Tensor, chosen: Tensor) -> Tensor:
    """Cross-entropy of whether each expert is among the chosen ones, summed over experts, for each choice.

    Args:
        student: [n, layers, experts] float32 logits.
        chosen: [n, layers, choices] int64.

    Returns:
        A scalar: the mean over tokens, layers and choices.
    """
    wanted = torch.zeros_like(student).scatter(-1, chosen, 1.0)
    return F.binary_cross_entropy_with_logits(student, wanted) * (student.shape[-1] / chosen.shape[-1])


def predictor_loss(student: Tensor, trace: Trace, options: TrainingOptions) -> Tensor:
    """For student logits [N, layers, experts]: TKD(T) + lambda * CE with the router's first choice; for a decoder-only
    model, whose router chooses several experts, whether each is among them."""
    if isinstance(trace, CausalTrace):
        return membership_loss(student, trace.chosen)
    distilled = truncated_distillation(student, trace.logits, trace.candidates, options.truncation, options.temperature)
    return distilled + options.top1_weight * F.cross_entropy(student.flatten(0, 1), trace.top1.flatten())
