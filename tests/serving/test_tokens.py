"""A text's token ids by the short way are those of a call of the tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from sida_ext.serving.tokens import TextTokens
from tests.support.tiny_models import tiny_tokenizer

EXAMPLES = Path(__file__).parents[2] / "examples"
FOLDERS = sorted(path.parent for path in EXAMPLES.glob("*/tokenizer.json"))


@pytest.fixture(scope="module", params=[*FOLDERS, None], ids=lambda path: path.name if path else "tiny")
def tokenizer(request):
    return tiny_tokenizer() if request.param is None else AutoTokenizer.from_pretrained(request.param)


@given(text=st.text(max_size=60), special=st.booleans())
def test_ids_are_those_of_a_call(tokenizer, text, special):
    tokens = TextTokens(tokenizer)
    assert tokens._backend is not None
    assert tokens(text, special) == list(tokenizer(text, add_special_tokens=special)["input_ids"])


def test_what_another_call_left_behind_is_not_used():
    tokenizer = AutoTokenizer.from_pretrained(FOLDERS[0])
    tokens = TextTokens(tokenizer)
    text = "a film that never lets go of you"
    expected = list(tokenizer(text)["input_ids"])
    tokenizer(text, truncation=True, max_length=3)
    assert tokens(text) == expected
    tokenizer([text, "short"], padding="max_length", max_length=40)
    assert tokens(text) == expected
    ends = f"{tokenizer.eos_token} and on"
    plain, split = list(tokenizer(ends)["input_ids"]), list(tokenizer(ends, split_special_tokens=True)["input_ids"])
    assert tokens(ends) == plain != split


def test_a_tokenizer_with_a_way_of_its_own_is_called():
    known = AutoTokenizer.from_pretrained(FOLDERS[0])

    class Shouting(type(known)):
        def _encode_plus(self, text, *given, **options):
            return super()._encode_plus(text.upper(), *given, **options)

    own = Shouting.from_pretrained(FOLDERS[0])
    assert TextTokens(own)("quiet") == list(own("quiet")["input_ids"])
    assert TextTokens(own)._backend is None

    class Words:  # not one of transformers' own
        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": tuple(range(len(text.split()) + add_special_tokens))}

    assert TextTokens(Words())("one two") == [0, 1, 2]
    assert TextTokens(Words())("one two", add_special_tokens=False) == [0, 1]
