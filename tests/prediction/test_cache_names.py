"""The cache's name, which differs between releases of transformers."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from sida_ext.prediction.cache_names import NAMES, cache_argument, cache_of
from tests.support.families import tiny_model


def named(*names: str) -> nn.Module:
    """A model whose forward has these arguments."""
    scope: dict = {}
    exec(f"def forward(self, input_ids, {', '.join(f'{name}=None' for name in names)}): ...", scope)
    return type("Model", (nn.Module,), {"forward": scope["forward"]})()


def test_a_forward_says_what_it_calls_its_cache():
    assert cache_argument(named("cache")) == "cache"
    assert cache_argument(named("mask", "past_key_values")) == "past_key_values"
    assert cache_argument(named("past_key_values", "cache")) == "cache"
    with pytest.raises(TypeError, match=r"Model\.forward takes neither cache nor past_key_values"):
        cache_argument(named("others"))


def test_an_output_says_it_too():
    for name in NAMES:
        assert cache_of({"logits": 1, name: 2}) == 2
    assert cache_of(BaseModelOutput(last_hidden_state=torch.zeros(1))) is None


def test_a_step_over_it_reads_what_the_prompt_left():
    """The installed release's own names: a cache under a wrong one would be passed over in silence."""
    _, model = tiny_model("qwen3_moe")
    ids = torch.arange(5, 14)[None]
    with torch.no_grad():
        expected = model(input_ids=ids).logits[:, -1]
        first = model(input_ids=ids[:, :-1], use_cache=True)
        found = model(input_ids=ids[:, -1:], use_cache=True, **{cache_argument(model): cache_of(first)})
    assert cache_of(found).get_seq_length() == 9
    torch.testing.assert_close(found.logits[:, -1], expected)
