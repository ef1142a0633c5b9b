"""HashPredictor: a small network that reads a batch's token embeddings and names every layer's experts at once."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from sida_ext.prediction.calibration import fit_mixture
from sida_ext.prediction.causal_net import CausalNet, causal_options, copy_causal
from sida_ext.prediction.files import write_predictor
from sida_ext.prediction.hash_table import HashTable
from sida_ext.prediction.learned_steps import LearnedSteps, log_odds
from sida_ext.prediction.moe_facts import check_tokens, check_top_k, predicted_stack, stack_facts
from sida_ext.prediction.nets import PaperNet, pack_left
from sida_ext.prediction.network_predictor import NetworkPredictor
from sida_ext.prediction.shadow_net import ShadowNet, copy_backbone, shadow_options
from sida_ext.prediction.token_table import TokenTablePredictor

if TYPE_CHECKING:
    from collections.abc import Iterable

    from typing_extensions import Self

DEFAULT_VARIANT = "shadow"
CAUSAL = "causal"
_NOT_CHOSEN = -30.0  # logit of padding behind the longest sentence, which the network is not run on


class HashPredictor(NetworkPredictor):
    """Predicts the routing of an encoder, or of a decoder-only model's prompts, from token embeddings; a ``Predictor``.

    Padding never influences another position: each row's real tokens are moved to its front before the network runs
    and masked in it, so left, right and no padding give the same predictions up to rounding.

    Variants: "shadow" (ours, see shadow_net; ``for_model`` fills in its sizes) and "paper" (exactly as published) for
    encoders, "causal" (see causal_net) for decoder-only models, where no token's prediction reads a later token.
    """

    kind = "hash_predictor"
    stacks = ("encoder", "causal")
    nets: ClassVar[dict[str, type[nn.Module]]] = {"paper": PaperNet, "shadow": ShadowNet, CAUSAL: CausalNet}

    def __init__(
        self,
        embedding: Tensor,
        layers: int,
        experts: int,
        model_fingerprint: str,
        variant: str = DEFAULT_VARIANT,
        **options: Any,
    ) -> None:
        super().__init__(embedding, layers, experts, model_fingerprint, variant, **options)
        self.stack = CAUSAL if variant == CAUSAL else "encoder"
        self.table: TokenTablePredictor | None = None  # joined to the network
        self.mixture = torch.zeros(layers, 3)  # weights of the network's logit and the table's, and an offset
        self.steps: LearnedSteps | None = None  # of the same model's single tokens

    @classmethod
    def for_model(cls, model: nn.Module, variant: str | None = None, seed: int = 0, **options: Any) -> Self:
        """An untrained predictor of the right sizes for ``model``; what is random in it depends on ``seed`` alone.

        Args:
            variant: None: "causal" for a decoder-only model, "shadow" for an encoder.
        """
        stack = predicted_stack(model)
        variant = variant or (CAUSAL if stack == CAUSAL else DEFAULT_VARIANT)
        if (variant == CAUSAL) != (stack == CAUSAL):
            fitting = repr(CAUSAL) if stack == CAUSAL else f"{DEFAULT_VARIANT!r} or 'paper'"
            raise ValueError(f"variant is {variant!r}, expected {fitting} for {type(model).__name__}")
        facts = stack_facts(model, stack)
        if variant == "shadow":
            options = shadow_options(facts.stack, facts.blocks, **options)
        elif variant == CAUSAL:
            options = causal_options(model, facts, **options)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = cls(facts.embedding, facts.layers, facts.experts, facts.fingerprint, variant, **options)
        if isinstance(made.net, ShadowNet):
            copy_backbone(made.net, facts.stack)
        elif isinstance(made.net, CausalNet):
            copy_causal(made.net, model, facts)
        return made

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits over experts, [B, S, layers, experts] float32; at padding they mean nothing. Of an encoder's experts
        as a softmax takes them, of a decoder-only model's each on its own, as a sigmoid does.

        Args:
            input_ids: [B, S] int32 or int64.
            attention_mask: [B, S], 1 for tokens and 0 for padding; None: all are tokens.
        """
        real = check_tokens(input_ids, attention_mask)
        return self._logits(self.here(input_ids), self.here(real))

    def _logits(self, input_ids: Tensor, real: Tensor) -> Tensor:
        if input_ids.numel() == 0:
            return torch.zeros(*input_ids.shape, self.layers, self.experts, device=input_ids.device)
        order, length = pack_left(real)
        longest = max(int(length.max()), 1)
        known = real | ((input_ids >= 0) & (input_ids < self.vocabulary))
        packed = input_ids.masked_fill(~known, 0).long().gather(1, order)[:, :longest]
        present = torch.arange(longest, device=length.device)[None] < length[:, None]
        logits = self.net(self.embedded(packed), present)
        # Back to the places where the tokens stood.
        spread = logits.new_full(
            (*input_ids.shape, self.layers, self.experts), _NOT_CHOSEN if self.choices_apart else 0
        )
        place = order[:, :longest, None, None].expand_as(logits)
        return spread.scatter(1, place, logits)

    @torch.no_grad()
    def predict(self, input_ids: Tensor, attention_mask: Tensor | None = None, top_k: int = 1) -> HashTable:
        """See ``Predictor.predict``. gate is the softmax of the logits, probability the calibrated one: of being the
        router's first choice, or with several choices for each token of being among them."""
        check_top_k(top_k, self.experts)
        real = self.here(check_tokens(input_ids, attention_mask))
        return self._table(self._chosen(self._logits(self.here(input_ids), real), input_ids), real, top_k)

    def join_table(self, table: TokenTablePredictor, traces: Iterable[Any]) -> None:
        """Of a decoder-only model: weigh the network's logit and the token table's into one, layer by layer, by a
        logistic regression on what the routers chose. So the predictor is no worse than the table wherever that knows
        more, as with little training or a shadow much narrower than the model.

        Args:
            table: counted on what the network was trained on.
            traces: of text that neither was trained on, with ``padded`` and ``chosen`` (``training.traces``).
        """
        if not self.choices_apart:
            return
        features: list[list[Tensor]] = [[] for _ in range(self.layers)]
        happened: list[list[Tensor]] = [[] for _ in range(self.layers)]
        with torch.no_grad():
            for trace in traces:
                for rows in torch.arange(trace.rows).split(16):
                    part = trace.select(rows)
                    input_ids, mask = part.padded()
                    ours = self(input_ids, mask.long())[mask] / self.temperature[:, None]
                    known = log_odds(table.probabilities(part.input_ids))
                    chosen = torch.zeros_like(ours).scatter(-1, part.chosen, 1.0) > 0
                    for layer in range(self.layers):
                        both = torch.stack([ours[:, layer], known[:, layer]], dim=-1).flatten(0, 1)
                        features[layer].append(torch.cat([both, torch.ones(len(both), 1)], dim=-1))
                        happened[layer].append(chosen[:, layer].flatten())
        each = [fit_mixture(torch.cat(f), torch.cat(h)) for f, h in zip(features, happened, strict=True)]
        self.table, self.mixture = table, torch.stack(each)

    def _chosen(self, logits: Tensor, input_ids: Tensor) -> Tensor:
        """The network's logits [B, S, layers, experts] of being chosen, with what a joined table says."""
        if self.table is None or input_ids.numel() == 0:
            return logits
        tokens, place = torch.unique(input_ids.cpu().long(), return_inverse=True)
        known = log_odds(self.table.probabilities(tokens.clamp(min=0)))[place].to(logits.device)
        ours, theirs, offset = (self.mixture[:, n, None].to(logits.device) for n in range(3))
        # Calibrated as it is: the temperature is taken out again where it is put in.
        return (ours * logits / self.temperature[:, None] + theirs * known + offset) * self.temperature[:, None]

    def description(self) -> dict[str, Any]:
        found = super().description()
        if self.table is not None:
            found["table_backoff"] = self.table.backoff
        if self.steps is not None:
            found["steps"] = {"held_out_top1": self.steps.held_out_top1}
        return found

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        tensors = self._stored()
        if self.table is not None:
            tensors |= {f"table.{name}": t for name, t in self.table.tensors().items()} | {"mixture": self.mixture}
        if self.steps is not None:
            tensors |= {f"steps.{name}": t for name, t in self.steps.tensors().items()}
        write_predictor(path, self.description(), tensors)

    def _load(self, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        counted = {name.removeprefix("table."): t for name, t in tensors.items() if name.startswith("table.")}
        own = {n: t for n, t in tensors.items() if not n.startswith(("table.", "steps.")) and n != "mixture"}
        super()._load(config, own)
        if counted:
            self.mixture = tensors["mixture"]
            self.table = TokenTablePredictor(
                self.vocabulary,
                self.layers,
                self.experts,
                self.model_fingerprint,
                config["table_backoff"],
                CAUSAL,
                self.choices,
            )
            self.table.set_tensors(counted)
            if "steps" in config:  # files of before have none
                learned = (tensors["steps.weights"], tensors["steps.joined"], config["steps"]["held_out_top1"])
                self.steps = LearnedSteps(self.table, *learned)

    def _padding_need(self, tempered: Tensor, real: Tensor) -> Tensor | None:
        """[layers, experts]: the largest probability that any padding position gives to an expert; None without any.

        The largest and not 1 - prod(1 - p): padding positions of a sentence see almost the same and choose alike. The
        shadow reads them as the model does, as tokens behind the sentence that nothing attends to.
        """
        if bool(real.all()) or not isinstance(self.net, (ShadowNet, CausalNet)):
            return None
        chance = tempered[~real].sigmoid() if self.choices_apart else tempered[~real].softmax(dim=-1)
        return chance.amax(dim=0)
