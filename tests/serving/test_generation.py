"""What a row writes: its text in pieces or at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from sida_ext.serving.generation import READ_AT_ONCE, Sampling, Writer, choose

EXAMPLES = Path(__file__).parents[2] / "examples"
VOCABULARY = 4000


class Slow:
    """A tokenizer without the library's stream."""

    def __init__(self, tokenizer):
        self.decode = tokenizer.decode


@pytest.fixture(scope="module", params=["demo_language_model", "demo_denoiser", "plain"])
def tokenizer(request):
    if request.param == "plain":
        return Slow(AutoTokenizer.from_pretrained(EXAMPLES / "demo_language_model"))
    return AutoTokenizer.from_pretrained(EXAMPLES / request.param)


def written(tokenizer, tokens, whole, **options):
    """Pieces, end and number of the tokens of a row that is given these."""
    writer = Writer(tokenizer, Sampling(new_tokens=len(tokens), **options), frozenset([VOCABULARY - 1]), whole)
    logits = torch.zeros(2, VOCABULARY)
    pieces, finish, count = [], None, 0
    for token in tokens:
        delta = writer.take(token, logits, 1)
        pieces.append("" if delta is None else delta.text)
        if delta is None:
            continue
        count += delta.tokens
        if delta.finish is not None:
            finish = delta.finish
            break
    return pieces, finish, count


TOKENS = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=3 * READ_AT_ONCE)


@settings(max_examples=60, deadline=None)
@given(tokens=TOKENS)
def test_a_whole_text_is_that_of_the_stream(tokenizer, tokens):
    pieces, finish, count = written(tokenizer, tokens, False)
    at_once, same, as_many = written(tokenizer, tokens, True)
    assert ("".join(at_once), same, as_many) == ("".join(pieces), finish, count)
    assert len(at_once) == len(pieces) == count
    assert all(not piece for piece in at_once[: min(len(at_once), READ_AT_ONCE) - 1])


def test_with_a_stop_string_every_token_is_read_at_once():
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLES / "demo_language_model")
    tokens = tokenizer("it was a fine day and it was late")["input_ids"]
    pieces, finish, _ = written(tokenizer, tokens, True, stops=(" day",))
    assert (("".join(pieces)).strip(), finish) == ("it was a fine", "stop")
    assert len(pieces) < len(tokens)


def test_the_most_likely_token_is_the_first_of_equals():
    logits = torch.zeros(3, VOCABULARY, dtype=torch.bfloat16)
    logits[1, 7] = logits[1, 9] = 1.0
    logits[2] = torch.randn(VOCABULARY).bfloat16()
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLES / "demo_language_model")
    writers = [Writer(tokenizer, Sampling(1), frozenset()) for _ in range(3)]
    assert choose(writers, logits) == [0, 7, int(logits[2].argmax())]
