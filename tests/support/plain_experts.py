"""transformers' experts computed token by token: slow, and no token's bits depend on the others of its batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

BY_TOKEN = "sida_test_by_token"


def _by_token(module: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    rows = []
    for token, experts, factors in zip(hidden, index, weights, strict=True):
        total = torch.zeros(hidden.shape[1], dtype=torch.float32)
        for expert, factor in zip(experts.tolist(), factors.float(), strict=True):
            middle = module._apply_gate(torch.mv(module.gate_up_proj[expert], token)[None])[0]
            total = total + factor * torch.mv(module.down_proj[expert], middle).float()
        rows.append(total.to(hidden.dtype))
    return torch.stack(rows)


ALL_EXPERTS_FUNCTIONS.register(BY_TOKEN, _by_token)
