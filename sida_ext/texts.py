"""Texts that commands read, and the tokenizer of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sida_ext.places import refuse_mistyped

__all__ = ["read_pairs", "read_texts", "tokenizer_of"]


def read_texts(files: list[Path]) -> list[str]:
    """Texts of text files (one a line) and JSON lines (key ``text``); empty lines are skipped.

    Raises:
        ValueError: names file and line.
    """
    return [text for text, _ in _read_lines(files)]


def read_pairs(files: list[Path]) -> list[str | tuple[str, str]]:
    """As :func:`read_texts`; a text whose JSON object has a ``target`` is a pair of both."""
    return [text if target is None else (text, target) for text, target in _read_lines(files)]


def _read_lines(files: list[Path]) -> list[tuple[str, str | None]]:
    texts: list[tuple[str, str | None]] = []
    for path in files:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                if path.suffix != ".jsonl":
                    texts.append((line.strip(), None))
                    continue
                try:
                    found = json.loads(line)
                    text, target = found["text"], found.get("target")
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    raise ValueError(
                        f"{path}:{number} is {line.strip()[:60]!r}, expected a JSON object with a 'text': {error!r}"
                    ) from error
                if not isinstance(text, str):
                    raise ValueError(f"{path}:{number}: 'text' is {type(text).__name__}, expected a string")
                if target is not None and not isinstance(target, str):
                    raise ValueError(f"{path}:{number}: 'target' is {type(target).__name__}, expected a string")
                texts.append((text, target))
    if not texts:
        raise ValueError(f"no text in {', '.join(map(str, files))}")
    return texts


def tokenizer_of(model: str) -> Any:
    """The tokenizer of a checkpoint. Where its files are missing, transformers makes one that knows no word."""
    from transformers import AutoTokenizer

    refuse_mistyped(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    words = {word for word, number in tokenizer.get_vocab().items() if number not in tokenizer.all_special_ids}
    if words <= {"\u2581"}:  # the sign that stands for a space
        raise ValueError(f"{model} has no tokenizer: every word would be unknown; save it beside the model")
    return tokenizer
