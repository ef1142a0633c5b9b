"""A text's token ids, as its tokenizer gives them, by the short way where there is one."""

from __future__ import annotations

from typing import Any

from transformers.tokenization_utils_tokenizers import TokenizersBackend

__all__ = ["TextTokens"]


class TextTokens:
    """``tokenizer(text)["input_ids"]`` for one text after the other.

    A call of a transformers tokenizer checks some thirty arguments, hands even a single text to a pool of threads and
    builds an encoding of which only the ids are wanted: beside a small model's work that is much. So the tokenizer
    behind it is asked, where it is certain that nothing of transformers' stands in between.

    Args:
        tokenizer: of transformers, of any kind.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        kind = type(tokenizer)
        own = (
            isinstance(tokenizer, TokenizersBackend)
            and kind.__call__ is TokenizersBackend.__call__
            and kind._encode_plus is TokenizersBackend._encode_plus
            and not hasattr(tokenizer, "_switch_to_input_mode")
        )
        self._backend: Any = tokenizer.backend_tokenizer if own else None

    def __call__(self, text: str, add_special_tokens: bool = True) -> list[int]:
        backend = self._backend
        # A call that cuts or pads leaves its settings behind; the next plain call of transformers takes them back.
        if (
            backend is None
            or backend.truncation is not None
            or backend.padding is not None
            or backend.encode_special_tokens != self._tokenizer.split_special_tokens
        ):
            return list(self._tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])
        return backend.encode(text, add_special_tokens=add_special_tokens).ids
