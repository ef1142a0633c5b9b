"""Packing holds a few experts, whatever the checkpoint's layout."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import Qwen3MoeConfig

from bench.causal.tiny_families import tiny_config

D_MODEL, D_FF, EXPERTS, LAYERS = 1024, 1024, 24, 2
EXPERT_BYTES = 3 * D_MODEL * D_FF * 2


def checkpoint(folder: Path, fused: bool) -> None:
    sizes = {"hidden_size": D_MODEL, "moe_intermediate_size": D_FF, "num_experts": EXPERTS, "num_hidden_layers": LAYERS}
    config = tiny_config(Qwen3MoeConfig, **sizes)
    config.architectures = ["Qwen3MoeForCausalLM"]
    config.save_pretrained(folder)
    matrix = torch.full((D_FF, D_MODEL), 0.01, dtype=torch.bfloat16)
    weights = {}
    for layer in range(LAYERS):
        name = f"model.layers.{layer}.mlp.experts"
        if fused:
            weights[f"{name}.gate_up_proj"] = torch.cat([matrix, matrix]).repeat(EXPERTS, 1, 1)
            weights[f"{name}.down_proj"] = matrix.repeat(EXPERTS, 1, 1)
        else:
            for index in range(EXPERTS):
                for projection in ("gate_proj", "up_proj", "down_proj"):
                    weights[f"{name}.{index}.{projection}.weight"] = matrix.clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("fused", [False, True])
def test_packing_takes_little_memory(fused, tmp_path):
    checkpoint(tmp_path / "in", fused)
    command = [sys.executable, "-m", "bench.engine.pack_memory", str(tmp_path / "in"), str(tmp_path / "x.sida")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    found = re.search(r"at most (\d+) MiB more", run.stdout)
    assert found is not None, run.stdout
    # All experts are 288 MiB, those of a layer 144.
    assert int(found[1]) << 20 <= (150 << 20) + 3 * EXPERT_BYTES
