"""What one row writes: its next token from its logits alone, its text, where it ends, its log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor
from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper

__all__ = ["Delta", "Sampling", "TokenLogprob", "Writer", "choose"]


READ_AT_ONCE = 32  # tokens


@dataclass(frozen=True)
class Sampling:
    """How a row's tokens are chosen and when it ends.

    Args:
        new_tokens: tokens at the most.
        temperature: 0: the most likely token.
        top_p: share of probability that the candidates must reach.
        seed: of this row; the same seed gives the same text, whatever runs beside it.
        stops: strings before which the text ends.
        logprobs: None, or how many of the most likely tokens are named beside each chosen one.
    """

    new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stops: tuple[str, ...] = ()
    logprobs: int | None = None


@dataclass(frozen=True)
class TokenLogprob:
    token: int
    text: str
    logprob: float
    top: tuple[tuple[int, str, float], ...] = ()


@dataclass
class Delta:
    """What a step adds to a row's answer."""

    text: str = ""
    tokens: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: str | None = None  # "stop" or "length"; the row is over

    def extend(self, more: Delta) -> Delta:
        """This one, with what comes after it."""
        self.text += more.text
        self.tokens += more.tokens
        self.logprobs += more.logprobs
        self.finish = more.finish
        return self


class Writer:
    """One row's text. Lives in the driver's thread.

    Args:
        tokenizer: a transformers tokenizer.
        sampling: see :class:`Sampling`.
        ends: token ids that end a text.
        whole: nobody reads the text before it is complete. Then tokens become text many at a time, which takes a
            fraction of the time for each, unless stop strings are looked for or log-probabilities wanted.
    """

    def __init__(self, tokenizer: Any, sampling: Sampling, ends: frozenset[int], whole: bool = False) -> None:
        self.sampling = sampling
        self.tokens: list[int] = []
        many = whole and not sampling.stops and sampling.logprobs is None
        self._at_once = READ_AT_ONCE if many else 1
        self._unread: list[int] = []  # not text yet
        self._tokenizer = tokenizer
        self._ends = ends
        self._held = ""  # may be the beginning of a stop string
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._stream = (backend, DecodeStream(skip_special_tokens=True)) if backend is not None else None
        self._decoded: list[int] = []  # where the tokenizer has no such stream
        self._read = self._prefix = 0
        self._generator: torch.Generator | None = None
        self._warpers: list[Any] = []
        self.greedy = sampling.temperature == 0
        if not self.greedy:
            self._generator = torch.Generator().manual_seed(sampling.seed)
            self._warpers = [TemperatureLogitsWarper(sampling.temperature)]
            if sampling.top_p < 1:
                self._warpers.append(TopPLogitsWarper(sampling.top_p))

    def sample(self, logits: Tensor) -> int:
        """The next token from this row's logits [vocabulary]."""
        scores = logits.float()[None]
        for warper in self._warpers:
            scores = warper(None, scores)
        return int(torch.multinomial(scores.softmax(-1), 1, generator=self._generator))

    def take(self, token: int, logits: Tensor, place: int = 0) -> Delta | None:
        """Add the chosen token.

        Args:
            logits: [B, vocabulary] of all rows; it was chosen from those at ``place``.

        Returns:
            What it adds; None if that comes with a later token, of a text that nobody reads before it is complete.
        """
        self.tokens.append(token)
        ended = token in self._ends
        if not ended and len(self._unread) + 1 < self._at_once and len(self.tokens) < self.sampling.new_tokens:
            self._unread.append(token)
            return None
        delta = Delta(tokens=len(self._unread) + 1)
        if self.sampling.logprobs is not None and not ended:
            delta.logprobs.append(self._logprob(token, logits[place]))
        unread = self._unread if ended else [*self._unread, token]
        self._held += "".join(map(self._decode, unread))
        self._unread.clear()
        cut = min((place for stop in self.sampling.stops if (place := self._held.find(stop)) >= 0), default=-1)
        if cut >= 0:
            delta.text, self._held, delta.finish = self._held[:cut], "", "stop"
            return delta
        if ended:
            delta.finish = "stop"
        elif len(self.tokens) >= self.sampling.new_tokens:
            delta.finish = "length"
        if delta.finish is not None:
            delta.text, self._held = self._held + self._rest(), ""
            return delta
        keep = max((_overlap(self._held, stop) for stop in self.sampling.stops), default=0)
        sent = len(self._held) - keep
        delta.text, self._held = self._held[:sent], self._held[sent:]
        return delta

    def _decode(self, token: int) -> str:
        """The text that the token makes certain: "" while a character is not whole."""
        if self._stream is not None:
            backend, stream = self._stream
            return stream.step(backend, token) or ""
        self._decoded.append(token)
        before = self._tokenizer.decode(self._decoded[self._prefix : self._read], skip_special_tokens=True)
        after = self._tokenizer.decode(self._decoded[self._prefix :], skip_special_tokens=True)
        if len(after) <= len(before) or after.endswith("\ufffd"):
            return ""
        self._prefix, self._read = self._read, len(self._decoded)
        return after[len(before) :]

    def _rest(self) -> str:
        """What a text that ends inside a character leaves: nothing, as its bytes are no text."""
        return ""

    def _logprob(self, token: int, logits: Tensor) -> TokenLogprob:
        logprobs = logits.float().log_softmax(-1)
        top: tuple[tuple[int, str, float], ...] = ()
        if self.sampling.logprobs:
            values, index = logprobs.topk(min(self.sampling.logprobs, logprobs.numel()))
            top = tuple(
                (number, self._name(number), value)
                for number, value in zip(index.tolist(), values.tolist(), strict=True)
            )
        return TokenLogprob(token, self._name(token), float(logprobs[token]), top)

    def _name(self, token: int) -> str:
        return self._tokenizer.decode([token])


def choose(writers: Sequence[Writer], logits: Tensor) -> list[int]:
    """The next token of each row from logits [B, vocabulary]; no row's choice depends on the others."""
    tokens = logits.float().cpu().numpy().argmax(-1).tolist()  # torch's takes two to three times as long
    if all(writer.greedy for writer in writers):
        return tokens
    return [
        token if writer.greedy else writer.sample(logits[place])
        for place, (writer, token) in enumerate(zip(writers, tokens, strict=True))
    ]


def _overlap(text: str, stop: str) -> int:
    """How many of the text's last characters begin ``stop``."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-length:]):
            return length
    return 0
