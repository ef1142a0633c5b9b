"""Which experts of a queued batch are worth reading ahead: the chance of a need against the cost of a wrong guess."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sida_ext.prediction.hash_table import HashTable

# Candidates of each token that are weighed where its router chooses one expert. More than these together hold a few
# thousandths of the probability.
CANDIDATES = 8
# A disk that is always reading loses as much by a wasted read as by a miss; docs/predictor_figures.md has both sides.
WASTE_COST = 1.0
# What is needed with less than this is not read ahead, even where a wasted read costs nothing.
NO_NEED = 1e-30


def worth_asking(choices: int) -> int:
    """Candidates of each token to ask a predictor for, where a router chooses so many experts."""
    return max(CANDIDATES, 3 * choices)


def candidates_of(predictor: object, experts: int) -> int:
    """Candidates to ask a predictor for: as many as it says are worth it (``candidates``), else eight."""
    return min(int(getattr(predictor, "candidates", CANDIDATES)), experts)


@dataclass(frozen=True)
class PrefetchPolicy:
    """An expert is read ahead if p * (cost of a miss) > (1 - p) * (cost of a wasted read), p its probability of need.

    Args:
        waste_cost: cost of a wasted read as a share of the cost of a miss; 0 reads every candidate.
        routing: the model's; with "predicted" the first choices are all that the batch can want.
        confidence: of routing="confident": a first choice at least so probable is certain to be wanted.

    Raises:
        ValueError: waste_cost is negative or no number.
    """

    waste_cost: float = WASTE_COST
    routing: str = "router"
    confidence: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.waste_cost, bool) or not isinstance(self.waste_cost, (int, float)):
            raise ValueError(f"waste_cost is {self.waste_cost!r}, expected a number")
        if not 0 <= self.waste_cost < float("inf"):
            raise ValueError(
                f"waste_cost is {self.waste_cost!r}, expected the cost of a wasted read as a share of that of a miss: "
                "a number of at least 0"
            )

    @property
    def least_need(self) -> float:
        """The probability of need from which reading ahead is worth it."""
        return self.waste_cost / (1 + self.waste_cost)

    def experts_by_layer(self, table: HashTable, experts: int | None = None) -> list[list[int]]:
        """Distinct experts of each layer to read ahead, most wanted first.

        A table without calibrated probabilities gives no reason to choose: all first choices are read, and they alone.

        Args:
            experts: of a layer; None: as many as the table names.
        """
        if table.probability is None or self.routing == "predicted":
            return table.top(1).experts_by_layer(experts)
        chance = table.probability
        if self.routing == "confident":
            certain = torch.zeros_like(chance)
            certain[..., 0] = 1.0
            chance = torch.where(chance[..., :1] >= self.confidence, certain, chance)
        return table.experts_by_layer(experts, max(self.least_need, NO_NEED), chance)

    def experts(self, table: HashTable, layer: int) -> list[int]:
        """Those of one layer."""
        return self.experts_by_layer(table)[layer]
