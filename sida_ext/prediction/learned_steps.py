"""Steps of a decoder-only model, learned: what the next token's routers will choose, before the step runs.

Known at the start of a step are the token that was just chosen and the experts of the tokens before it. A token table
knows the first, two sums that forget at different speeds know the second; a logistic regression for each layer makes
one probability of them. While the step runs, the routers of later layers may be asked early
(:class:`~sida_ext.prediction.router_lookahead.RouterLookahead`); a second regression for each layer and distance joins
what they say. Each was fitted on text that nothing else was trained on, so that more knowledge never means more waste.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sida_ext.prediction.hash_table import HashTable
from sida_ext.prediction.moe_facts import check_tokens, check_top_k
from sida_ext.prediction.prefetch import WASTE_COST, worth_asking

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sida_ext.prediction.token_table import TokenTablePredictor

__all__ = ["DISTANCES", "KNOWLEDGE", "LearnedSteps", "StepState", "log_odds"]

FADING = (0.8, 0.97)  # what is left of a use after one more token
KNOWLEDGE = 2 + len(FADING) + 1  # of a step: the table, the last token's experts, the sums, an offset
JOINED = 3  # of a layer ahead: the step's log odds, the router's margin, an offset
DISTANCES = 3  # layers ahead for which a router's answer is joined
REMEMBERED = 1024  # tokens whose table rows are kept
_RESTS = torch.tensor(FADING)[:, None, None, None]


def log_odds(probability: Tensor) -> Tensor:
    """The logit of a probability that is not believed to be 0 or 1."""
    return probability.clamp(1e-4, 1 - 1e-4).logit()


@dataclass(frozen=True)
class StepState:
    """What the tokens so far went to.

    Attributes:
        last: [B, layers, experts] float32, 1 for the experts of the last token.
        faded: [len(FADING), B, layers, experts] float32, how often each expert was chosen, older tokens counting less.
    """

    last: Tensor
    faded: Tensor

    def select(self, index: Tensor) -> StepState:
        return StepState(self.last.index_select(0, index), self.faded.index_select(1, index))


class LearnedSteps:
    """Names the experts of a decoder-only model's next step; a ``DecoderPredictor`` that is told what was chosen.

    Args:
        table: of the model, from whose counts the token's part comes.
        weights: [layers, KNOWLEDGE] float32, of the token's log odds, of the last token's experts, of the log odds of
            the fading sums, and the offset.
        joined: [layers, DISTANCES, JOINED] float32, of the step's log odds, of the margin of a layer's router asked so
            many layers before, and the offset; (1, 0, 0) where no router was asked.
        held_out_top1: share of tokens and layers whose most probable expert was among the chosen on held-out text; what
            drift is measured by. None: not known.

    Raises:
        ValueError: a table of another stack, or weights of another shape.
    """

    state_of_tokens = False  # its state is made of what ``observe`` is told alone

    def __init__(
        self, table: TokenTablePredictor, weights: Tensor, joined: Tensor, held_out_top1: float | None = None
    ) -> None:
        if table.stack != "causal":
            raise ValueError(
                f"the token table is of the {table.stack!r}, expected one of a decoder-only model ('causal')"
            )
        for name, value, shape in (
            ("weights", weights, (table.layers, KNOWLEDGE)),
            ("joined", joined, (table.layers, DISTANCES, JOINED)),
        ):
            if tuple(value.shape) != shape or not bool(value.isfinite().all()):
                raise ValueError(f"{name} is {value.dtype} {tuple(value.shape)}, expected finite numbers {shape}")
        self.table, self.weights, self.joined = table, weights.float(), joined.float()
        self.layers, self.experts, self.choices = table.layers, table.experts, table.choices
        self.held_out_top1 = held_out_top1
        self.candidates = min(self.experts, worth_asking(self.choices))
        self.min_need = WASTE_COST / (1 + WASTE_COST)
        self._by_knowledge = self.weights.T[:, :, None].contiguous()  # [KNOWLEDGE, layers, 1]
        self._by_distance: list[list[list[float]]] = self.joined.tolist()
        self._rows: OrderedDict[int, Tensor] = OrderedDict()  # token -> log odds [layers, experts], the latest last

    @classmethod
    def untrained(cls, table: TokenTablePredictor) -> LearnedSteps:
        """Says what the table says, whatever the routers answer."""
        weights, joined = torch.zeros(table.layers, KNOWLEDGE), torch.zeros(table.layers, DISTANCES, JOINED)
        weights[:, 0], joined[..., 0] = 1.0, 1.0
        return cls(table, weights, joined)

    def start(self, encoder_output: Tensor, attention_mask: Tensor | None) -> StepState:
        """See ``DecoderPredictor.start``; there is no encoder, and of its result [B, 0, 0] only the rows count."""
        rows = encoder_output.shape[0]
        marginal = self.table.marginal.expand(len(FADING), rows, -1, -1)
        return StepState(torch.zeros(rows, self.layers, self.experts), marginal.clone())

    def step(self, state: StepState, input_ids: Tensor) -> tuple[HashTable, StepState]:
        """See ``DecoderPredictor.step``. The state stays as it is until ``observe`` tells what was chosen."""
        chance = self.odds(state, input_ids).sigmoid()
        best, index = chance.topk(self.candidates, dim=-1)
        shape = (*input_ids.shape, self.layers, self.candidates)
        best = best.view(shape).clamp(0, 1)
        return HashTable(index.view(shape), best, best), state

    def reorder(self, state: StepState, index: Tensor) -> StepState:
        """See ``DecoderPredictor.reorder``."""
        return state.select(index.cpu())

    def predict(self, input_ids: Tensor, attention_mask: Tensor | None = None, top_k: int = 1) -> HashTable:
        """See ``Predictor.predict``: the token table's, since of a text that has not run nothing was chosen yet."""
        check_top_k(top_k, self.experts)
        return self.table.predict(input_ids, attention_mask, top_k)

    def odds(self, state: StepState, input_ids: Tensor) -> Tensor:
        """Log odds of every expert's being chosen, [B * T, layers, experts] float32, for the tokens [B, T] of a step;
        of several tokens each is judged by what came before the step."""
        if state.last.shape[0] != input_ids.shape[0]:
            raise ValueError(
                f"the state is of {state.last.shape[0]} rows, input_ids of {input_ids.shape[0]}, expected as many"
            )
        check_tokens(input_ids, None)
        known = self.knowledge(state)
        past = known[0] * self._by_knowledge[1]
        for part, weight in zip((*known[1:], 1.0), self._by_knowledge[2:], strict=True):
            past = past + part * weight
        told = torch.stack([self.told(token) for token in input_ids.reshape(-1).tolist()])
        return torch.addcmul(past.repeat_interleave(input_ids.shape[1], dim=0), told, self._by_knowledge[0])

    def knowledge(self, state: StepState) -> tuple[Tensor, ...]:
        """What is known before the token: the last token's experts and log odds of the fading sums, each
        [B, layers, experts]."""
        return state.last, *log_odds(state.faded)

    def observe(self, state: StepState, chosen: Tensor) -> StepState:
        """The state after tokens have run.

        Args:
            chosen: [B, T, layers, choices] integers, the experts of each; -1: none, as at padding.
        """
        index = chosen.long().clamp(min=-1).masked_fill(chosen >= self.experts, -1)
        if chosen.shape[1] == 1:  # in few calls: this is what each step of generate costs
            hot = state.last.new_zeros(*state.last.shape[:2], self.experts + 1)
            hot = hot.scatter_(2, torch.where(index < 0, self.experts, index)[:, 0], 1.0)[..., : self.experts]
            return StepState(hot, torch.lerp(hot.expand_as(state.faded), state.faded, _RESTS))
        real = (index >= 0).flatten(2).any(-1)  # [B, T]
        after = real.flip(1).cumsum(1).flip(1) - real.long()  # real tokens behind each
        # A column that takes what chose none.
        place = torch.where(index < 0, self.experts, index).permute(0, 2, 1, 3).flatten(2)  # [B, layers, T * choices]
        sums = []
        for rest, faded in zip(FADING, state.faded, strict=True):
            fresh = faded.new_zeros(*faded.shape[:2], self.experts + 1)
            worth = (1 - rest) * rest ** after.float()
            worth = worth[:, None, :, None].expand(-1, self.layers, -1, chosen.shape[-1]).flatten(2)
            fresh.scatter_add_(2, place, worth)
            left = rest ** real.sum(1).float()
            sums.append(faded * left[:, None, None] + fresh[..., : self.experts])
        last = state.last
        if bool(real.any()):
            latest = torch.where(real, torch.arange(real.shape[1]), -1).amax(1)
            one = index[torch.arange(len(index)), latest.clamp(min=0)]
            hot = last.new_zeros(*last.shape[:2], self.experts + 1)
            hot.scatter_(2, torch.where(one < 0, self.experts, one), 1.0)
            last = torch.where((latest >= 0)[:, None, None], hot[..., : self.experts], last)
        return StepState(last, torch.stack(sums))

    def joined_odds(self, odds: Tensor, layer: int, distance: int, margin: Tensor | None) -> Tensor:
        """The step's log odds of one layer, joined with what its router says.

        Args:
            odds: [tokens, experts], of ``layer``.
            distance: layers ahead at which the router was asked.
            margin: [tokens, experts] (:meth:`~sida_ext.prediction.router_asking.AskedRouter.margin`); None: not asked.
        """
        if margin is None or distance > DISTANCES:
            return odds
        step, router, offset = self._by_distance[layer][distance - 1]
        return torch.add(torch.add(offset, odds, alpha=step), margin, alpha=router)

    def tensors(self) -> dict[str, Tensor]:
        """What was fitted, as files keep it beside the table."""
        return {"weights": self.weights, "joined": self.joined}

    def told(self, token: int) -> Tensor:
        """Log odds [layers, experts] by the table alone."""
        found = self._rows.get(token)
        if found is None:
            found = self._rows[token] = log_odds(self.table.probabilities(torch.tensor([token])))[0]
            if len(self._rows) > REMEMBERED:
                self._rows.popitem(last=False)
        else:
            self._rows.move_to_end(token)
        return found


