#!/usr/bin/env bash
# In Switch Transformers padding on the left takes places at the experts from the sentence.
#
# Expected: masked padding does not change what a sentence's own tokens become, on either side; and
#           router_ignore_padding_tokens=True keeps padding out of the routers.
# Seen:     padding on the right changes nothing beyond rounding; on the left its tokens come first, fill the experts'
#           capacity, and the sentence's tokens are dropped. The option is read nowhere.
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
import torch
import transformers

print(f"torch {torch.__version__}, transformers {transformers.__version__}")
print("seed 0")
torch.manual_seed(0)
config = transformers.SwitchTransformersConfig(
    vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_heads=4, num_layers=2, num_sparse_encoder_layers=1, num_experts=4,
    expert_capacity=4, router_ignore_padding_tokens=True,
)
model = transformers.SwitchTransformersEncoderModel(config).eval()
ids, padding = torch.arange(2, 10).reshape(1, -1), torch.zeros(1, 8, dtype=torch.long)
ones = torch.ones_like(ids)
with torch.no_grad():
    alone = model(input_ids=ids, attention_mask=ones).last_hidden_state
    right = model(input_ids=torch.cat([ids, padding], 1), attention_mask=torch.cat([ones, padding], 1))
    left = model(input_ids=torch.cat([padding, ids], 1), attention_mask=torch.cat([padding, ones], 1))
by_right = (right.last_hidden_state[:, :8] - alone).abs().max().item()
by_left = (left.last_hidden_state[:, 8:] - alone).abs().max().item()
print(f"largest difference of the sentence's own states: padded right {by_right:.2g}, padded left {by_left:.2g}")
assert by_right < 1e-4, by_right
assert by_left > 0.1, f"behaviour changed: left padding changes the states by {by_left}"
END
