"""A loaded model as the server drives it: what it can do, and its computations. Used by one thread at a time."""

from __future__ import annotations

import inspect
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from sida_ext._load import _C
from sida_ext.experts.runtime import Runtime
from sida_ext.prediction.cache_names import cache_argument, cache_of
from sida_ext.serving.joined import JoinedModel, Row, joins
from sida_ext.serving.joined_encoder import JoinedEncoder, batches, packed_batches, spare_tokens
from sida_ext.serving.shared import share_rows
from sida_ext.serving.tokens import TextTokens

__all__ = ["Alone", "ModelFacts", "ServedModel"]

Experts = frozenset[tuple[int, int]]

# Settings of generation_config.json that would change logits, and their values that change none.
_UNSERVED_SETTINGS: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (None, 1.0),
    "encoder_repetition_penalty": (None, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "bad_words_ids": (None,),
    "forced_bos_token_id": (None,),
    "suppress_tokens": (None, []),
    "begin_suppress_tokens": (None, []),
    "sequence_bias": (None,),
    "min_length": (None, 0),
}


@dataclass(kw_only=True, eq=False)
class ModelFacts:
    """What the HTTP application knows of a served model; can be sent to another process, without ``tokenizer``.

    Args:
        name: what clients call it.
        created: when it was loaded, in seconds since 1970.
        context: tokens of prompt and answer together at the most.
        vocabulary: token ids are below it.
        generates, classifies, seq2seq: what it is.
        labels: of a classifier.
        layers, experts: MoE layers, and experts in each; 0 where none are served from a store.
    """

    name: str
    created: int
    context: int
    vocabulary: int
    generates: bool
    classifies: bool
    seq2seq: bool
    labels: list[str]
    layers: int
    experts: int
    tokenizer: Any = None

    @cached_property
    def text_tokens(self) -> TextTokens:
        """A text's token ids; asked for once the tokenizer is there."""
        return TextTokens(self.tokenizer)


@dataclass
class Alone:
    """The cache of a row that cannot be joined with others; it steps by itself."""

    cache: Any
    length: int
    encoded: Any = None  # the encoder's output


