#!/usr/bin/env bash
# A Qwen3-VL-MoE checkpoint whose expert matrices are square is loaded without the transposition that others get.
#
# Expected: expert matrices stored as [experts, in, out], the published layout, are transposed on loading whatever their size.
# Seen:     they are transposed where in and out differ. Where hidden size and twice the experts' width are equal the shapes
#           fit as they lie, and the model computes with transposed weights.
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
from safetensors.torch import load_file, save_file

print(f"torch {torch.__version__}, transformers {transformers.__version__}")
found = {}
for width in (32, 16):
    config = transformers.Qwen3VLMoeConfig(
        text_config={
            "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": width,
            "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8, "num_experts": 4,
            "num_experts_per_tok": 2, "pad_token_id": 0,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4},
        },
        vision_config={
            "depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 4, "out_hidden_size": 32,
            "deepstack_visual_indexes": [0],
        },
    )
    model = transformers.Qwen3VLMoeForConditionalGeneration(config)
    model.save_pretrained("model")
    file = "model/model.safetensors"
    state = load_file(file)
    for key in [key for key in state if ".experts." in key]:  # the published layout
        state[key] = state[key].transpose(1, 2).contiguous()
    save_file(state, file, metadata={"format": "pt"})
    loaded = transformers.Qwen3VLMoeForConditionalGeneration.from_pretrained("model").state_dict()
    (name,) = (name for name in loaded if name.endswith("experts.gate_up_proj"))
    stored = tuple(state["model.language_model.layers.0.mlp.experts.gate_up_proj"].shape)
    found[stored] = torch.equal(loaded[name], model.state_dict()[name])
    print(f"stored as {stored}: loaded as it was saved: {found[stored]}")
assert found == {(4, 32, 64): True, (4, 32, 32): False}, f"behaviour changed: {found}"
END
