#!/usr/bin/env bash
# The flags of an experts module do not tell which gate it computes.
#
# Expected: two modules with the same has_gate, has_bias, is_transposed, is_concatenated and has_post_expert_norm compute
#           act(gate) * up alike, as integrations that read the flags assume.
# Seen:     deepseek_v4, hy_v4 and minimax_m3_vl carry Mixtral's flags and clamp gate and up before; the last adds 1 to up
#           and has another activation. Only the method _apply_gate knows it.
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
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts
from transformers.models.hy_v4.modeling_hy_v4 import HYV4Experts
from transformers.models.minimax_m3_vl.configuration_minimax_m3_vl import MiniMaxM3VLTextConfig
from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

print(f"torch {torch.__version__}, transformers {transformers.__version__}")
FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "has_post_expert_norm")
sizes = {"hidden_size": 8, "intermediate_size": 8, "moe_intermediate_size": 8}
experts = {
    "mixtral": MixtralExperts(transformers.MixtralConfig(num_local_experts=2, **sizes)),
    "deepseek_v4": DeepseekV4Experts(transformers.DeepseekV4Config(n_routed_experts=2, **sizes)),
    "hy_v4": HYV4Experts(transformers.HYV4Config(num_experts=2, **sizes)),
    "minimax_m3_vl": MiniMaxM3VLExperts(MiniMaxM3VLTextConfig(num_local_experts=2, **sizes)),
}
before = torch.tensor([[12.0, -3.0, 0.5, 20.0, 12.0, 9.0, -15.0, 1.0]])  # four gate values, four up values
flags, gates = {}, {}
for name, module in experts.items():
    flags[name] = tuple(getattr(module, flag) for flag in FLAGS)
    gates[name] = module._apply_gate(before)[0]
    print(f"{name:14} {flags[name]} {[round(value, 3) for value in gates[name].tolist()]}")
assert len(set(flags.values())) == 1, f"behaviour changed: {flags}"
for name in ("deepseek_v4", "hy_v4", "minimax_m3_vl"):
    assert (gates[name] - gates["mixtral"]).abs().max() > 1, f"behaviour changed: {name} is gated as mixtral"
END
