"""Traces of a decoder's true router: under teacher forcing, on given targets or on what the model itself generates."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sida_ext.batching import cut_by_length, padded, windows
from sida_ext.prediction.hash_table import HashTable
from sida_ext.prediction.moe_facts import check_tokens, stack_facts
from sida_ext.training.traces import KEPT, Trace, kept_choices

Text = str | Sequence[int]  # or token ids, taken as they are
Pairs = Iterable[str | tuple[Text, Text]]


@dataclass(frozen=True)
class DecoderTrace(Trace):
    """A Trace of what the decoder read, with what it was told by the encoder.

    Attributes:
        encoded: [M, d_model] float16, the encoder's result for all sources in a row, without padding.
        encoded_length: [rows] int64, tokens of each source; their sum is M.
    """

    encoded: Tensor
    encoded_length: Tensor

    def select(self, rows: Tensor) -> DecoderTrace:
        base = super().select(rows)
        length = self.encoded_length[rows]
        start = (self.encoded_length.cumsum(0) - self.encoded_length)[rows]
        first = torch.repeat_interleave(start - (length.cumsum(0) - length), length)
        encoded = self.encoded[first + torch.arange(int(length.sum()))]
        return DecoderTrace(**base.tensors(), encoded=encoded, encoded_length=length)

    def padded_encoder(self) -> tuple[Tensor, Tensor]:
        """The encoder's results [rows, S, d_model] float32 and their mask [rows, S] int64."""
        longest = int(self.encoded_length.max()) if self.rows else 0
        mask = torch.arange(longest)[None] < self.encoded_length[:, None]
        encoded = torch.zeros(*mask.shape, self.encoded.shape[1])
        encoded[mask] = self.encoded.float()
        return encoded, mask.long()

    def logits_of(self, predictor: nn.Module) -> Tensor:
        input_ids, mask = self.padded()
        return predictor(input_ids, mask.long(), *self.padded_encoder())[mask]

    def table_of(self, predictor: Any, top_k: int) -> HashTable:
        input_ids, mask = self.padded()
        return predictor.predict(input_ids, mask.long(), top_k, *self.padded_encoder())


def paired_batches(
    tokenizer: Any, pairs: Pairs, max_length: int = 512, sentences: int = 32
) -> Iterator[dict[str, Tensor]]:
    """Batches of sources and targets.

    Args:
        tokenizer: called with a string, gives ``input_ids``; the model's own.
        pairs: documents, each a source and the target that the decoder is made to write, or a source alone. Either may
            be a string or token ids; a target's ids end with the end of sentence, as a tokenizer gives them.
        max_length: tokens of a source and of a target at the most.
        sentences: pairs in a batch; sorted by length within windows of 64 batches.

    Yields:
        source_ids and source_mask [B, S], document [B] and, where there are targets, labels [B, T] and label_mask
        [B, T]. A batch has targets for all of its rows or for none.
    """
    for window in windows(_rows(tokenizer, pairs, max_length), 64 * sentences):
        for with_target in (True, False):
            part = [row for row in window if (row[1] is not None) == with_target]
            for rows in cut_by_length(
                part, lambda row: (len(row[1] or ()), len(row[0])), lambda batch, _: len(batch) == sentences
            ):
                source_ids, source_mask = padded([row[0] for row in rows])
                batch = {"source_ids": source_ids, "source_mask": source_mask}
                if with_target:
                    batch["labels"], batch["label_mask"] = padded([row[1] or [] for row in rows])
                yield {**batch, "document": torch.tensor([row[2] for row in rows])}


def _rows(tokenizer: Any, pairs: Pairs, max_length: int) -> Iterator[tuple[list[int], list[int] | None, int]]:
    """Token ids of each source and of its target, where it has one, and the number of the document."""

    def ids_of(text: Text, number: int) -> list[int]:
        if isinstance(text, str):
            return list(tokenizer(text, truncation=True, max_length=max_length)["input_ids"])
        if not all(isinstance(token, int) for token in text):
            raise TypeError(f"document {number} holds neither text nor token ids")
        return list(text)[:max_length]

    for number, pair in enumerate(pairs):
        source, target = (pair, None) if isinstance(pair, str) else pair
        source_row = ids_of(source, number)
        target_row = None if target is None else ids_of(target, number)
        if source_row and target_row != []:
            yield source_row, target_row, number


