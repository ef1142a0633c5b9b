"""The bundled sentences and the bundled model's tokenizer: what the demo and the training scripts read."""

import gzip
import json
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = Path(__file__).parent / "data" / "corpus.jsonl.gz"
DEMO_MODEL = Path(__file__).parent / "demo_model"
SPLITS = ("train", "validation", "held_out")
SOURCES = ("movie", "editorial")
MAX_TOKENS = 64


@dataclass(frozen=True)
class Sentence:
    text: str
    source: str  # "movie" or "editorial"
    mean: float  # mean human rating of its sentiment, -4 to 4
    label: int  # 1: the mean is above 0
    split: str  # "train", "validation" or "held_out"


def load_sentences(split: str, source: str | None = None) -> list[Sentence]:
    """The sentences of one split, of one source or of both, in the corpus's order.

    Raises ValueError for an unknown split or source.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, expected one of {', '.join(SPLITS)}")
    if source is not None and source not in SOURCES:
        raise ValueError(f"source is {source!r}, expected one of {', '.join(SOURCES)}, or None for both")
    with gzip.open(CORPUS, "rt", encoding="utf-8") as lines:
        rows = [Sentence(**json.loads(line)) for line in lines]
    return [row for row in rows if row.split == split and source in (None, row.source)]


def train_tokenizer(texts: list[str], vocab_size: int, extra_tokens: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """A lower-case unigram tokenizer of these texts: pad 0, end 1, unknown 2, mask 3; every text ends with `</s>`."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.Lowercase(),
            # The corpus writes quotation marks as two apostrophes.
            normalizers.Replace("''", '"'),
            normalizers.Replace(Regex(r"\s+"), " "),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation("isolated")]
    )
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "</s>", "<unk>", "<mask>", *extra_tokens],
        unk_token="<unk>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    # The trainer adds its scores up in no fixed order, so that equally likely tokens swap places from run to run.
    state = json.loads(tokenizer.model.__getstate__())
    special = 4 + len(extra_tokens)
    rest = [(token, round(score, 6)) for token, score in state["vocab"][special:]]
    vocabulary = [tuple(entry) for entry in state["vocab"][:special]] + sorted(rest, key=lambda e: (-e[1], e[0]))
    tokenizer.model = models.Unigram(vocabulary, state["unk_id"], False)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
        model_max_length=MAX_TOKENS,
        padding_side="right",
    )
