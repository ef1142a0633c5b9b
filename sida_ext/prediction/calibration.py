"""How far a predictor's probabilities can be trusted: temperature, expected calibration error, reliability."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def fit_temperature(logits: Tensor, label: Tensor) -> Tensor:
    """The temperature of each layer that makes the labels most likely under softmax(logits / temperature).

    A golden-section search over log temperature: the likelihood has one maximum in 1/temperature.

    Args:
        logits: [n, layers, experts] float32.
        label: [n, layers] int64, the router's first choice.

    Returns:
        [layers] float32 in [1e-4, 1e2]; ones where n is 0.
    """
    if logits.shape[0] == 0:
        return torch.ones(logits.shape[1])
    found = []
    for layer in range(logits.shape[1]):
        scores, wanted = logits[:, layer].float(), label[:, layer]

        def loss(log_temperature: float, scores: Tensor = scores, wanted: Tensor = wanted) -> float:
            scaled = scores * float(torch.tensor(-log_temperature).exp())
            return float(torch.nn.functional.cross_entropy(scaled, wanted))

        ratio = (5**0.5 - 1) / 2
        # A flat router has margins of hundredths, and its shadow needs a temperature as small.
        low, high = math.log(1e-4), math.log(1e2)
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        at_left, at_right = loss(left), loss(right)
        for _ in range(28):
            if at_left < at_right:
                high, right, at_right = right, left, at_left
                left = high - ratio * (high - low)
                at_left = loss(left)
            else:
                low, left, at_left = left, right, at_right
                right = low + ratio * (high - low)
                at_right = loss(right)
        found.append((low + high) / 2)
    return torch.tensor(found).exp()


@dataclass
class Reliability:
    """Predicted probability against what happened, in equal bins over [0, 1], summed over batches.

    Attributes:
        count, confidence, correct: [bins] float64: predictions, their summed probability, how many came true.
    """

    count: Tensor
    confidence: Tensor
    correct: Tensor

    @classmethod
    def empty(cls, bins: int = 15) -> Reliability:
        return cls(*(torch.zeros(bins, dtype=torch.float64) for _ in range(3)))

    def add(self, probability: Tensor, happened: Tensor) -> None:
        """Count predictions: probability [n] in [0, 1], happened [n] bool."""
        bins = self.count.numel()
        place = (probability * bins).long().clamp(0, bins - 1)
        self.count.index_add_(0, place, torch.ones_like(probability, dtype=torch.float64))
        self.confidence.index_add_(0, place, probability.double())
        self.correct.index_add_(0, place, happened.double())

    @property
    def ece(self) -> float:
        """Expected calibration error: the mean of |confidence - accuracy| over bins, weighted by count."""
        total = float(self.count.sum())
        return float((self.confidence - self.correct).abs().sum()) / total if total else 0.0

    def curve(self) -> list[dict[str, float]]:
        """One entry for each bin that was met: mean probability, share that came true, count."""
        return [
            {"confidence": float(c / n), "accuracy": float(k / n), "count": int(n)}
            for n, c, k in zip(self.count, self.confidence, self.correct, strict=True)
            if n > 0
        ]