class ServedModel(ModelFacts):
    """What is served.

    Args:
        model: a transformers model in evaluation mode, its experts swapped or not.
        tokenizer: its tokenizer.
        name: what clients call it.
        context: tokens of prompt and answer together at the most; None: the model's own limit.
        rows: rows that will run at once; with 1 nothing is joined.
        shared: change the model so that its rows share every call; see :mod:`sida_ext.serving.shared`.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        name: str,
        *,
        context: int | None = None,
        rows: int = 16,
        shared: bool = False,
    ) -> None:
        config = model.config
        classifies = type(model).__name__.endswith("ForSequenceClassification")
        self.model = model
        self.runtime: Runtime | None = getattr(model, "sida", None)
        header = self.runtime.header if self.runtime is not None else None
        super().__init__(
            name=name,
            created=int(time.time()),
            context=context if context is not None else _context_of(config, tokenizer),
            vocabulary=model.get_input_embeddings().weight.shape[0],
            generates=bool(model.can_generate()),
            classifies=classifies,
            seq2seq=bool(config.is_encoder_decoder),
            labels=[str(config.id2label[index]) for index in range(config.num_labels)] if classifies else [],
            layers=len(header.layers) if header is not None else 0,
            experts=header.num_experts if header is not None else 0,
            tokenizer=tokenizer,
        )
        self.notes: list[str] = []
        if shared:
            self._share()
        self.joined: JoinedModel | None = None
        self.encoder: JoinedEncoder | None = None
        self._spare = spare_tokens(model)
        if self.generates:
            self.ends = _ends(model)
            self._note_settings()
            self._cache_argument = cache_argument(model)
            obstacle = joins(model)
            if rows > 1 and obstacle is None:
                self.joined = JoinedModel(model, shared)
            elif rows > 1:
                self.notes.append(f"rows are computed one after the other: {obstacle}")
            self._start: Any = getattr(model.generation_config, "decoder_start_token_id", None)
            if self._start is None:
                self._start = getattr(config, "decoder_start_token_id", None)
            self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        if self.classifies and rows > 1 and JoinedEncoder.fits(model):
            self.encoder = JoinedEncoder(model, shared)

    def _share(self) -> None:
        obstacle = None if JoinedEncoder.fits(self.model) else joins(self.model)
        if obstacle is not None:
            raise ValueError(f"the rows of this model cannot share its calls: {obstacle}; serve without --shared")
        changed = share_rows(self.model)
        self.notes.append(f"attention and {changed} matrices are computed by kernels that rows share")

    def _note_settings(self) -> None:
        settings = self.model.generation_config
        for name, neutral in _UNSERVED_SETTINGS.items():
            value = getattr(settings, name, None)
            if value not in neutral:
                self.notes.append(f"generation_config.json sets {name} to {value}, which is not applied")

    @property
    def facts(self) -> ModelFacts:
        """What another process may know, without the tokenizer."""
        known = {field.name: getattr(self, field.name) for field in fields(ModelFacts)}
        return ModelFacts(**known | {"tokenizer": None})

    @property
    def cache_bytes(self) -> int:
        """Keys and values of joined rows."""
        return self.joined.cache_bytes if self.joined is not None else 0

    # Generation

    @torch.no_grad()
    def start(self, ids: Sequence[int], new_tokens: int) -> tuple[Tensor, Row | Alone]:
        """Compute a prompt alone, as ``generate`` does; its last logits [vocabulary] and the row's place."""
        given = torch.tensor([list(ids)])
        mask = torch.ones_like(given)
        encoded: Any = None
        if self.seq2seq:
            encoded = self.model.get_encoder()(input_ids=given, attention_mask=mask, return_dict=True)
            output = self.model(
                encoder_outputs=encoded,
                attention_mask=mask,
                decoder_input_ids=torch.tensor([[self._start]]),
                use_cache=True,
            )
        else:
            keep = {"logits_to_keep": 1} if self._keeps_logits else {}
            output = self.model(input_ids=given, attention_mask=mask, use_cache=True, **keep)
        cache = cache_of(output)
        logits = output.logits[0, -1].clone()
        if self.joined is not None:
            return logits, self.joined.take(cache, new_tokens)
        return logits, Alone(cache, 1 if self.seq2seq else len(ids), encoded)

    def start_all(
        self, prompts: Sequence[Sequence[int]], new_tokens: Sequence[int]
    ) -> list[tuple[Tensor, Row | Alone]]:
        """:meth:`start` of several prompts: those of similar length together, of an encoder-decoder all that are not
        long."""
        found: list[Any] = [None] * len(prompts)
        joined = self.joined
        if joined is None or not joined.starts_together or not (self.seq2seq or self._keeps_logits):
            return [self.start(ids, new) for ids, new in zip(prompts, new_tokens, strict=True)]
        lengths = list(map(len, prompts))
        for batch in packed_batches(lengths) if self.seq2seq else self._prompts_together(lengths):
            if len(batch) == 1:
                found[batch[0]] = self.start(prompts[batch[0]], new_tokens[batch[0]])
                continue
            texts, new = [prompts[place] for place in batch], [new_tokens[place] for place in batch]
            started = joined.start_encoded(texts, new, self._start) if self.seq2seq else joined.start(texts, new)
            for place, answer in zip(batch, started, strict=True):
                found[place] = answer
        return found

    def _prompts_together(self, lengths: Sequence[int]) -> list[list[int]]:
        """Positions of a decoder-only model's prompts that run together. One token is a step, and takes the products of
        one (:class:`~sida_ext.serving.shared.StepWeight`): it runs beside its like alone."""
        single = [place for place, length in enumerate(lengths) if length == 1]
        longer = [place for place, length in enumerate(lengths) if length > 1]
        found = batches([lengths[place] for place in longer], self._spare)
        return [*([single] if single else []), *([longer[place] for place in batch] for batch in found)]

    @torch.no_grad()
    def step(self, rows: Sequence[Row | Alone], tokens: Sequence[int]) -> Tensor:
        """The logits [B, vocabulary] after each row's next token; a step that raises has changed no joined row."""
        if self.joined is not None:
            return self.joined.step(rows, tokens)  # type: ignore[arg-type]
        return torch.stack([self._step_alone(row, token) for row, token in zip(rows, tokens, strict=True)])  # type: ignore[arg-type]

    def _step_alone(self, row: Alone, token: int) -> Tensor:
        given, cached = torch.tensor([[token]]), {self._cache_argument: row.cache}
        if row.encoded is not None:
            output = self.model(
                encoder_outputs=row.encoded,
                attention_mask=torch.ones(1, row.encoded.last_hidden_state.shape[1], dtype=torch.long),
                decoder_input_ids=given,
                use_cache=True,
                **cached,
            )
        else:
            mask = torch.ones(1, row.length + 1, dtype=torch.long)
            output = self.model(input_ids=given, attention_mask=mask, use_cache=True, **cached)
        row.length += 1
        return output.logits[0, -1]

    @property
    def steps_can_be_repeated(self) -> bool:
        """Whether a step that raised may be tried again: a cache of a row that steps alone may be half written."""
        return self.joined is not None

    def drop(self, row: Row | Alone) -> None:
        """The row is over."""
        if isinstance(row, Row) and self.joined is not None:
            self.joined.drop(row)

    # One-step work

    @torch.no_grad()
    def classify(self, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
        """The logits of each text."""
        if self.encoder is not None:
            return [row.tolist() for row in self.encoder.logits(prompts)]
        found = []
        for ids in prompts:
            given = torch.tensor([list(ids)])
            found.append(self.model(input_ids=given, attention_mask=torch.ones_like(given)).logits[0].float().tolist())
        return found

    @torch.no_grad()
    def embed(self, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
        """The mean over each text's last hidden states, of unit length."""
        found = []
        for ids in prompts:
            given = torch.tensor([list(ids)])
            mask = torch.ones_like(given)
            if self.seq2seq or self.classifies:
                states = self.model.get_encoder()(input_ids=given, attention_mask=mask).last_hidden_state
            else:
                states = self.model.base_model(input_ids=given, attention_mask=mask).last_hidden_state
            mean = states[0].float().mean(0)
            found.append((mean / mean.norm()).tolist())
        return found

    @torch.no_grad()
    def score(self, prompt: Sequence[int], continuation: Sequence[int]) -> list[float]:
        """The log-probability of each token of ``continuation`` after ``prompt``."""
        wanted = torch.tensor(list(continuation))
        if self.seq2seq:
            given = torch.tensor([list(prompt)])
            before = torch.tensor([[self._start, *continuation[:-1]]])
            output = self.model(input_ids=given, attention_mask=torch.ones_like(given), decoder_input_ids=before)
            logits = output.logits[0]
        else:
            given = torch.tensor([[*prompt, *continuation]])
            output = self.model(input_ids=given, attention_mask=torch.ones_like(given))
            logits = output.logits[0, len(prompt) - 1 : -1]
        logprobs = logits.float().log_softmax(-1)
        return logprobs.gather(1, wanted[:, None])[:, 0].tolist()

    # Experts

    def predicted(self, ids: Sequence[int]) -> Experts:
        """The experts that a prompt is predicted to want, one prediction a token; empty without a predictor."""
        predictor = getattr(self.runtime, "predictor", None)
        if predictor is None:
            return frozenset()
        found = predicted_experts(predictor, ids)
        _C.release_threads()  # of the thread that takes requests: the driver's alone are to wait for work
        return found


def predicted_experts(predictor: Any, ids: Sequence[int]) -> Experts:
    """(MoE layer, expert) of the most likely expert of each token and layer."""
    best = predictor.predict(torch.tensor([list(ids)])).expert_index[0, :, :, 0]  # [tokens, layers]
    return frozenset(
        (layer, expert) for layer in range(best.shape[1]) for expert in best[:, layer].unique().tolist() if expert >= 0
    )


def _ends(model: Any) -> frozenset[int]:
    """The tokens at which ``generate`` ends."""
    ends = model.generation_config.eos_token_id
    return frozenset([ends] if isinstance(ends, int) else ends or [])


def _context_of(config: Any, tokenizer: Any) -> int:
    """The most tokens that the model was made for; 2,048 where neither its configuration nor its tokenizer says."""
    found = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    limit = getattr(tokenizer, "model_max_length", None)
    sizes = [size for size in (found, limit) if isinstance(size, int) and 0 < size < 10**9]
    return min(sizes, default=2048)
