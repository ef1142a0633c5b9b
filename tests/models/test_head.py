"""The head of a prompt's last token: torch gets rows that lie as a matrix of their own."""

from __future__ import annotations

import pytest
import torch

import sida_ext
from tests.planning.tiny import save_tiny


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("way", ["loaded", "swapped"])
def test_the_head_reads_no_view_into_a_prompt(way, tokens, tmp_path):
    model = save_tiny("qwen3_moe", tmp_path).eval()
    ids = torch.arange(3, 13).view(2, 5)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    if way == "loaded":
        served = sida_ext.from_pretrained(tmp_path, dtype=torch.bfloat16, store_cache=tmp_path / "store")
    else:
        served = sida_ext.swap_experts(model)
    strides = []
    served.get_output_embeddings().register_forward_pre_hook(lambda _, given: strides.append(given[0].stride()))
    try:
        with torch.no_grad():
            last = served(input_ids=ids, logits_to_keep=tokens).logits
    finally:
        served.sida.close()
    width = served.config.hidden_size
    assert strides == [(tokens * width, width, 1)]
    torch.testing.assert_close(last, expected[:, -tokens:], rtol=0.05, atol=0.05)


def test_the_head_may_be_called_by_keyword(tmp_path):
    served = sida_ext.swap_experts(save_tiny("qwen3_moe", tmp_path).eval())
    rows = torch.randn(1, 3, served.config.hidden_size, dtype=served.dtype)
    with served.sida, torch.no_grad():
        assert torch.equal(served.lm_head(input=rows), served.lm_head(rows))
