"""Write a Switch encoder checkpoint of real shapes with random weights: ``python -m bench.engine.checkpoint 128
FOLDER``.

The routing of a random model is spread widely over the experts, which is the hard case for a cache. 128 experts of
Switch-base take 7 GB of bf16 safetensors in shards of about 1 GB.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from rich.progress import track
from safetensors.torch import save_file
from transformers import SwitchTransformersConfig, SwitchTransformersEncoderModel

SHARD_BYTES = 1_000_000_000


def base_config(num_experts: int, num_layers: int = 12) -> SwitchTransformersConfig:
    """Switch-base: d_model 768, d_ff 3072, 12 layers (or fewer), every second one an MoE layer."""
    return SwitchTransformersConfig(
        num_experts=num_experts,
        d_ff=3072,
        num_layers=num_layers,
        num_sparse_encoder_layers=num_layers // 2,
        architectures=["SwitchTransformersEncoderModel"],
    )


def write_checkpoint(num_experts: int, folder: Path, num_layers: int = 12) -> None:
    """Shapes come from transformers' own model on the meta device; each tensor is drawn, written and forgotten."""
    config = base_config(num_experts, num_layers)
    with torch.device("meta"):
        shapes = {key: tensor.shape for key, tensor in SwitchTransformersEncoderModel(config).state_dict().items()}
    del shapes["encoder.embed_tokens.weight"]  # tied to shared.weight
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    random = torch.Generator().manual_seed(0)
    # Experts are windows into one draw: all distinct, and much quicker than drawing billions of numbers.
    pool = torch.randn(16 << 20, generator=random) * 0.03
    weight_map: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}

    def flush() -> None:
        name = f"model-{len(set(weight_map.values())):05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, name))
        shard.clear()

    for key, shape in track(shapes.items(), "tensors"):
        count = shape.numel()
        if "layer_norm" in key:
            tensor = torch.ones(shape)
        elif ".experts." in key:
            start = int(torch.randint(0, len(pool) - count, (1,), generator=random))
            tensor = pool[start : start + count].view(shape)
        else:
            tensor = torch.randn(shape, generator=random) * (1.0 if key == "shared.weight" else 0.03)
        shard[key] = tensor.to(torch.bfloat16)
        if sum(t.numel() * 2 for t in shard.values()) > SHARD_BYTES:
            flush()
    if shard:
        flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("num_experts", type=int)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    write_checkpoint(arguments.num_experts, arguments.folder)
