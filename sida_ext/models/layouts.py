"""Where the experts of a transformers model lie in its checkpoint, by transformers' own conversion rules.

transformers 5 keeps the experts of most families in one kind of module (``gate_up_proj`` and ``down_proj``, three
dimensions) and converts what a checkpoint holds while it loads: matrices of single experts are stacked, gate and up
joined, halves de-interleaved, numbers dequantised. Here the same rules, the operations themselves included, are applied
to one expert at a time: a stack of matrices gets a list of one, a fused tensor is read by a slice of one expert.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from sida_ext.experts.checkpoint import WeightFiles

__all__ = ["ExpertLayout", "Recipe", "canonical", "expert_parameters", "experts_modules", "shared_modules"]

# Operations that do the same to every expert, so that one expert's tensors can go through them alone: along which
# attributes they must not work (the experts' dimension is 0). Others are refused by name.
EXPERTWISE: dict[str, tuple[str, ...]] = {
    "MergeModulelist": (),
    "Concatenate": ("dim",),
    "Interleave": ("dim",),
    "Transpose": ("dim0", "dim1"),
    "ErnieFuseAndSplitTextVisionExperts": ("concat_dim",),
    "Inkling2LoopDequantizeExperts": (),
    "Fp8Dequantize": (),
    "Mxfp4Dequantize": (),
}
# Operations that take a list with a tensor for each expert.
STACKS = ("MergeModulelist", "ErnieFuseAndSplitTextVisionExperts")


def experts_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Module path -> experts module of the seam, in the order of the model's modules. A module that is run several
    times, or stands in two places, is there once."""
    return {
        name: module
        for name, module in model.named_modules()
        if all(hasattr(module, flag) for flag in ("has_gate", "is_transposed", "num_experts", "_apply_gate"))
    }


def expert_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The experts' parameters of a module of the seam by role: ``wi``, ``wo`` and, where there are biases, ``wi_bias``,
    ``wo_bias``. Other parameters of the module (a norm behind the experts) belong to no expert.

    Raises:
        ValueError: the module lacks one.
    """
    wi = "gate_up_proj" if module.has_gate else "up_proj"
    names = {"wi": wi, "wo": "down_proj"}
    if module.has_bias:
        names |= {"wi_bias": f"{wi}_bias", "wo_bias": "down_proj_bias"}
    found = {role: getattr(module, name, None) for role, name in names.items()}
    for role, parameter in found.items():
        if not isinstance(parameter, nn.Parameter) or parameter.dim() != (2 if role.endswith("bias") else 3):
            raise ValueError(
                f"{type(module).__name__} has no parameter {names[role]} of {2 if role.endswith('bias') else 3} "
                "dimensions, as the experts modules of this transformers have; update sida_ext"
            )
    return found  # type: ignore[return-value]


def shared_modules(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Path of each module whose experts are the parameters of an earlier one -> path of that one."""
    first: dict[int, str] = {}
    shared: dict[str, str] = {}
    for name, module in modules.items():
        key = id(expert_parameters(module)["wi"])
        if key in first:
            shared[name] = first[key]
        else:
            first[key] = name
    return shared


