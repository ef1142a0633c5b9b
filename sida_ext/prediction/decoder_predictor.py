"""Predictors of a decoder's routing inside ``generate``: a trained recurrent one, and the token table."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from sida_ext.prediction.decoder_net import DecoderNet, DecoderState, copy_routers, decoder_options
from sida_ext.prediction.decoder_step import FoldedStep
from sida_ext.prediction.hash_table import HashTable
from sida_ext.prediction.moe_facts import check_tokens, check_top_k, stack_facts
from sida_ext.prediction.network_predictor import NetworkPredictor
from sida_ext.prediction.token_table import TokenTablePredictor

if TYPE_CHECKING:
    from typing_extensions import Self

# What is read ahead for a step: of so many candidates of each token, those that some token of the step needs with at
# least this probability (docs/measured.md).
CANDIDATES = 4
MIN_NEED = 0.1


class RecurrentPredictor(NetworkPredictor):
    """Names the experts of all decoder layers of a step from its tokens, recurrent over steps; a ``DecoderPredictor``.

    Args:
        embedding, layers, experts, model_fingerprint, options: see NetworkPredictor.
        candidates, min_need: attributes that may be changed: ``step`` names so many candidates of each token and layer,
            and ``generate`` reads those ahead that the step needs with at least that probability.
    """

    kind = "recurrent_predictor"
    stack = "decoder"
    stacks = ("decoder",)
    nets: ClassVar[dict[str, type[nn.Module]]] = {"recurrent": DecoderNet}
    net: DecoderNet

    def __init__(
        self,
        embedding: Tensor,
        layers: int,
        experts: int,
        model_fingerprint: str,
        variant: str = "recurrent",
        **options: Any,
    ) -> None:
        super().__init__(embedding, layers, experts, model_fingerprint, variant, **options)
        self.candidates, self.min_need = min(CANDIDATES, experts), MIN_NEED
        self._folded: tuple[list[nn.Parameter], int, FoldedStep] | None = None

    @classmethod
    def for_model(cls, model: nn.Module, seed: int = 0, **options: Any) -> Self:
        """An untrained predictor of the right sizes for ``model``'s decoder; ``seed`` draws what is random in it."""
        facts = stack_facts(model, cls.stack)
        options = decoder_options(facts.stack, facts.layers, **options)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = cls(facts.embedding, facts.layers, facts.experts, facts.fingerprint, **options)
        copy_routers(made.net, facts.stack, facts.blocks)
        return made

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        encoder_output: Tensor | None = None,
        encoder_mask: Tensor | None = None,
    ) -> Tensor:
        """Logits over experts, [B, T, layers, experts] float32, of whole rows at once (teacher forcing).

        Args:
            input_ids: [B, T], the tokens that the decoder reads, its start token first.
            attention_mask: [B, T], 1 for tokens and 0 for padding, which stands at the end; None: all are tokens.
            encoder_output: [B, S, d_model]; None: the encoder's result is not known, which makes the guesses worse.
            encoder_mask: [B, S]; None: all are tokens.
        """
        check_tokens(input_ids, attention_mask)
        if encoder_output is None:
            encoder_output = self.embedding.new_zeros(input_ids.shape[0], 0, self.embedding.shape[1])
        return self._step(self.start(encoder_output, encoder_mask), input_ids)[0]

    def predict(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        top_k: int = 1,
        encoder_output: Tensor | None = None,
        encoder_mask: Tensor | None = None,
    ) -> HashTable:
        """See ``Predictor.predict``; the arguments are those of ``forward``."""
        check_top_k(top_k, self.experts)
        real = self.here(check_tokens(input_ids, attention_mask))
        with torch.no_grad():
            return self._table(self(input_ids, attention_mask, encoder_output, encoder_mask), real, top_k)

    def start(self, encoder_output: Tensor, attention_mask: Tensor | None) -> DecoderState:
        """See ``DecoderPredictor.start``."""
        if encoder_output.dim() != 3 or encoder_output.shape[2] != self.embedding.shape[1]:
            raise ValueError(
                f"encoder_output has shape {tuple(encoder_output.shape)}, expected [B, S, {self.embedding.shape[1]}]"
            )
        if attention_mask is None:
            attention_mask = torch.ones(encoder_output.shape[:2], device=encoder_output.device)
        if attention_mask.shape != encoder_output.shape[:2]:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}, expected encoder_output's "
                f"{tuple(encoder_output.shape[:2])}"
            )
        return self.net.start(self.here(encoder_output).float(), self.here(attention_mask) != 0)

    def step(self, state: DecoderState, input_ids: Tensor) -> tuple[HashTable, DecoderState]:
        """See ``DecoderPredictor.step``."""
        real = self.here(check_tokens(input_ids, None))
        with torch.no_grad():
            logits, state = self._step(state, input_ids)
            if input_ids.shape[1] != 1:
                return self._table(logits, real, self.candidates), state
            return self._table_of_step(logits), state

    def reorder(self, state: DecoderState, index: Tensor) -> DecoderState:
        """See ``DecoderPredictor.reorder``."""
        return state.select(self.here(index))

    def _step(self, state: DecoderState, input_ids: Tensor) -> tuple[Tensor, DecoderState]:
        if state.rows != input_ids.shape[0]:
            raise ValueError(f"the state is of {state.rows} rows, input_ids of {input_ids.shape[0]}, expected as many")
        embedding = self.embedded(self.here(input_ids))
        # Of one token a row and for good: with the weights multiplied out. Training and whole rows: as written.
        if input_ids.shape[1] != 1 or torch.is_grad_enabled() or self.training:
            return self.net(embedding, state)
        return self._folded_step()(embedding, state)

    def _table_of_step(self, logits: Tensor) -> HashTable:
        """As ``_table`` for logits [B, 1, layers, experts] of tokens without padding, in fewer calls."""
        gates = logits.log_softmax(dim=-1)
        best, index = gates.topk(self.candidates, dim=-1)
        if not bool(best.isfinite().all()):
            raise ValueError(
                f"the {self.variant} predictor's logits hold NaN or inf; its weights are damaged or training diverged"
            )
        probability = (logits / self.temperature[:, None]).log_softmax(dim=-1).gather(-1, index)
        return HashTable(index, best.exp().clamp_(max=1), probability.exp().clamp_(max=1))

    def _folded_step(self) -> FoldedStep:
        """Folded anew when a weight has been written to, loaded or moved."""
        if self._folded is not None:
            weights, version, step = self._folded
            if _version(weights) == version:
                return step
        weights = list(self.net.parameters())
        self._folded = (weights, _version(weights), FoldedStep(self.net))
        return self._folded[2]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._folded = None
        return super()._apply(fn, recurse)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self._folded = None
        return super().load_state_dict(*args, **kwargs)