@torch.no_grad()
def read_by_decoder(
    model: Any, batches: Iterable[Mapping[str, Tensor]], max_length: int
) -> Iterator[dict[str, Tensor]]:
    """What the decoder reads: the target behind the start token, or what the model generates for a source alone.

    Args:
        model: an encoder-decoder; its ``generate`` (greedy) is asked where there are no labels.
        batches: of ``paired_batches``.
        max_length: tokens that are generated at the most.

    Yields:
        input_ids [B, T] and attention_mask [B, T] of the decoder, source_ids, source_mask and document.
    """
    begin = model.config.decoder_start_token_id
    if begin is None:
        raise ValueError(f"{type(model).__name__}.config has no decoder_start_token_id; the decoder has no first token")
    for batch in batches:
        if "labels" in batch:
            labels, mask = batch["labels"], batch["label_mask"]
            # Reads the start token, then each target token but the last.
            input_ids = torch.cat([torch.full_like(labels[:, :1], begin), labels[:, :-1]], dim=1)
        else:
            written = model.generate(
                input_ids=batch["source_ids"],
                attention_mask=batch["source_mask"],
                max_new_tokens=max_length,
                do_sample=False,
                num_beams=1,
            )
            input_ids = written[:, :-1]
            end = model.generation_config.eos_token_id
            ends = torch.isin(input_ids, torch.tensor([] if end is None else end, dtype=torch.int64))
            ends[:, 0] = False  # a start token that is an end token as well
            mask = (ends.cumsum(dim=1) == 0).long()
        yield {
            "input_ids": input_ids.masked_fill(mask == 0, 0),
            "attention_mask": mask,
            **{name: batch[name] for name in ("source_ids", "source_mask", "document")},
        }


@torch.no_grad()
def collect_decoder_traces(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], keep: int = KEPT
) -> Iterator[DecoderTrace]:
    """Run encoder and decoder over batches and yield one DecoderTrace for each; nothing else is held.

    A row that is longer than the model's expert capacity loses tokens of an expert here, in one forward, that a
    generation would give it one by one; keep targets shorter than the capacity.

    Args:
        model: holds a Switch encoder and decoder, plain or with swapped experts.
        batches: of ``read_by_decoder``.
        keep: candidates kept for each token and layer; at most the number of experts are.

    Raises:
        ValueError: an unknown token, or router logits that are NaN or infinite.
    """
    if keep < 1:
        raise ValueError(f"keep is {keep}, expected at least 1 candidate")
    facts = stack_facts(model, "decoder")
    encoder: Any = model.get_submodule("encoder")
    vocabulary, device = facts.embedding.shape[0], facts.embedding.device
    for batch in batches:
        real = check_tokens(batch["input_ids"], batch["attention_mask"], vocabulary)
        source = check_tokens(batch["source_ids"], batch["source_mask"], vocabulary)
        modes = [(stack, stack.training) for stack in (encoder, facts.stack)]
        for stack, _ in modes:
            stack.eval()
        try:
            told = encoder(input_ids=batch["source_ids"].to(device), attention_mask=source.long().to(device))
            output = facts.stack(
                input_ids=batch["input_ids"].to(device),
                encoder_hidden_states=told.last_hidden_state,
                encoder_attention_mask=source.long().to(device),
                use_cache=False,
                output_router_logits=True,
            )
        finally:
            for stack, mode in modes:
                stack.train(mode)
        yield DecoderTrace(
            batch["input_ids"][real].long(),
            real.sum(dim=1),
            batch["document"],
            *kept_choices(output.router_logits, real, facts.layers, min(keep, facts.experts), "decoder"),
            encoded=told.last_hidden_state.cpu()[source].half(),
            encoded_length=source.sum(dim=1),
        )
