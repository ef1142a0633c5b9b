"""What every predictor with a trained network shares: its table, its calibration, its file."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from sida_ext.prediction.calibration import fit_chosen_temperature, fit_temperature
from sida_ext.prediction.files import PredictorError, field, read_config, read_predictor, write_predictor
from sida_ext.prediction.hash_table import NO_EXPERT, HashTable
from sida_ext.prediction.moe_facts import stack_facts
from sida_ext.prediction.prefetch import worth_asking

if TYPE_CHECKING:
    from collections.abc import Iterable

    from typing_extensions import Self

    from sida_ext.prediction.token_table import TokenTablePredictor


class NetworkPredictor(nn.Module):
    """A network over the token embeddings of one stack, with a temperature for each layer.

    Args:
        embedding: [vocabulary, d_model], the model's own frozen token embeddings; referred to, never saved. Those of a
            model on a GPU are copied to the CPU, where predictions are made while the GPU computes; ``to(device)``
            moves both embeddings and weights.
        layers, experts: MoE layers of the stack, experts in each.
        model_fingerprint: of that stack; see ``moe_facts.fingerprint``.
        variant: one of ``nets``.
        options: sizes of the network, e.g. ``hidden``.
    """

    kind: ClassVar[str]
    stack: str  # "encoder", "decoder" or "causal"
    stacks: ClassVar[tuple[str, ...]]  # that the class predicts
    nets: ClassVar[dict[str, type[nn.Module]]]
    embedding: Tensor
    temperature: Tensor

    def __init__(
        self, embedding: Tensor, layers: int, experts: int, model_fingerprint: str, variant: str, **options: Any
    ) -> None:
        super().__init__()
        if variant not in self.nets:
            raise ValueError(f"variant is {variant!r}, expected one of {sorted(self.nets)}")
        if embedding.dim() != 2 or not embedding.is_floating_point():
            raise ValueError(f"embedding is {embedding.dtype} {tuple(embedding.shape)}, expected [vocabulary, d_model]")
        self.layers, self.experts, self.variant = layers, experts, variant
        # Candidates of each token that are worth asking for, and experts that the router chooses for it.
        self.choices = int(options.get("choices", 1))
        self.candidates = min(experts, worth_asking(self.choices))
        self.model_fingerprint, self.options = model_fingerprint, dict(options)
        # Mean top-1 share on held-out text, once trained: what ``drift.DriftWatch`` compares with.
        self.held_out_top1: float | None = None
        self.path: str | None = None  # the folder that it was read from
        self.register_buffer("embedding", embedding.detach().cpu(), persistent=False)
        # Divides a layer's logits when they are read as probabilities of being the first choice; set by calibration.
        self.register_buffer("temperature", torch.ones(layers))
        self.net = self.nets[variant](embedding.shape[1], layers, experts, **options)

    @property
    def vocabulary(self) -> int:
        """Token ids below this are known; see ``embedded`` for others."""
        return self.embedding.shape[0]

    def embedded(self, input_ids: Tensor) -> Tensor:
        """Embeddings [B, S, d_model] float32 of ids from 0 on. A token that has come to the model's vocabulary since
        (``resize_token_embeddings``) has the mean of all, around which transformers draws those of new tokens."""
        new = input_ids >= self.vocabulary
        if not bool(new.any()):
            return self.embedding[input_ids.long()].float()
        found = self.embedding[input_ids.masked_fill(new, 0).long()].float()
        return torch.where(new.unsqueeze(-1), self.embedding.float().mean(0), found)

    def here(self, tensor: Tensor) -> Tensor:
        """``tensor`` where the predictor is: a model on a GPU is mostly predicted for by the CPU."""
        return tensor.to(self.temperature.device)

    def _table(self, logits: Tensor, real: Tensor, top_k: int) -> HashTable:
        """The ``top_k`` best candidates of logits [B, S, layers, experts], none where ``real`` [B, S] is False."""
        if not bool(torch.isfinite(logits).all()):
            raise ValueError(
                f"the {self.variant} predictor's logits hold NaN or inf; its weights are damaged or training diverged"
            )
        best, index = logits.topk(top_k, dim=-1)
        gate = (best - logits.logsumexp(dim=-1, keepdim=True)).exp()
        tempered = logits / self.temperature[:, None]
        if self.choices_apart:
            probability = (best / self.temperature[:, None]).sigmoid()
        else:
            probability = (best / self.temperature[:, None] - tempered.logsumexp(dim=-1, keepdim=True)).exp()
        padding = ~real[:, :, None, None]
        return HashTable(
            index.int().masked_fill(padding, NO_EXPERT),
            gate.clamp(0, 1).masked_fill(padding, 0.0),
            probability.clamp(0, 1).masked_fill(padding, 0.0),
            self._padding_need(tempered, real),
        )

    @property
    def choices_apart(self) -> bool:
        """Whether a logit says of its expert alone if it is among the chosen ones, rather than beside the others."""
        return self.stack == "causal"

    def calibrate(self, logits: Tensor, wanted: Tensor) -> None:
        """Set the temperatures that make the router's choices most likely.

        Args:
            logits: [n, layers, experts].
            wanted: [n, layers, choices] int64, what the router chose.
        """
        fit = fit_chosen_temperature if self.choices_apart else fit_temperature
        self.temperature.copy_(fit(logits, wanted if self.choices_apart else wanted[..., 0]))

    def join_table(self, table: TokenTablePredictor, traces: Iterable[Any]) -> None:
        """Take in what a token table knows, where the kind of predictor can; weighed on ``traces`` of other text."""

    def _padding_need(self, tempered: Tensor, real: Tensor) -> Tensor | None:
        """[layers, experts]: how likely padding is to need an expert; None where that is not known or there is none."""
        return None

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
        """Write the predictor to folder ``path`` without the model's embeddings; see ``prediction.files``.

        Weights that float16 holds exactly (as those of a trained predictor) are stored so, in half the space.
        """
        write_predictor(path, self.description(), self._stored())

    def _stored(self) -> dict[str, Tensor]:
        return {n: t.half() if torch.equal(t.half().float(), t) else t for n, t in self.state_dict().items()}

    def _load(self, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """What ``save_pretrained`` wrote."""
        self.load_state_dict(tensors)

    @torch.no_grad()
    def round_weights(self) -> None:
        """Round the network's weights to float16's precision; a weight that float16 cannot hold stays as it is."""
        for weight in self.net.parameters():
            rounded = weight.half().float()
            weight.copy_(torch.where(rounded.isfinite(), rounded, weight))

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], model: nn.Module) -> Self:
        """Read a trained predictor for ``model``.

        Raises:
            PredictorError: nothing there, damaged, or of another model. Never a random predictor instead.
        """
        stack = field(read_config(path), "stack", str, path)
        if stack not in cls.stacks:
            raise PredictorError(
                f"{path} holds a predictor of the {stack}, expected one of the {' or '.join(cls.stacks)}"
            )
        facts = stack_facts(model, stack)
        config, tensors = read_predictor(path, cls.kind, facts.fingerprint)
        try:
            predictor = cls(
                facts.embedding,
                facts.layers,
                facts.experts,
                facts.fingerprint,
                field(config, "variant", str, path),
                **field(config, "options", dict, path),
            )
            predictor._load(config, tensors)
            predictor.held_out_top1 = config.get("held_out_top1")
            predictor.path = os.fspath(path)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            if isinstance(error, PredictorError):
                raise
            raise PredictorError(f"{path}: the weights do not fit the network that it describes ({error})") from error
        return predictor.eval().requires_grad_(False)