def _version(weights: list[nn.Parameter]) -> int:
    """Grows with every write to one of the weights; those made under inference_mode cannot be written to."""
    return sum(weight._version for weight in weights if not weight.is_inference())


class TokenTableDecoder:
    """A token table as a ``DecoderPredictor``: what a token id went to, whatever came before it.

    Args:
        table: of the decoder, ``TokenTablePredictor.for_model(model, "decoder")``.
        candidates, min_need: see RecurrentPredictor.
    """

    def __init__(self, table: TokenTablePredictor, candidates: int = CANDIDATES, min_need: float = MIN_NEED) -> None:
        if table.stack != "decoder":
            raise ValueError(f"the token table is of the {table.stack!r}, expected one of the 'decoder'")
        check_top_k(min(candidates, table.experts), table.experts)
        self.table, self.candidates, self.min_need = table, min(candidates, table.experts), min_need

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], model: nn.Module) -> TokenTableDecoder:
        """Read a token table of the decoder; see ``TokenTablePredictor.from_pretrained``."""
        return cls(TokenTablePredictor.from_pretrained(path, model))

    def predict(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        top_k: int = 1,
        encoder_output: Tensor | None = None,
        encoder_mask: Tensor | None = None,
    ) -> HashTable:
        """See ``Predictor.predict``; what the encoder said is not read."""
        return self.table.predict(input_ids, attention_mask, top_k)

    def start(self, encoder_output: Tensor, attention_mask: Tensor | None) -> None:
        return None

    def step(self, state: None, input_ids: Tensor) -> tuple[HashTable, None]:
        return self.table.predict(input_ids, None, self.candidates), None

    def reorder(self, state: None, index: Tensor) -> None:
        return None
