"""How far a predictor's probabilities can be trusted: temperature, expected calibration error, reliability."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def fit_temperature(logits: Tensor, label: Tensor) -> Tensor:
    """The temperature of each layer that makes the labels most likely under softmax(logits / temperature).

    Args:
        logits: [n, layers, experts] float32.
        label: [n, layers] int64, the router's first choice.

    Returns:
        [layers] float32 in [1e-4, 1e2]; ones where n is 0.
    """
    return _fit(logits, label, torch.nn.functional.cross_entropy)


def fit_chosen_temperature(logits: Tensor, chosen: Tensor) -> Tensor:
    """As :func:`fit_temperature` for sigmoid(logits / temperature), the probability that an expert is among the chosen.

    Args:
        chosen: [n, layers, choices] int64, the experts that the router chose.
    """

    def loss(scaled: Tensor, wanted: Tensor) -> Tensor:
        return torch.nn.functional.binary_cross_entropy_with_logits(
            scaled, torch.zeros_like(scaled).scatter(-1, wanted, 1.0)
        )

    return _fit(logits, chosen, loss)


def fit_mixture(features: Tensor, happened: Tensor, steps: int = 25) -> Tensor:
    """Weights w for which sigmoid(features @ w) tells best what happened: a logistic regression by Newton's method,
    with a ridge so small that it only decides where the features do not.

    Args:
        features: [n, m] float.
        happened: [n] bool.

    Returns:
        [m] float32.
    """
    x, y = features.double(), happened.double()
    weights = torch.zeros(x.shape[1], dtype=torch.float64)
    ridge = 1e-6 * x.shape[0] * torch.eye(x.shape[1], dtype=torch.float64)
    for _ in range(steps):
        p = (x @ weights).sigmoid()
        slope = x.T @ (p - y) + ridge @ weights
        step = torch.linalg.solve((x * (p * (1 - p)).unsqueeze(-1)).T @ x + ridge, slope)
        # A whole step from far away overshoots.
        weights = weights - step * min(1.0, 4.0 / float(step.abs().max().clamp(min=1e-12)))
        if float(step.abs().max()) < 1e-9:
            break
    return weights.float()


def _fit(logits: Tensor, wanted: Tensor, measure: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """A golden-section search over each layer's log temperature: a likelihood has one maximum in 1/temperature."""
    if logits.shape[0] == 0:
        return torch.ones(logits.shape[1])
    found = []
    for layer in range(logits.shape[1]):
        scores, labels = logits[:, layer].float(), wanted[:, layer]

        def loss(log_temperature: float, scores: Tensor = scores, labels: Tensor = labels) -> float:
            return float(measure(scores * float(torch.tensor(-log_temperature).exp()), labels))

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
