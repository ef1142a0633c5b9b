"""The ways of ``bench.limited_memory``: how each loads the model, and what is known of a run beforehand."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

LENGTH = 32  # tokens of a sentence
DENSE_ITEM_BYTES = 4  # everything but the experts computes in float32


@dataclass(frozen=True)
class Way:
    """One row: ``kind`` is mmap, accelerate or ours; the other fields are ours alone."""

    name: str
    kind: str
    dtype: str = "bfloat16"
    oracle: bool = False
    order: str = "given"


WAYS = {
    way.name: way
    for way in (
        Way("mmap", "mmap"),
        Way("accelerate", "accelerate"),
        Way("ours", "ours"),
        Way("oracle", "ours", oracle=True),
        Way("ours-int8", "ours", "int8"),
        Way("oracle-int8", "ours", "int8", oracle=True),
        Way("overlap", "ours", oracle=True, order="overlap"),
        Way("overlap-int8", "ours", "int8", oracle=True, order="overlap"),
    )
}


def batches(count: int, batch: int, seed: int = 0, reuse: int = 0) -> Iterator[dict[str, Any]]:
    """Random sentences; with `reuse`, each drawn from that many."""
    random = torch.Generator().manual_seed(seed)
    known = torch.randint(2, 32000, (reuse, LENGTH), generator=random)
    for _ in range(count):
        if reuse:
            yield {"input_ids": known[torch.randint(reuse, (batch,), generator=random)]}
        else:
            yield {"input_ids": torch.randint(2, 32000, (batch, LENGTH), generator=random)}


def weight_map(checkpoint: Path) -> dict[str, str]:
    return json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"]


def dense_bytes(checkpoint: Path) -> int:
    """Bytes of everything but the experts, as it computes."""
    from sida_ext.models.packing import source_of

    with source_of(checkpoint) as source:
        return source.other_bytes(DENSE_ITEM_BYTES)


def load_mmap(checkpoint: Path) -> Any:
    """transformers, experts memory-mapped from safetensors: the page cache is the expert cache."""
    from safetensors import safe_open
    from transformers import SwitchTransformersConfig, SwitchTransformersEncoderModel

    with torch.device("meta"):
        model = SwitchTransformersEncoderModel(SwitchTransformersConfig.from_pretrained(checkpoint))
    names = weight_map(checkpoint)
    files = {name: safe_open(checkpoint / name, "pt") for name in sorted(set(names.values()))}
    state = {}
    for key, name in names.items():
        tensor = files[name].get_tensor(key)
        state[key] = tensor if ".experts." in key else tensor.float()
    state["encoder.embed_tokens.weight"] = state["shared.weight"]
    model.load_state_dict(state, assign=True)
    for key, module in model.named_modules():
        if ".experts." in key and key.endswith((".wi", ".wo")):
            module.register_forward_pre_hook(lambda _, args: (args[0].to(torch.bfloat16),))
    return model.eval()


def load_accelerate(checkpoint: Path) -> Any:
    """transformers, experts offloaded to disk by accelerate."""
    from accelerate import init_empty_weights
    from accelerate.hooks import attach_align_device_hook
    from accelerate.utils import OffloadedWeightsLoader
    from accelerate.utils.modeling import set_module_tensor_to_device
    from safetensors import safe_open
    from transformers import SwitchTransformersConfig, SwitchTransformersEncoderModel

    with init_empty_weights():
        model = SwitchTransformersEncoderModel(SwitchTransformersConfig.from_pretrained(checkpoint))
    entries = {}
    for key, name in weight_map(checkpoint).items():
        path = str(checkpoint / name)
        if ".experts." in key:
            entries[key] = {"safetensors_file": path, "weight_name": key, "dtype": "bfloat16"}
            continue
        with safe_open(path, "pt") as file:
            set_module_tensor_to_device(model, key, "cpu", value=file.get_tensor(key), dtype=torch.float32)
    model.encoder.embed_tokens = model.shared
    for name, module in model.named_modules():
        if name.endswith("mlp.experts"):
            index = {k.removeprefix(name + "."): v for k, v in entries.items() if k.startswith(name + ".")}
            loader = OffloadedWeightsLoader(index=index)
            attach_align_device_hook(module, execution_device="cpu", offload=True, weights_map=loader)
    return model.eval()


def load_ours(checkpoint: Path, dtype: str, expert_memory: str) -> Any:
    import sida_ext

    return sida_ext.from_pretrained(checkpoint, expert_memory=expert_memory, expert_dtype=dtype, dtype=torch.float32)


class Known:
    """The true routing of a run's sentences, found beforehand by a pass that is not timed.

    It serves as a predictor that is always right, and says what Belady's optimum would read.
    """

    def __init__(self, tables: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        self._tables = tables

    @staticmethod
    def _key(input_ids: torch.Tensor) -> str:
        return hashlib.sha256(input_ids.numpy().tobytes()).hexdigest()

    def predict(self, input_ids: torch.Tensor, attention_mask: Any = None, top_k: int = 1) -> Any:
        import sida_ext

        return sida_ext.HashTable(*self._tables[self._key(input_ids)])

    def used(self, inputs: list[dict[str, Any]]) -> list[list[tuple[int, list[int]]]]:
        """Distinct experts by batch and layer."""
        found = []
        for batch in inputs:
            index = self._tables[self._key(batch["input_ids"])][0]
            layers = [(layer, index[:, :, layer].unique().tolist()) for layer in range(index.shape[2])]
            found.append([(layer, [expert for expert in experts if expert >= 0]) for layer, experts in layers])
        return found

    @classmethod
    def of(cls, model: Any, inputs: list[dict[str, Any]]) -> Known:
        from sida_ext.models.families import moe_layers

        tables: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        routed: list[Any] = []
        hooks = [
            layer.router.register_forward_hook(lambda _, args, output: routed.append(output[:2]))
            for layer in moe_layers(model).values()
        ]
        with torch.inference_mode():
            for batch in inputs:
                key = cls._key(batch["input_ids"])
                if key in tables:
                    continue
                routed.clear()
                model(**batch)
                index = torch.stack([pair[0] for pair in routed], dim=2).unsqueeze(-1).clone()
                gate = torch.stack([pair[1] for pair in routed], dim=2).unsqueeze(-1).clone()
                gate[index < 0] = 0  # over capacity: no expert is wanted
                tables[key] = (index, gate)
        for hook in hooks:
            hook.remove()
        return cls(tables)

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(self._tables, path)

    @classmethod
    def load(cls, path: Path) -> Known:
        return cls(torch.load(path, weights_only=True))