def needed(odds: Tensor, least: float) -> list[int]:
    """Experts that some token of a step needs with a probability of at least ``least``, most likely first.

    Args:
        odds: [tokens, experts] log odds of each token's choosing each expert.
    """
    chance = odds[0].sigmoid() if len(odds) == 1 else -torch.expm1(torch.log1p(-odds.sigmoid()).sum(0))
    values = chance.tolist()
    named = [expert for expert, value in enumerate(values) if value >= least and value > 0]
    return sorted(named, key=lambda expert: (-values[expert], expert))


def odds_of_table(table: HashTable, experts: int) -> Tensor:
    """Log odds [tokens, layers, experts] of a hash table; what it does not name is taken as never wanted."""
    index = table.expert_index.flatten(0, 1).long()
    chance = index.new_zeros((*index.shape[:2], experts + 1), dtype=torch.float32)
    chance.scatter_reduce_(2, torch.where(index < 0, experts, index), table.chance.flatten(0, 1), "amax")
    return torch.where(chance > 0, log_odds(chance), -torch.inf)[..., :experts]


def learned_steps_of(predictors: Iterable[Any]) -> Any:
    """The first of ``predictors`` that predicts steps, or the steps that one of them has learned; None: none."""
    for predictor in predictors:
        if all(callable(getattr(predictor, name, None)) for name in ("start", "step", "reorder")):
            return predictor
        if isinstance(steps := getattr(predictor, "steps", None), LearnedSteps):
            return steps
    return None
