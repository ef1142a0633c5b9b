#!/usr/bin/env bash
# A cache that is handed over under another release's name for it is passed over without a word.
#
# Expected: model(input_ids, cache=CACHE), as transformers 5.24 has it, works in an older fifth release or is a TypeError.
# Seen:     5.18 calls the argument past_key_values. It takes cache= among its further keywords, computes the token as
#           if it were the first one, fills nothing, and warns of nothing. The output has no .cache either.
set -euo pipefail
packages=(torch==2.13.0 transformers==5.18.0)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if [[ -z ${FINDINGS_VENV:-} ]]; then
  python3 -m venv "$work/venv"
  "$work/venv/bin/python" -m pip install -q "${packages[@]}"
  FINDINGS_VENV=$work/venv
fi
python=$(cd "$FINDINGS_VENV/bin" && pwd)/python
cd "$work"
export HF_HUB_OFFLINE=1
"$python" - << 'END'
import warnings

import torch
import transformers
from transformers import OlmoeConfig, OlmoeForCausalLM
from transformers.cache_utils import DynamicCache

print(f"torch {torch.__version__}, transformers {transformers.__version__}")
torch.manual_seed(0)
config = OlmoeConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_experts=4,
    num_experts_per_tok=2, eos_token_id=1, pad_token_id=0,
)
model = OlmoeForCausalLM(config).eval()
ids = torch.arange(2, 12)[None]


def last_logits(name):
    """Of the prompt's last token, after the others were put into a cache under this name."""
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=ids[:, :-1], use_cache=True, **{name: cache})
        logits = model(input_ids=ids[:, -1:], use_cache=True, **{name: cache}).logits[0, -1]
    return logits, cache.get_seq_length()


with torch.no_grad():
    right = model(input_ids=ids).logits[0, -1]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    rows = {name: last_logits(name) for name in ("cache", "past_key_values")}
for name, (logits, length) in rows.items():
    print(f"{name}=: {length} tokens in the cache, last logits off by {(logits - right).abs().max():.4f}")
print(f"{len(caught)} warnings")
ignored = rows["cache"][1] == 0 and (rows["cache"][0] - right).abs().max() > 1e-3
works = rows["past_key_values"][1] == 10 and (rows["past_key_values"][0] - right).abs().max() < 1e-4
if not (ignored and works and not caught):
    raise SystemExit("behaviour changed")
END
