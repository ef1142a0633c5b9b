"""A predictor that only counts: which experts each token id went to, in each layer."""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn

from sida_ext.prediction.files import field, read_config, read_predictor, write_predictor
from sida_ext.prediction.hash_table import NO_EXPERT, HashTable
from sida_ext.prediction.moe_facts import check_tokens, check_top_k, predicted_stack, stack_facts
from sida_ext.prediction.prefetch import worth_asking


class TokenTablePredictor:
    """Expert counts by token id, smoothed towards the layer's marginal as far as a token was seldom seen.

    With n observations of a token, p(expert) = (count + backoff * marginal(expert)) / (n + backoff): an unseen token
    gets the marginal. Where a router chooses several experts for each token, p is the probability that the expert is
    among them, and the marginals of a layer sum to their number. Counts are kept sparse, so the table grows with what
    was seen and not with the vocabulary.

    Args:
        vocabulary, layers, experts: sizes of the stack that is predicted.
        model_fingerprint: of that stack; see ``moe_facts.fingerprint``.
        backoff: observations that the marginal is worth.
        stack: "encoder", "decoder" or "causal" (a decoder-only model).
        choices: experts that the router chooses for each token.

    Attributes:
        candidates: of each token that are worth asking ``predict`` for.
    """

    kind = "token_table"

    def __init__(
        self,
        vocabulary: int,
        layers: int,
        experts: int,
        model_fingerprint: str,
        backoff: float = 1.0,
        stack: str = "encoder",
        choices: int = 1,
    ) -> None:
        for name, value in (("vocabulary", vocabulary), ("layers", layers), ("experts", experts)):
            if value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        if not backoff > 0:
            raise ValueError(f"backoff is {backoff}, expected more than 0, so that unseen tokens have a distribution")
        check_top_k(choices, experts, "choices")
        self.vocabulary, self.layers, self.experts, self.choices = vocabulary, layers, experts, choices
        self.candidates = min(experts, worth_asking(choices))
        self.model_fingerprint, self.backoff, self.stack = model_fingerprint, float(backoff), stack
        # key = (token * layers + layer) * experts + expert, sorted; count and summed gate of each.
        self._key = torch.zeros(0, dtype=torch.int64)
        self._count = torch.zeros(0, dtype=torch.int64)
        self._gate = torch.zeros(0, dtype=torch.float64)
        self._seen = torch.zeros(vocabulary, dtype=torch.int64)
        self._refresh()

    @classmethod
    def for_model(cls, model: nn.Module, stack: str | None = None, backoff: float = 1.0) -> TokenTablePredictor:
        """An empty table of the right sizes for ``model``.

        Args:
            stack: None: "causal" for a decoder-only model, else "encoder".
        """
        stack = stack or predicted_stack(model)
        facts = stack_facts(model, stack)
        return cls(
            facts.embedding.shape[0], facts.layers, facts.experts, facts.fingerprint, backoff, stack, facts.choices
        )

    def update(
        self, input_ids: Tensor, expert_index: Tensor, gate: Tensor, attention_mask: Tensor | None = None
    ) -> None:
        """Count one batch of the true router's choices.

        Args:
            input_ids: [B, S] (or any shape, without a mask: [tokens]).
            expert_index: [..., layers], the router's choice; [..., layers, choices] of one that makes several.
            gate: of that shape, float32: its probability, or the weight of each choice.
            attention_mask: [B, S]; padding is not counted.
        """
        if input_ids.dim() == 1:
            input_ids, expert_index, gate = input_ids[None], expert_index[None], gate[None]
        real = check_tokens(input_ids, attention_mask, self.vocabulary)
        expected = (
            (*input_ids.shape, self.layers) if self.choices == 1 else (*input_ids.shape, self.layers, self.choices)
        )
        for name, value in (("expert_index", expert_index), ("gate", gate)):
            if tuple(value.shape) != expected:
                raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {expected}")
        tokens, chosen, gates = input_ids[real].long(), expert_index[real].long(), gate[real].double()
        if chosen.numel() == 0:
            return
        if int(chosen.min()) < 0 or int(chosen.max()) >= self.experts:
            bad = chosen[(chosen < 0) | (chosen >= self.experts)][0]
            raise ValueError(f"expert_index holds {int(bad)}, expected experts 0..{self.experts - 1}")
        if not bool(torch.isfinite(gates).all()):
            raise ValueError("gate holds NaN or inf; the model's router gave no probability")
        chosen, gates = (part.view(len(tokens), self.layers, self.choices) for part in (chosen, gates))
        key = (tokens[:, None] * self.layers + torch.arange(self.layers)).unsqueeze(-1) * self.experts + chosen
        merged = torch.cat([self._key, key.reshape(-1)])
        self._key, place = torch.unique(merged, return_inverse=True)
        ones = torch.ones(key.numel(), dtype=torch.int64)
        size = self._key.numel()
        count = torch.zeros(size, dtype=torch.int64).index_add_(0, place, torch.cat([self._count, ones]))
        total = torch.zeros(size, dtype=torch.float64).index_add_(0, place, torch.cat([self._gate, gates.reshape(-1)]))
        self._count, self._gate = count, total
        self._seen.index_add_(0, tokens, torch.ones_like(tokens))
        self._refresh()

    def seen(self, input_ids: Tensor) -> Tensor:
        """How often each token was counted; the shape of input_ids, int64."""
        return self._seen[input_ids.long()]

    @property
    def marginal(self) -> Tensor:
        """p(expert) of any token, [layers, experts] float32."""
        return self._marginal.float().clamp(0, 1)

    def probabilities(self, tokens: Tensor) -> Tensor:
        """p(expert) [n, layers, experts] float32 for token ids [n]."""
        return self._distribution(tokens.long())[0]

    @torch.no_grad()
    def predict(self, input_ids: Tensor, attention_mask: Tensor | None = None, top_k: int = 1) -> HashTable:
        """See ``Predictor.predict``. gate is the mean router probability seen with that token and expert."""
        check_top_k(top_k, self.experts)
        # The counts are on the CPU, wherever the model is.
        real = check_tokens(input_ids, attention_mask).cpu()
        input_ids = input_ids.cpu()
        tokens, place = torch.unique(input_ids[real].long(), return_inverse=True)
        probability, gate = self._distribution(tokens)
        # Stable: of experts that were seen equally often the first, however many are asked for.
        best, index = (part[..., :top_k] for part in probability.sort(dim=-1, descending=True, stable=True))
        shape = (*input_ids.shape, self.layers, top_k)
        expert_index = torch.full(shape, NO_EXPERT, dtype=torch.int32)
        expert_index[real] = index.int()[place]
        gates, probabilities = torch.zeros(shape), torch.zeros(shape)
        gates[real], probabilities[real] = gate.gather(-1, index)[place], best[place]
        return HashTable(expert_index, gates, probabilities)

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write the table to folder ``path``; see ``prediction.files``."""
        config = {
            "kind": self.kind,
            "model_fingerprint": self.model_fingerprint,
            "stack": self.stack,
            "vocabulary": self.vocabulary,
            "layers": self.layers,
            "experts": self.experts,
            "backoff": self.backoff,
            "choices": self.choices,
        }
        write_predictor(path, config, self.tensors())

    def tensors(self) -> dict[str, Tensor]:
        """What was counted, as files keep it."""
        return {"key": self._key, "count": self._count, "gate": self._gate, "seen": self._seen}

    def set_tensors(self, tensors: dict[str, Tensor]) -> None:
        """What ``tensors`` gave, of a table of the same sizes."""
        self._key, self._count, self._gate = tensors["key"], tensors["count"], tensors["gate"]
        self._seen = tensors["seen"]
        self._refresh()

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], model: nn.Module) -> TokenTablePredictor:
        """Read a table and refuse one of another model.

        Raises:
            PredictorError: see ``read_predictor``.
        """
        facts = stack_facts(model, field(read_config(path), "stack", str, path))
        config, tensors = read_predictor(path, cls.kind, facts.fingerprint)
        table = cls(
            field(config, "vocabulary", int, path),
            field(config, "layers", int, path),
            field(config, "experts", int, path),
            facts.fingerprint,
            field(config, "backoff", float, path),
            config["stack"],
            facts.choices,
        )
        table.set_tensors(tensors)
        return table

    def _refresh(self) -> None:
        """Recompute what backoff needs: each layer's marginal and the mean gate of each of its experts."""
        place = self._key % (self.layers * self.experts)
        size = self.layers * self.experts
        count = torch.zeros(size, dtype=torch.float64).index_add_(0, place, self._count.double())
        total = torch.zeros(size, dtype=torch.float64).index_add_(0, place, self._gate)
        count, total = count.view(self.layers, self.experts), total.view(self.layers, self.experts)
        # One more observation spread over all experts: one that no token chose keeps a chance.
        self._marginal = self.choices * (count + 1 / self.experts) / (count.sum(-1, keepdim=True) + 1)
        layer_gate = torch.where(count.sum(-1) > 0, total.sum(-1) / count.sum(-1).clamp(min=1), 1 / self.experts)
        self._mean_gate = torch.where(count > 0, total / count.clamp(min=1), layer_gate[:, None])

    def _distribution(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """p(expert) and mean gate, both [n, layers, experts] float32, for token ids [n]."""
        width = self.layers * self.experts
        first = torch.searchsorted(self._key, tokens * width)
        number = torch.searchsorted(self._key, (tokens + 1) * width) - first
        row = torch.repeat_interleave(torch.arange(tokens.numel()), number)
        within = torch.arange(row.numel()) - torch.repeat_interleave(number.cumsum(0) - number, number)
        entry = first[row] + within
        place = row * width + self._key[entry] % width
        count = torch.zeros(tokens.numel() * width, dtype=torch.float64)
        total = torch.zeros_like(count)
        count[place], total[place] = self._count[entry].double(), self._gate[entry]
        count, total = (t.view(-1, self.layers, self.experts) for t in (count, total))
        # Tokens that have come to the vocabulary since the table was made were not seen.
        seen = torch.where(tokens < self.vocabulary, self._seen[tokens.clamp(max=self.vocabulary - 1)], 0)
        seen = seen.double()[:, None, None]
        probability = (count + self.backoff * self._marginal) / (seen + self.backoff)
        gate = torch.where(count > 0, total / count.clamp(min=1), self._mean_gate)
        return probability.float().clamp(0, 1), gate.float().clamp(0, 1)
