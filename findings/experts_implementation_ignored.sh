#!/usr/bin/env bash
# A model outside transformers' experts interface takes an experts_implementation and never calls it.
#
# Expected: from_pretrained(..., experts_implementation=NAME) runs the function that was registered as NAME, or says that
#           the model has no such experts.
# Seen:     OLMoE calls the function in each layer; Switch Transformers accepts the name, keeps it in its config, says
#           nothing and computes with its own loop.
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
import tempfile

import torch
import transformers
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

print(f"torch {torch.__version__}, transformers {transformers.__version__}")
calls = 0


def counted(module, hidden, index, weights):
    global calls
    calls += 1
    return hidden


ALL_EXPERTS_FUNCTIONS.register("counted", counted)
olmoe = transformers.OlmoeConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_experts=4,
    num_experts_per_tok=2, eos_token_id=1, pad_token_id=0,
)
switch = transformers.SwitchTransformersConfig(
    vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_heads=4, num_layers=2, num_sparse_encoder_layers=2, num_experts=4
)
found = {}
for kind, config in ((transformers.OlmoeForCausalLM, olmoe), (transformers.SwitchTransformersEncoderModel, switch)):
    with tempfile.TemporaryDirectory() as folder:
        kind(config).save_pretrained(folder)
        model = kind.from_pretrained(folder, experts_implementation="counted").eval()
        calls = 0
        with torch.no_grad():
            model(input_ids=torch.arange(2, 10).reshape(1, -1))
        found[kind.__name__] = calls
        print(f"{kind.__name__}: config says {model.config._experts_implementation!r}, called {calls} times")
assert found == {"OlmoeForCausalLM": 2, "SwitchTransformersEncoderModel": 0}, f"behaviour changed: {found}"
END
