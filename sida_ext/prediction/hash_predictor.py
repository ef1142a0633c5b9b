"""HashPredictor: a small network that reads a batch's token embeddings and names every layer's experts at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from sida_ext.prediction.hash_table import HashTable
from sida_ext.prediction.moe_facts import check_tokens, check_top_k, stack_facts
from sida_ext.prediction.nets import PaperNet, pack_left
from sida_ext.prediction.network_predictor import NetworkPredictor
from sida_ext.prediction.shadow_net import ShadowNet, copy_backbone, shadow_options

if TYPE_CHECKING:
    from typing_extensions import Self

DEFAULT_VARIANT = "shadow"


class HashPredictor(NetworkPredictor):
    """Predicts the encoder's routing from token embeddings; a ``Predictor``.

    Padding never influences another position: each row's real tokens are moved to its front before the network runs
    and masked in it, so left, right and no padding give the same predictions up to rounding.

    Variants: "shadow" (ours, see shadow_net; ``for_model`` fills in its sizes) and "paper" (exactly as published).
    """

    kind = "hash_predictor"
    stack = "encoder"
    nets: ClassVar[dict[str, type[nn.Module]]] = {"paper": PaperNet, "shadow": ShadowNet}

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

    @classmethod
    def for_model(cls, model: nn.Module, variant: str = DEFAULT_VARIANT, seed: int = 0, **options: Any) -> Self:
        """An untrained predictor of the right sizes for ``model``; what is random in it depends on ``seed`` alone."""
        facts = stack_facts(model, cls.stack)
        if variant == "shadow":
            options = shadow_options(facts.stack, facts.blocks, **options)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = cls(facts.embedding, facts.layers, facts.experts, facts.fingerprint, variant, **options)
        if isinstance(made.net, ShadowNet):
            copy_backbone(made.net, facts.stack)
        return made

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits over experts, [B, S, layers, experts] float32; at padding they mean nothing.

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
        spread = logits.new_zeros(*input_ids.shape, self.layers, self.experts)
        place = order[:, :longest, None, None].expand_as(logits)
        return spread.scatter(1, place, logits)

    @torch.no_grad()
    def predict(self, input_ids: Tensor, attention_mask: Tensor | None = None, top_k: int = 1) -> HashTable:
        """See ``Predictor.predict``. gate is the softmax of the logits, probability the calibrated one."""
        check_top_k(top_k, self.experts)
        real = self.here(check_tokens(input_ids, attention_mask))
        return self._table(self._logits(self.here(input_ids), real), real, top_k)

    def _padding_need(self, tempered: Tensor, real: Tensor) -> Tensor | None:
        """[layers, experts]: the largest probability that any padding position gives to an expert; None without any.

        The largest and not 1 - prod(1 - p): padding positions of a sentence see almost the same and choose alike. The
        shadow reads them as the model does, as tokens behind the sentence that nothing attends to.
        """
        if bool(real.all()) or not isinstance(self.net, ShadowNet):
            return None
        return tempered[~real].softmax(dim=-1).amax(dim=0)
