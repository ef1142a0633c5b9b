"""The hash table of one batch: which experts every token is expected to want in every MoE layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NO_EXPERT = -1


@dataclass(frozen=True)
class HashTable:
    """Experts and scaling factors that a predictor names for one batch and one stack's MoE layers.

    Attributes:
        expert_index: [B, S, layers, top_k] integer (int16, int32 or int64), most likely expert first; -1 where no
            expert is named (padding).
        gate: [B, S, layers, top_k] float32 in [0, 1]: the router probability that the expert's output is scaled by;
            0 where expert_index is -1.
        probability: optional, like ``gate``: the calibrated probability that this expert is the router's first choice.
            Without it ``gate`` stands in for it.
        padding_need: optional, [layers, experts] float32 in [0, 1]: the probability that some padding position is
            routed to the expert. A model's router routes padding as well; the table names no expert for it.

    Raises:
        TypeError, ValueError: at construction, naming the field, the value found and the value expected.
    """

    expert_index: Tensor
    gate: Tensor
    probability: Tensor | None = None
    padding_need: Tensor | None = None

    def __post_init__(self) -> None:
        index = self.expert_index
        if not isinstance(index, Tensor) or index.dtype not in (torch.int16, torch.int32, torch.int64):
            raise TypeError(f"HashTable.expert_index is {_kind(index)}, expected an int16, int32 or int64 tensor")
        if index.dim() != 4:
            raise ValueError(f"HashTable.expert_index has shape {tuple(index.shape)}, expected [B, S, layers, top_k]")
        absent = index < 0
        if bool((index < NO_EXPERT).any()):
            raise ValueError(f"HashTable.expert_index holds {int(index.min())}, expected experts >= 0, or -1 for none")
        for name in ("gate", "probability"):
            value = getattr(self, name)
            if value is None and name == "probability":
                continue
            if not isinstance(value, Tensor) or value.dtype != torch.float32:
                raise TypeError(f"HashTable.{name} is {_kind(value)}, expected a float32 tensor")
            if value.shape != index.shape:
                raise ValueError(
                    f"HashTable.{name} has shape {tuple(value.shape)}, expected expert_index's {tuple(index.shape)}"
                )
            if value.device != index.device:
                raise ValueError(f"HashTable.{name} is on {value.device}, expected expert_index's {index.device}")
            # Written so that NaN fails as well.
            if not bool(((value >= 0) & (value <= 1)).all()):
                bad = value[~((value >= 0) & (value <= 1))][0]
                raise ValueError(f"HashTable.{name} holds {float(bad)}, expected probabilities in [0, 1]")
            if bool((value[absent] != 0).any()):
                raise ValueError(f"HashTable.{name} is not 0 where expert_index is -1; no expert has no {name}")
        need = self.padding_need
        if need is not None:
            if not isinstance(need, Tensor) or need.dtype != torch.float32:
                raise TypeError(f"HashTable.padding_need is {_kind(need)}, expected a float32 tensor")
            if need.dim() != 2 or need.shape[0] != self.layers:
                raise ValueError(
                    f"HashTable.padding_need has shape {tuple(need.shape)}, expected [{self.layers} layers, experts]"
                )
            if not bool(((need >= 0) & (need <= 1)).all()):
                bad = need[~((need >= 0) & (need <= 1))][0]
                raise ValueError(f"HashTable.padding_need holds {float(bad)}, expected probabilities in [0, 1]")

    @property
    def batch_size(self) -> int:
        return self.expert_index.shape[0]

    @property
    def sequence_length(self) -> int:
        return self.expert_index.shape[1]

    @property
    def layers(self) -> int:
        return self.expert_index.shape[2]

    @property
    def top_k(self) -> int:
        return self.expert_index.shape[3]

    @property
    def chance(self) -> Tensor:
        """``probability``, or ``gate`` where there is none: how likely each candidate is the router's first choice."""
        return self.gate if self.probability is None else self.probability

    def check_for(self, input_ids: Tensor, layers: int, experts: int) -> None:
        """Check that the table is one for ``input_ids`` [B, S] and a stack of ``layers`` x ``experts``."""
        if tuple(self.expert_index.shape[:2]) != tuple(input_ids.shape):
            raise ValueError(
                f"the hash table is for {tuple(self.expert_index.shape[:2])} tokens; the batch has "
                f"{tuple(input_ids.shape)}"
            )
        if self.layers != layers:
            raise ValueError(f"the hash table has {self.layers} layers; the model's stack has {layers} MoE layers")
        if self.expert_index.numel() and int(self.expert_index.max()) >= experts:
            raise ValueError(
                f"the hash table names expert {int(self.expert_index.max())}; the model has experts 0..{experts - 1}"
            )
        if self.padding_need is not None and self.padding_need.shape[1] != experts:
            raise ValueError(
                f"the hash table's padding_need has {self.padding_need.shape[1]} experts; the model has {experts}"
            )

    def demand(self, layer: int) -> tuple[Tensor, Tensor]:
        """Distinct experts of a layer and the summed probability of each, most wanted first.

        Returns:
            experts [n] int64 and weight [n] float32: the number of tokens expected to choose the expert, as far as it
            is among their candidates. Equal weights are ordered by expert, so the result is deterministic.
        """
        return self._reduce(layer, none_wants=False)

    def need(self, layer: int) -> tuple[Tensor, Tensor]:
        """Distinct experts of a layer and the probability that at least one token chooses each, most likely first.

        Tokens are taken as independent given their probabilities, so it is 1 - prod(1 - p). This is what a prefetch
        weighs against the cost of a miss.
        """
        return self._reduce(layer, none_wants=True)

    def experts_of(self, layer: int, min_need: float = 0.0) -> list[int]:
        """Distinct experts that the batch wants in ``layer``; see :meth:`experts_by_layer`."""
        if not -self.layers <= layer < self.layers:
            raise IndexError(f"layer is {layer}; this hash table has layers 0..{self.layers - 1}")
        return self.experts_by_layer(min_need=min_need)[layer]

    def experts_by_layer(
        self, experts: int | None = None, min_need: float = 0.0, chance: Tensor | None = None
    ) -> list[list[int]]:
        """Distinct experts that the batch wants in each layer, the most wanted (by summed probability) first.

        This is the one rule of what is read ahead: :class:`~sida_ext.prediction.prefetch.PrefetchPolicy` says which
        ``min_need`` pays, and with which chances.

        Args:
            experts: of a layer; None: as many as the table names.
            min_need: leaves out experts whose probability of being needed at all (see :meth:`need`) is below it, and
                brings in those that padding needs with at least that probability, last. With several candidates for
                each token it trades coverage against waste; see docs/predictor_figures.md. 0: all that are named.
            chance: in the place of :attr:`chance`, of its shape.
        """
        if experts is None:
            named = int(self.expert_index.max()) + 1 if self.expert_index.numel() else 0
            experts = named if self.padding_need is None else self.padding_need.shape[1]
        # [layers, experts], and a last column for those that name none.
        index = self.expert_index.long().permute(2, 0, 1, 3).flatten(1)
        index = torch.where(index < 0, experts, index)
        each = (self.chance if chance is None else chance).permute(2, 0, 1, 3).flatten(1).double()
        # log1p(-1) is -inf, whose sum gives the probability 1 that a certain candidate asks for.
        both = torch.stack([each, torch.log1p(-each)])
        total, unwanted = both.new_zeros(2, self.layers, experts + 1).scatter_add(2, index.expand(2, -1, -1), both)
        order, need = total[:, :experts], -torch.expm1(unwanted[:, :experts])
        wanted = torch.zeros_like(total).scatter(1, index, 1.0)[:, :experts] > 0
        if min_need > 0:
            if self.padding_need is not None:
                padding = self.padding_need.double()
                need = 1 - (1 - need) * (1 - padding)
                # What padding alone needs stands behind all others: no sum of chances is below 0.
                order = torch.where(wanted, order, padding - 2)
                wanted = wanted | (padding > 0)
            wanted = wanted & (need.float() >= min_need)
        order = torch.sort(order.masked_fill(~wanted, -3.0), dim=1, descending=True, stable=True).indices
        count = wanted.sum(1).tolist()
        return [row[:n] for row, n in zip(order.tolist(), count, strict=True)]

    def top(self, top_k: int) -> HashTable:
        """The same table with only the first ``top_k`` candidates of each token."""
        if not 1 <= top_k <= self.top_k:
            raise ValueError(f"top_k is {top_k}; this hash table has 1..{self.top_k} candidates for each token")
        probability = None if self.probability is None else self.probability[..., :top_k]
        return HashTable(self.expert_index[..., :top_k], self.gate[..., :top_k], probability, self.padding_need)

    def _reduce(self, layer: int, none_wants: bool) -> tuple[Tensor, Tensor]:
        if not -self.layers <= layer < self.layers:
            raise IndexError(f"layer is {layer}; this hash table has layers 0..{self.layers - 1}")
        weight = self.chance[:, :, layer]
        experts, total = summed_by_expert(self.expert_index[:, :, layer], weight, none_wants)
        return experts, total.float()


def summed_by_expert(index: Tensor, weight: Tensor, none_wants: bool) -> tuple[Tensor, Tensor]:
    """Distinct experts among candidates, -1 left out, with the sum of their weights, greatest first.

    Args:
        index, weight: of one shape: experts, and the probability that the token chooses each.
        none_wants: instead of the sum, the probability that at least one token chooses it, 1 - prod(1 - weight).

    Returns:
        experts [n] int64 and total [n] float64; equal totals are ordered by expert.
    """
    index, weight = index.reshape(-1).long(), weight.reshape(-1)
    named = index >= 0
    index, weight = index[named], weight[named].double()
    if none_wants:
        # log1p(-1) is -inf, whose sum gives the probability 1 that a certain candidate asks for.
        weight = torch.log1p(-weight)
    experts, place = torch.unique(index, return_inverse=True)
    total = torch.zeros(experts.numel(), dtype=torch.float64, device=index.device).index_add_(0, place, weight)
    if none_wants:
        total = -torch.expm1(total)
    order = torch.sort(total, descending=True, stable=True).indices
    return experts[order], total[order]


def _kind(value: object) -> str:
    return f"a {value.dtype} tensor" if isinstance(value, Tensor) else f"a {type(value).__name__}"
