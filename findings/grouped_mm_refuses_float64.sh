#!/usr/bin/env bash
# A float64 MoE model cannot run with the experts' default implementation.
#
# Expected: a float64 model, the usual reference for a kernel's error, runs as it is loaded.
# Seen:     grouped_mm, the default on a CPU, raises (torch's grouped product has no float64); eager and batched_mm run.
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
config = transformers.OlmoeConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_experts=4,
    num_experts_per_tok=2, eos_token_id=1, pad_token_id=0,
)
ids = torch.arange(2, 10).reshape(1, -1)
default = transformers.OlmoeForCausalLM(config).config._experts_implementation
found = {}
for name in ("eager", "batched_mm", "grouped_mm"):
    model = transformers.OlmoeForCausalLM(config).double().eval()
    model.set_experts_implementation(name)
    try:
        with torch.no_grad():
            found[name] = str(model(input_ids=ids).logits.dtype)
    except RuntimeError as error:
        found[name] = f"RuntimeError: {error}".splitlines()[0]
    print(f"{name}{' (default)' if name == default else ''}: {found[name]}")
assert default == "grouped_mm", f"behaviour changed: the default is {default}"
assert found["eager"] == found["batched_mm"] == "torch.float64", found
assert found["grouped_mm"].startswith("RuntimeError"), f"behaviour changed: grouped_mm: {found['grouped_mm']}"
END
