"""The bundled running text, its tokenizer and its tokens: what the language models train on and are measured with."""

import json
import lzma
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXT = Path(__file__).parent / "data" / "text.jsonl.xz"
SPLITS = ("train", "validation", "held_out")
DOMAINS = ("literature", "documentation")
END, PAD = "<|endoftext|>", "<|padding|>"


@dataclass(frozen=True)
class Document:
    domain: str  # "literature" or "documentation"
    name: str  # of the work or of the page
    split: str  # "train", "validation" or "held_out"
    text: str


@cache
def every_document() -> tuple[Document, ...]:
    with lzma.open(TEXT, "rt", encoding="utf-8") as lines:
        return tuple(Document(**json.loads(line)) for line in lines)


def load_documents(split: str, domain: str | None = None) -> list[Document]:
    """The documents of one split, of one domain or of both, in the corpus's order.

    Raises ValueError for an unknown split or domain.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, expected one of {', '.join(SPLITS)}")
    if domain is not None and domain not in DOMAINS:
        raise ValueError(f"domain is {domain!r}, expected one of {', '.join(DOMAINS)}, or None for both")
    return [row for row in every_document() if row.split == split and domain in (None, row.domain)]


def passages(documents: list[Document], characters: int) -> list[Document]:
    """The documents cut at empty lines into passages of about `characters` each; what is shorter than half is left out.

    A passage keeps its document's domain, name and split. Raises ValueError unless `characters` is positive.
    """
    if characters < 1:
        raise ValueError(f"characters is {characters}, expected at least 1")
    found = []
    for document in documents:
        parts: list[str] = []
        for paragraph in [*document.text.split("\n\n"), None]:
            if parts and (paragraph is None or sum(map(len, parts)) >= characters):
                text = "\n\n".join(parts)
                if len(text) * 2 >= characters:
                    found.append(Document(document.domain, document.name, document.split, text))
                parts = []
            if paragraph:
                parts.append(paragraph)
    return found


def train_byte_tokenizer(texts: list[str], vocab_size: int, max_tokens: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of these texts: the end of a document is 0 (it begins one too), padding is 1."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        model_max_length=max_tokens,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: list[str], limit: int | None = None) -> np.ndarray:
    """The texts' tokens in a row, int64 [tokens]: the end-of-text token stands before, between and behind them.

    Of more than `limit` tokens only the first so many.
    """
    end = tokenizer.eos_token_id
    backend = tokenizer.backend_tokenizer
    parts = [np.array([end])]
    for text in texts:
        if limit is not None and sum(map(len, parts)) >= limit:
            break
        parts += [np.array(backend.encode(text).ids), np.array([end])]
    return np.concatenate(parts).astype(np.int64)[:limit]
