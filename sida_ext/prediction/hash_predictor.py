"""HashPredictor: a small network that reads a batch's token embeddings and names every layer's experts at once."""

from __future__ import annotations

import os
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sida_ext.prediction.files import PredictorError, field, read_config, read_predictor, write_predictor
from sida_ext.prediction.hash_table import NO_EXPERT, HashTable
from sida_ext.prediction.moe_facts import check_tokens, check_top_k, stack_facts
from sida_ext.prediction.nets import ContextNet, PaperNet, pack_left
from sida_ext.prediction.shadow_net import ShadowNet, copy_backbone, shadow_options

_NETS: dict[str, type[nn.Module]] = {"paper": PaperNet, "context": ContextNet, "shadow": ShadowNet}
DEFAULT_VARIANT = "shadow"


class HashPredictor(nn.Module):
    """Predicts the routing of one stack from token embeddings; a ``Predictor``.

    Padding never influences another position: each row's real tokens are moved to its front before the network runs
    and masked in it, so left, right and no padding give the same predictions up to rounding.

    Args:
        embedding: [vocabulary, d_model], the model's own frozen token embeddings; referred to, never saved.
        layers, experts: MoE layers of the stack, experts in each.
        model_fingerprint: of that stack; see ``moe_facts.fingerprint``.
        variant: "shadow" (ours, see shadow_net), "context" (ours, without the model's structure) or "paper" (exactly as
            published).
        stack: "encoder" or "decoder".
        options: sizes of the network, e.g. ``hidden``; ``for_model`` fills in what a shadow needs.
    """

    kind = "hash_predictor"
    nets: ClassVar[dict[str, type[nn.Module]]] = _NETS
    embedding: Tensor
    temperature: Tensor

    def __init__(
        self,
        embedding: Tensor,
        layers: int,
        experts: int,
        model_fingerprint: str,
        variant: str = DEFAULT_VARIANT,
        stack: str = "encoder",
        **options: Any,
    ) -> None:
        super().__init__()
        if variant not in self.nets:
            raise ValueError(f"variant is {variant!r}, expected one of {sorted(self.nets)}")
        if embedding.dim() != 2 or not embedding.is_floating_point():
            raise ValueError(f"embedding is {embedding.dtype} {tuple(embedding.shape)}, expected [vocabulary, d_model]")
        self.layers, self.experts, self.variant, self.stack = layers, experts, variant, stack
        self.model_fingerprint, self.options = model_fingerprint, dict(options)
        # Mean top-1 share on held-out text, once trained: what ``drift.DriftWatch`` compares with.
        self.held_out_top1: float | None = None
        self.path: str | None = None  # the folder that it was read from
        self.register_buffer("embedding", embedding.detach(), persistent=False)
        # Divides a layer's logits when they are read as probabilities of being the first choice; set by calibration.
        self.register_buffer("temperature", torch.ones(layers))
        self.net = self.nets[variant](embedding.shape[1], layers, experts, **options)

    @classmethod
    def for_model(
        cls, model: nn.Module, variant: str = DEFAULT_VARIANT, seed: int = 0, stack: str = "encoder", **options: Any
    ) -> HashPredictor:
        """An untrained predictor of the right sizes for ``model``; what is random in it depends on ``seed`` alone."""
        facts = stack_facts(model, stack)
        if stack != "encoder":
            raise ValueError(
                f"stack is {stack!r}; HashPredictor reads whole sentences and predicts the 'encoder'; for a decoder "
                "take a RecurrentPredictor"
            )
        if variant == "shadow":
            options = shadow_options(facts.stack, facts.blocks, **options)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = cls(facts.embedding, facts.layers, facts.experts, facts.fingerprint, variant, stack, **options)
        if isinstance(made.net, ShadowNet):
            copy_backbone(made.net, facts.stack)
        return made

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits over experts, [B, S, layers, experts] float32; at padding they mean nothing.

        Args:
            input_ids: [B, S] int32 or int64.
            attention_mask: [B, S], 1 for tokens and 0 for padding; None: all are tokens.
        """
        return self._logits(input_ids, check_tokens(input_ids, attention_mask, self.embedding.shape[0]))

    def _logits(self, input_ids: Tensor, real: Tensor) -> Tensor:
        if input_ids.numel() == 0:
            return torch.zeros(*input_ids.shape, self.layers, self.experts, device=input_ids.device)
        order, length = pack_left(real)
        longest = max(int(length.max()), 1)
        known = real | ((input_ids >= 0) & (input_ids < self.embedding.shape[0]))
        packed = input_ids.masked_fill(~known, 0).long().gather(1, order)[:, :longest]
        present = torch.arange(longest, device=length.device)[None] < length[:, None]
        logits = self.net(self.embedding[packed].float(), present)
        # Back to the places where the tokens stood.
        spread = logits.new_zeros(*input_ids.shape, self.layers, self.experts)
        place = order[:, :longest, None, None].expand_as(logits)
        return spread.scatter(1, place, logits)

    @torch.no_grad()
    def predict(self, input_ids: Tensor, attention_mask: Tensor | None = None, top_k: int = 1) -> HashTable:
        """See ``Predictor.predict``. gate is the softmax of the logits, probability the calibrated one."""
        check_top_k(top_k, self.experts)
        real = check_tokens(input_ids, attention_mask, self.embedding.shape[0])
        return self._table(self._logits(input_ids, real), real, top_k)

    def _table(self, logits: Tensor, real: Tensor, top_k: int) -> HashTable:
        """The ``top_k`` best candidates of logits [B, S, layers, experts], none where ``real`` [B, S] is False."""
        if not bool(torch.isfinite(logits).all()):
            raise ValueError(
                f"the {self.variant} predictor's logits hold NaN or inf; its weights are damaged or training diverged"
            )
        best, index = logits.topk(top_k, dim=-1)
        gate = (best - logits.logsumexp(dim=-1, keepdim=True)).exp()
        tempered = logits / self.temperature[:, None]
        probability = (best / self.temperature[:, None] - tempered.logsumexp(dim=-1, keepdim=True)).exp()
        padding = ~real[:, :, None, None]
        return HashTable(
            index.int().masked_fill(padding, NO_EXPERT),
            gate.clamp(0, 1).masked_fill(padding, 0.0),
            probability.clamp(0, 1).masked_fill(padding, 0.0),
            self._padding_need(tempered, real),
        )

    def _padding_need(self, tempered: Tensor, real: Tensor) -> Tensor | None:
        """[layers, experts]: the largest probability that any padding position gives to an expert; None without any.

        The largest and not 1 - prod(1 - p): padding positions of a sentence see almost the same and choose alike. The
        shadow reads them as the model does, as tokens behind the sentence that nothing attends to.
        """
        if bool(real.all()) or not isinstance(self.net, ShadowNet):
            return None
        return tempered[~real].softmax(dim=-1).amax(dim=0)

    def parameter_count(self) -> int:
        """Trained parameters; the model's embeddings are not among them."""
        return sum(p.numel() for p in self.parameters())

    def description(self) -> dict[str, Any]:
        """What a file says of this predictor, beside its weights."""
        return {
            "kind": self.kind,
            "model_fingerprint": self.model_fingerprint,
            "variant": self.variant,
            "stack": self.stack,
            "layers": self.layers,
            "experts": self.experts,
            "d_model": self.embedding.shape[1],
            "vocabulary": self.embedding.shape[0],
            "options": self.options,
            "held_out_top1": self.held_out_top1,
        }

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write the predictor to folder ``path`` without the model's embeddings; see ``predictor_files``.

        Weights that float16 holds exactly (as those of a trained predictor) are stored so, in half the space.
        """
        tensors = {n: t.half() if torch.equal(t.half().float(), t) else t for n, t in self.state_dict().items()}
        write_predictor(path, self.description(), tensors)

    @torch.no_grad()
    def round_weights(self) -> None:
        """Round the network's weights to float16's precision; a weight that float16 cannot hold stays as it is."""
        for weight in self.net.parameters():
            rounded = weight.half().float()
            weight.copy_(torch.where(rounded.isfinite(), rounded, weight))

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], model: nn.Module) -> HashPredictor:
        """Read a trained predictor for ``model``.

        Raises:
            PredictorError: nothing there, damaged, or of another model. Never a random predictor instead.
        """
        facts = stack_facts(model, field(read_config(path), "stack", str, path))
        config, tensors = read_predictor(path, cls.kind, facts.fingerprint)
        try:
            predictor = cls(
                facts.embedding,
                facts.layers,
                facts.experts,
                facts.fingerprint,
                field(config, "variant", str, path),
                config["stack"],
                **field(config, "options", dict, path),
            )
            predictor.load_state_dict(tensors)
            predictor.held_out_top1 = config.get("held_out_top1")
            predictor.path = os.fspath(path)
        except (RuntimeError, TypeError, ValueError) as error:
            if isinstance(error, PredictorError):
                raise
            raise PredictorError(f"{path}: the weights do not fit the network that it describes ({error})") from error
        return predictor.eval().requires_grad_(False)