def canonical(module: nn.Module, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One expert's parts as a store has them, rows of ``[out, in]`` and gate rows before up rows.

    Args:
        parts: role (see :func:`expert_parameters`) -> part of the module's parameter, as it lies there, without the
            experts' dimension.
    """

    def rows(role: str, part: Tensor) -> Tensor:
        if part.dim() == 2 and module.is_transposed:
            part = part.transpose(0, 1)
        if role.startswith("wi") and module.has_gate and not module.is_concatenated:
            part = torch.cat([part[0::2], part[1::2]])
        return part.contiguous()

    return {role: rows(role, part) for role, part in parts.items()}


@dataclass(frozen=True)
class Recipe:
    """How one parameter of an experts module is made.

    Attributes:
        target: full name of the parameter.
        loaded_as: the name under which transformers collects its sources (of several parameters that one rule makes,
            the first one's).
        sources: the rule's source pattern -> keys of the checkpoint, for a stack of matrices in the order of experts.
        rule: transformers' converter; None: the tensor is there as the parameter is.
    """

    target: str
    loaded_as: str
    sources: dict[str, list[str]]
    rule: WeightConverter | None

    @property
    def operations(self) -> list[Any]:
        return [] if self.rule is None else list(self.rule.operations)

    @property
    def stacked(self) -> bool:
        """The checkpoint holds a tensor for each expert."""
        return any(type(operation).__name__ in STACKS for operation in self.operations)

    @property
    def kinds(self) -> int:
        """Modules that share the lists of tensors (text and vision experts), each with a part of them."""
        return 1 if self.rule is None else len(self.rule.target_patterns)

    @property
    def keys(self) -> list[str]:
        return [key for keys in self.sources.values() for key in keys]


class _OneExpert:
    """Stands for the model before operations that ask for a parameter's shape or type: one expert of it."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def get_parameter(self, name: str) -> Tensor:
        parameter = self._model.get_parameter(name)
        return torch.empty((1, *parameter.shape[1:]), dtype=parameter.dtype, device="meta")

    def get_submodule(self, name: str) -> Any:
        module = self._model.get_submodule(name)
        return SimpleNamespace(**{key: self.get_parameter(f"{name}.{key}") for key in module._parameters})


def _run(recipe: Recipe, collected: dict[str, list[Tensor]], model: Any, config: Any) -> Tensor:
    """The parameter that the rule makes of the collected tensors."""
    rule = recipe.rule
    if rule is None:
        return next(iter(collected.values()))[0]
    result: Any = collected
    for operation in rule.operations:
        result = operation.convert(
            result,
            source_patterns=rule.source_patterns,
            target_patterns=rule.target_patterns,
            full_layer_name=recipe.loaded_as,
            model=model,
            config=config,
            missing_keys=None,
        )
    for name in result:
        if name in recipe.loaded_as:
            prefix, _, suffix = recipe.loaded_as.partition(name)
            break
        if name == recipe.loaded_as:
            prefix = suffix = ""
            break
    else:
        prefix = suffix = None  # type: ignore[assignment]
    for name, made in result.items():
        full = name if prefix is None else f"{prefix}{name}{suffix}"
        if full == recipe.target or name == recipe.target:
            return (made[0] if isinstance(made, list) else made).detach()
    raise ValueError(f"transformers' rule for {recipe.target} makes {sorted(result)}, not that; update sida_ext")


class ExpertLayout:
    """The recipes of a model's experts over a checkpoint's files.

    Args:
        model: of the class that will be loaded, on the meta device.
        files: the checkpoint's weight files.
        quantizer: transformers' quantizer of a quantised checkpoint, set to dequantise.

    Raises:
        ValueError: the checkpoint does not hold the model's experts, or holds them in a way that cannot be read one
            expert at a time; the message says which.
    """

    def __init__(self, model: PreTrainedModel, files: WeightFiles, quantizer: Any = None) -> None:
        self.model, self.files = model, files
        self._one_expert = _OneExpert(model)
        self.modules = experts_modules(model)
        self.shared = shared_modules(self.modules)
        collected = self._collect(quantizer)
        self.recipes: dict[str, dict[str, Recipe]] = {}
        for name, module in self.modules.items():
            if name in self.shared:
                continue
            owners = [name, *(other for other, first in self.shared.items() if first == name)]
            self.recipes[name] = self._recipes_of(module, owners, collected)
        for name, recipes in self.recipes.items():
            for recipe in recipes.values():
                self._check(self.modules[name], recipe)
            self._check_neighbours(name, collected)

    @property
    def keys(self) -> set[str]:
        """The checkpoint's keys that make experts."""
        return {key for recipes in self.recipes.values() for recipe in recipes.values() for key in recipe.keys}

    @property
    def phrase(self) -> str:
        """How the checkpoint holds the experts, for people."""
        name, recipes = next(iter(self.recipes.items()))
        module, recipe = self.modules[name], recipes["wi"]
        kinds = [type(operation).__name__ for operation in recipe.operations]
        patterns = [pattern.replace("\\", "") for pattern in recipe.sources]
        sources = [re.split(r"experts\.|\.\d+\.", pattern)[-1] for pattern in patterns]
        parts = [("one matrix for each expert" if recipe.stacked else "all experts fused") + f" ({', '.join(sources)})"]
        if module.is_transposed or "Transpose" in kinds:
            parts.append("transposed")
        if not module.is_concatenated or "Interleave" in kinds:
            parts.append("gate and up in turns")
        if "ErnieFuseAndSplitTextVisionExperts" in kinds:
            parts.append("text and vision experts in one list")
        if any("equantize" in kind for kind in kinds) and len(recipe.keys) > 1:
            parts.append("MXFP4" if "Mxfp4Dequantize" in kinds else "block-scaled")
        return ", ".join(parts)

    def _collect(self, quantizer: Any) -> dict[str, tuple[dict[str, list[str]], WeightConverter | None]]:
        """Parameter name -> its sources and its rule, for every key of the checkpoint that the model has a place for,
        as transformers' loader collects them."""
        rules = get_model_conversion_mapping(self.model, hf_quantizer=quantizer)
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
        prefix, state = self.model.base_model_prefix, self.model.state_dict()
        found: dict[str, tuple[dict[str, list[str]], WeightConverter | None]] = {}
        for key in sorted(self.files.keys, key=dot_natural_key):
            renamed, pattern = rename_source_key(key, renamings, converters, prefix, state)
            if renamed not in state and key in state:
                renamed, pattern = rename_source_key(key, [], [], prefix, state)
            if renamed not in state:
                continue
            rule = by_pattern[pattern] if pattern is not None else None
            sources, _ = found.setdefault(renamed, ({}, rule))
            sources.setdefault(pattern if pattern is not None else key, []).append(key)
        return found

    def _recipes_of(
        self,
        module: nn.Module,
        owners: list[str],
        collected: Mapping[str, tuple[dict[str, list[str]], WeightConverter | None]],
    ) -> dict[str, Recipe]:
        names = {id(parameter): name for name, parameter in module.named_parameters(recurse=False)}
        recipes: dict[str, Recipe] = {}
        for role, parameter in expert_parameters(module).items():
            attribute = names[id(parameter)]
            for owner in owners:
                recipe = self._recipe(f"{owner}.{attribute}", collected)
                if recipe is not None:
                    recipes[role] = recipe
                    break
            else:
                raise ValueError(self._nothing_for(f"{owners[0]}.{attribute}"))
        return recipes

    def _recipe(
        self, target: str, collected: Mapping[str, tuple[dict[str, list[str]], WeightConverter | None]]
    ) -> Recipe | None:
        if target in collected:
            return Recipe(target, target, *collected[target])
        # A rule with several targets is collected under its first.
        for loaded_as, (sources, rule) in collected.items():
            if rule is None or len(rule.target_patterns) < 2:
                continue
            first, *others = rule.target_patterns
            if first in loaded_as and target in (loaded_as.replace(first, other) for other in others):
                return Recipe(target, loaded_as, sources, rule)
        return None

    def _nothing_for(self, target: str) -> str:
        family, class_name = self.model.config.model_type, type(self.model).__name__
        seen = sorted(key for key in self.files.keys if "expert" in key)
        return (
            f"{self.files.paths[0].parent} holds nothing that transformers would load as {target} of {class_name} "
            f"(model_type {family}); " + (f"it has {seen[0]}" if seen else "it holds no experts at all") + ". Is "
            "config.json of another model than the weights, or a shard missing from the index?"
        )

    def _check(self, module: nn.Module, recipe: Recipe) -> None:
        """The recipe can be applied to one expert, and makes the parameter: tried on tensors without data."""
        for operation in recipe.operations:
            kind = type(operation).__name__
            if kind not in EXPERTWISE or any(getattr(operation, name) == 0 for name in EXPERTWISE[kind]):
                raise ValueError(
                    f"{recipe.target}: transformers makes it by {operation!r}, which cannot be applied to one expert; "
                    "load the model with transformers, save it with save_pretrained(folder, "
                    "save_original_format=False) and pack that folder"
                )
        experts = int(module.num_experts)  # type: ignore[arg-type]
        if recipe.stacked:
            self._check_stack(recipe, experts)
        expected = (1, *self.model.get_parameter(recipe.target).shape[1:])
        try:
            made = _run(recipe, self._collected(recipe, 0, experts, meta=True), self._one_expert, self.model.config)
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"{recipe.target}: {self._described(recipe)} cannot be joined as transformers does: {error}"
            ) from error
        if tuple(made.shape) != expected:
            raise ValueError(
                f"{recipe.target}: {self._described(recipe)} give an expert of shape {tuple(made.shape[1:])}, expected "
                f"{experts} experts of shape {expected[1:]}; config.json is of another model than the weights"
            )
        if not made.is_floating_point() or made.dtype.itemsize < 2:
            raise ValueError(
                f"{recipe.target}: {self._described(recipe)} are {made.dtype}, expected float32, bfloat16 or float16; "
                "config.json names no quantisation that explains them"
            )

    def _check_stack(self, recipe: Recipe, experts: int) -> None:
        """There is a tensor for each expert, and all are of one shape."""
        lists = recipe.kinds
        for pattern, keys in recipe.sources.items():
            if len(keys) == experts * lists:
                for position, key in enumerate(keys):
                    first = keys[position // experts * experts]
                    if (found := self._form(key)) != (expected := self._form(first)):
                        raise ValueError(f"{key} is {found}, expected {expected} as {first} is")
                continue
            numbers = {int(part) for key in keys for part in _varying(keys, key)}
            missing = sorted(set(range(experts * lists)) - numbers)
            extra = sorted(numbers - set(range(experts * lists)))
            raise ValueError(
                f"{recipe.target}: the checkpoint has {len(keys)} tensors {pattern}, config.json says {experts} experts"
                + (" of each kind" if lists > 1 else "")
                + (f"; expert {missing[0]} is missing" if missing else "")
                + (f"; expert {extra[0]} is too many" if extra else "")
            )

    def _check_neighbours(
        self, name: str, collected: Mapping[str, tuple[dict[str, list[str]], WeightConverter | None]]
    ) -> None:
        """What stands beside the experts, the router above all, is of the configuration's shapes too: told before
        anything is packed, not when the rest of the model is loaded."""
        block = name.rpartition(".")[0] + "."
        for target, (sources, rule) in collected.items():
            if rule is not None or not target.startswith(block) or target.startswith(f"{name}."):
                continue
            key = next(iter(sources.values()))[0]
            expected = tuple(self.model.get_parameter_or_buffer(target).shape)
            if self.files.shape(key) != expected and self.files.dtype(key).itemsize > 1:
                raise ValueError(
                    f"{key} has shape {self.files.shape(key)}, expected {expected} by config.json, beside the "
                    f"{self.modules[name].num_experts} experts of {name}; it is of another model than the weights"
                )

    def _described(self, recipe: Recipe) -> str:
        keys = recipe.keys
        shown = ", ".join(f"{key} {self.files.shape(key)}" for key in keys[:2])
        return shown + (f" and {len(keys) - 2} more" if len(keys) > 2 else "")

    def expert(self, name: str, index: int, roles: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Parts of expert ``index`` of the module ``name`` as a store has them, of the module's own width.

        Args:
            roles: which (see :func:`expert_parameters`); None: all.
        """
        module, recipes = self.modules[name], self.recipes[name]
        experts = int(module.num_experts)  # type: ignore[arg-type]
        with torch.no_grad():
            parts = {
                role: _run(recipe, self._collected(recipe, index, experts), self._one_expert, self.model.config)[0]
                for role, recipe in recipes.items()
                if roles is None or role in roles
            }
            return canonical(module, parts)

    def _form(self, key: str) -> str:
        return f"{self.files.dtype(key)} of shape {self.files.shape(key)}"

    def _collected(self, recipe: Recipe, index: int, experts: int, meta: bool = False) -> dict[str, list[Tensor]]:
        """What transformers' rule gets to see if there is but one expert; ``meta``: tensors without data."""

        def read(key: str, sliced: bool) -> Tensor:
            shape = self.files.shape(key)
            if meta:
                rows = (1, *shape[1:]) if sliced else shape
                return torch.empty(rows, dtype=self.files.dtype(key), device="meta")
            return self.files.rows(key, index, index + 1) if sliced else self.files.tensor(key)

        collected: dict[str, list[Tensor]] = {}
        for pattern, keys in recipe.sources.items():
            if recipe.stacked:
                # A list that is parted into kinds has the first kind's experts first.
                part = math.ceil(len(keys) / recipe.kinds)
                collected[pattern] = [read(keys[kind * part + index], False) for kind in range(recipe.kinds)]
            else:  # some are one number for all experts
                shape = self.files.shape(keys[0])
                collected[pattern] = [read(keys[0], len(shape) > 0 and shape[0] == experts)]
        return collected


def _varying(keys: list[str], key: str) -> list[str]:
    """The numbers in a key by which keys of one pattern differ: the number of the expert."""
    parts = [other.split(".") for other in keys]
    return [
        part
        for place, part in enumerate(key.split("."))
        if part.isdigit() and len({other[place] for other in parts if len(other) > place}) > 1
    ]
