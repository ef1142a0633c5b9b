#!/usr/bin/env bash
# A model saved in shards over an older single-file save is not the model that is loaded again.
#
# Expected: save_pretrained(folder) followed by from_pretrained(folder) gives the weights that were saved last.
# Seen:     the save in shards leaves the older model.safetensors where it is, and loading prefers it to the index: the old
#           weights, without a word.
set -euo pipefail
packages=(torch==2.13.0 transformers==5.24.0)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if [[ -z ${FINDINGS_VENV:-} ]]; then
  python3 -m venv "$work/venv"
  "$work/venv/bin/python" -m pip install -q "${packages[@]}"
  FINDINGS_VENV=$work/venv
fi
python=$(cd "$FINDINGS_VENV/bin" && pwd)/python
cd "$work"
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error
"$python" - << 'END'
import os

import torch
import transformers

print(f"torch {torch.__version__}, transformers {transformers.__version__}")
config = transformers.OlmoeConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_experts=4,
    num_experts_per_tok=2, eos_token_id=1, pad_token_id=0,
)
older, newer = transformers.OlmoeForCausalLM(config), transformers.OlmoeForCausalLM(config)
older.save_pretrained("model")
newer.save_pretrained("model", max_shard_size="100KB")
print("files:", *sorted(os.listdir("model")))
loaded = transformers.OlmoeForCausalLM.from_pretrained("model")
is_older, is_newer = (torch.equal(loaded.lm_head.weight, model.lm_head.weight) for model in (older, newer))
print(f"loaded: the older weights: {is_older}, the weights saved last: {is_newer}")
assert (is_older, is_newer) == (True, False), "behaviour changed"
END
