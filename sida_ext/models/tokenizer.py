"""The tokenizer of a checkpoint."""

from __future__ import annotations

from typing import Any

__all__ = ["tokenizer_of"]


def tokenizer_of(model: str) -> Any:
    """The tokenizer of a checkpoint folder or hub id. Where its files are missing, transformers makes one that knows no
    word.

    Raises:
        ValueError: there is none.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    words = {word for word, number in tokenizer.get_vocab().items() if number not in tokenizer.all_special_ids}
    if words <= {"\u2581"}:  # the sign that stands for a space
        raise ValueError(f"{model} has no tokenizer: every word would be unknown; save it beside the model")
    return tokenizer
