#!/usr/bin/env bash
# In transformers' NLLB-MoE only the experts 0 and 1 ever compute, whichever the routers choose.
#
# Expected: the routers choose all eight experts, so changing any expert changes the output.
# Seen:     the output keeps its bits when any of the experts 2 to 7 is overwritten in every layer: the experts module reads
#           the routers' one-hot mask as expert numbers.
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
import copy

import torch
import transformers

print(f"torch {torch.__version__}, transformers {transformers.__version__}")
print("seed 0")
torch.manual_seed(0)
config = transformers.NllbMoeConfig(
    vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=64, decoder_ffn_dim=64,
    encoder_attention_heads=4, decoder_attention_heads=4, num_experts=8, encoder_sparse_step=1, decoder_sparse_step=1,
    expert_capacity=64,
)
model = transformers.NllbMoeModel(config).eval()
ids = torch.arange(2, 26).reshape(1, -1)
chosen = set()
for name, module in model.named_modules():
    if name.endswith("router"):
        module.register_forward_hook(lambda _, args, output: chosen.update(output[0].argmax(-1).flatten().tolist()))


def output(model):
    with torch.no_grad():
        return model(input_ids=ids, decoder_input_ids=ids).last_hidden_state


before = output(model)
print("experts that the routers chose:", sorted(chosen))
computing = []
for number in range(8):
    changed = copy.deepcopy(model)
    for name, module in changed.named_modules():
        if name.endswith("experts"):
            for weight in module[f"expert_{number}"].parameters():
                weight.data.fill_(0.5)
    difference = (output(changed) - before).abs().max().item()
    print(f"expert {number} overwritten: the output changes by {difference:g}")
    if difference > 0:
        computing.append(number)
assert chosen == set(range(8)), chosen
assert computing == [0, 1], f"behaviour changed: experts that compute: {computing}"
END
