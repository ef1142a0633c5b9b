"""The experts of a checkpoint, counted from tensor names, shapes and config.json: no weight, no torch, no transformers.

Which names a family's files have is data here; what transformers makes of them when it loads is its own business, and a
test compares both.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sida_ext.planning.headers import CheckpointHeaders, TensorHeader

__all__ = ["ExpertShape", "ModelFacts", "count_experts"]

# ``model_type`` of the families of transformers' experts seam, and Switch. Multimodal models by their outer name too.
SERVED_NAMES = (
    "afmoe aria aria_text axk1 axk2 bailing_hybrid beam cohere2_moe deepseek_ocr2 deepseek_ocr2_text "
    "deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 diffusion_gemma diffusion_gemma_text dots1 "
    "dots3_note dots3_note_text ernie4_5_moe ernie4_5_vl_moe ernie4_5_vl_moe_text exaone_moe flex_olmo "
    "flint gemma4 gemma4_text glm4_moe glm4_moe_lite glm4v_moe glm4v_moe_text glm5_next glm5_next_text "
    "glm_moe_dsa gpt_oss granitemoe granitemoe_swa granitemoehybrid granitemoeshared hunyuan_v1_moe hy_v3 "
    "hy_v4 hy_v4_vl hy_v4_vl_text inkling_mm_model inkling_text inkling2 inkling2_text inkling2_loop "
    "inkling2_loop_text jamba kimi_k25 kimi_linear kolibri1 laguna lara_mini lfm2_moe mellum "
    "mimo_v2_flash minimax minimax_m2 minimax_m3_vl minimax_m3_vl_text mistral4 mistral_large4 "
    "mistral_large4_text mixtral muse_spark muse_spark_text nemotron_h olmoe openai_privacy_filter phimoe "
    "qwen2_moe qwen3_5_moe qwen3_5_moe_text qwen3_moe qwen3_next qwen3_omni_moe qwen3_omni_moe_thinker "
    "qwen3_vl_moe qwen3_vl_moe_text qwen4_exp sarvam_mla sarvam_moe solar_open switch_transformers "
    "unlimited_ocr unlimited_ocr_text zaya"
)
SERVED = frozenset(SERVED_NAMES.split())
REFUSED = {
    "nllb-moe": "transformers runs only two of its experts, so there is nothing right to compare with",
    "nllb_moe": "transformers runs only two of its experts, so there is nothing right to compare with",
    **dict.fromkeys(
        ("longcat_flash", "dbrx", "llama4", "llama4_text", "jetmoe", "step3p7"),
        "its experts are outside the seam that sida_ext swaps",
    ),
}
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
CHOICES = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_top_k",
    "moe_k",
    "top_k_experts",
    "experts_per_token",
)
# A store may hold an expert's width, where it is not the model's.
WIDTHS = ("moe_latent_size", "moe_hidden_size", "hidden_size", "d_model")

# One tensor of one expert, or of all experts of a layer; what follows the name tells of quantised forms.
ONE = re.compile(
    r"^(?P<module>.*?)\bexperts\.(?:expert_)?(?P<index>\d+)\."
    r"(?P<matrix>gate_proj|up_proj|down_proj|w1|w2|w3|wi|wo)\.(?P<part>weight|bias|weight_scale_inv|weight_scale)$"
)
ALL = re.compile(
    r"^(?P<module>.*?)\b(?:experts\.(?P<matrix>gate_up_proj|up_proj|down_proj|w13_weight|w2_weight|fc1\.weight|fc2\.weight)"
    r"|(?P<granite>(?:input|output)_linear\.weight))(?P<part>_bias|_blocks|_scales|_scale_inv)?$"
)
PARTS = {
    **dict.fromkeys(("gate_proj", "w1"), "gate"),
    **dict.fromkeys(("up_proj", "w3", "wi"), "up"),
    **dict.fromkeys(("down_proj", "w2", "wo", "w2_weight", "fc2.weight", "output_linear.weight"), "down"),
    **dict.fromkeys(("gate_up_proj", "w13_weight", "fc1.weight", "input_linear.weight"), "gate_up"),
}
LAYER = re.compile(r"(?:^|\.)(?:layers|block|blocks|h)\.(\d+)\.")
# Heads that guess several tokens ahead: transformers' classes ignore their keys.
AHEAD = re.compile(r"(?:^|\.)(?:mtp|mtp_[a-z]+|nextn|eagle)(?:\.|$)")
# What ``dense_dtype`` leaves alone, and the numbers of a matrix from which it takes one (sida_ext.models.dense).
TABLES = re.compile(r"(?:^|\.)(?:[a-z_]*embed[a-z_]*|shared|wte|wpe|word_embeddings|relative_attention_bias)\.weight$")
ROUTER = re.compile(r"(?:^|\.)(?:router|gate)\.")
LARGE = 1 << 14
OTHER_SENSES = re.compile(
    r"(?:^|\.)(?:[a-z_]*visual|[a-z_]*vision[a-z_]*|[a-z_]*audio[a-z_]*|talker|code2wav|sam_model)\."
)


@dataclass(frozen=True)
class ExpertShape:
    """What all experts of some layers are: gated, its first matrix has ``2 * d_ff`` rows."""

    d_model: int
    d_ff: int
    gated: bool
    biased: bool


@dataclass(frozen=True)
class ModelFacts:
    """What planning needs of a model. Bytes are of the checkpoint's files, numbers are counted, not bytes.

    Attributes:
        family: ``model_type`` of the configuration.
        layers: module path of each MoE layer, in the files' names.
        experts: in each of them.
        shapes: number of experts of each shape, over all layers; one entry but for models with two kinds.
        top_k: experts of each token in a layer; a mean where layers differ.
        other_numbers: parameters of everything else that a model loads, other_dtypes: by type of the file.
        embedding_numbers: of these, tables of which a token reads one row.
        dense: rows and columns of the matrices that ``dense_dtype`` takes, a head that is the table itself among them;
            tied_numbers: of such a head, whose table stays beside it.
        layer_numbers: of these, in the layers of the language model, read for each token; head_numbers: in its head.
        kv_numbers: numbers that one token adds to the caches of all attention layers, without a window.
        windowed: (numbers, window) of the layers whose cache ends with a window of tokens.
        depth: layers of the model, MoE or not, of an encoder and a decoder together.
        encoder_only: no decoder, so no step by step and no cache.
    """

    family: str
    layers: tuple[str, ...]
    experts: int
    shapes: dict[ExpertShape, int]
    top_k: float
    vocabulary: int
    checkpoint_bytes: int
    expert_source_bytes: int
    other_numbers: int
    other_dtypes: dict[str, int]
    embedding_numbers: int
    dense: tuple[tuple[int, int], ...]
    tied_numbers: int
    layer_numbers: int
    head_numbers: int
    ignored_numbers: int
    kv_numbers: int
    windowed: tuple[tuple[int, int], ...]
    depth: int
    encoder_only: bool
    dtype: str

    @property
    def shape(self) -> ExpertShape:
        """Of a store's records: the widest; narrower experts are filled up with zeros."""
        return max(self.shapes, key=lambda shape: shape.d_ff)

    @property
    def total_experts(self) -> int:
        return sum(self.shapes.values())

    @property
    def decode_layers(self) -> tuple[int, ...]:
        """Of ``layers``, those that each step of decoding runs: all, or a decoder's own beside an encoder."""
        return self._stack("decoder")

    @property
    def prompt_layers(self) -> tuple[int, ...]:
        """Of ``layers``, those that read a prompt: all, or the encoder's."""
        return self._stack("encoder")

    def _stack(self, name: str) -> tuple[int, ...]:
        own = tuple(number for number, layer in enumerate(self.layers) if layer.startswith(f"{name}."))
        return own or tuple(range(len(self.layers)))

    @property
    def expert_numbers(self) -> int:
        return sum(
            count * shape.d_model * shape.d_ff * (3 if shape.gated else 2) for shape, count in self.shapes.items()
        )


def _configs(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The configuration and those inside it, that of a text model first."""
    for key in ("text_config", "thinker_config", "language_config", "llm_config"):
        if isinstance(config.get(key), dict):
            yield from _configs(config[key])
    yield config


def _first(configs: list[dict[str, Any]], names: tuple[str, ...]) -> Any:
    for config in configs:
        for name in names:
            if config.get(name) is not None:
                return config[name]
    return None


def _check_family(config: dict[str, Any], name: str) -> str:
    family = config.get("model_type")
    if not isinstance(family, str):
        raise ValueError(f"{name}: model_type in config.json is {family!r}, expected the name of a transformers family")
    inner = config.get("text_config")
    if family in REFUSED or (isinstance(inner, dict) and inner.get("model_type") in REFUSED):
        family = family if family in REFUSED else inner["model_type"]  # type: ignore[index]
        raise ValueError(f"{name}: the family {family} is not served: {REFUSED[family]}")
    quantization = config.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method not in (None, "fp8", "mxfp4"):
        raise ValueError(
            f"{name}: config.json says that the weights are quantised by {method!r}, expected none, fp8 or mxfp4; plan "
            "with the checkpoint that it was made from"
        )
    return family


class _Counted:
    """The tensors of one checkpoint, sorted into experts, the rest, and what transformers does not load."""

    def __init__(self, headers: CheckpointHeaders, depth: int | None) -> None:
        self.name = headers.name
        self.single: dict[str, dict[int, dict[str, TensorHeader]]] = {}
        self.fused: dict[str, dict[str, TensorHeader]] = {}
        self.biased: set[str] = set()
        self.source_bytes = self.ignored = 0
        self.other: dict[str, TensorHeader] = {}
        self.depths: set[int] = set()
        for key, tensor in headers.tensors.items():
            layer = LAYER.search(key)
            elsewhere = OTHER_SENSES.search(key) is not None
            if layer and not elsewhere:
                if depth is not None and int(layer[1]) >= depth:
                    self.ignored += tensor.numbers
                    continue
                self.depths.add(int(layer[1]))
            if AHEAD.search(key):
                self.ignored += tensor.numbers
            elif elsewhere or not self._take(key, tensor):
                self.other[key] = tensor

    def _take(self, key: str, tensor: TensorHeader) -> bool:
        if match := ONE.match(key):
            module, matrix = match["module"] + "experts", match["matrix"]
            if match["part"] == "weight":
                expert = self.single.setdefault(module, {}).setdefault(int(match["index"]), {})
                expert[PARTS[matrix]] = tensor
        elif match := ALL.match(key):
            matrix = match["matrix"] or match["granite"]
            if match["granite"] and not match["module"].endswith("block_sparse_moe."):
                return False
            module = match["module"] + ("experts" if match["matrix"] else "")
            part = match["part"]
            if part in (None, "_blocks"):
                if part == "_blocks":  # uint8 [E, rows, columns / 32, 16], two 4-bit numbers a byte
                    *rows, groups, half = tensor.shape
                    tensor = TensorHeader("F4", (*rows, groups * half * 2), tensor.bytes)
                self.fused.setdefault(module.rstrip("."), {})[PARTS[matrix]] = tensor
        else:
            return False
        if match["part"] in ("bias", "_bias"):
            self.biased.add((match["module"] + "experts").rstrip("."))
        self.source_bytes += tensor.bytes
        return True

    def _bad(self, text: str) -> ValueError:
        return ValueError(f"{self.name}: the headers disagree with config.json: {text}")

    def _shape(self, module: str, parts: dict[str, tuple[int, ...]], widths: list[int], where: str) -> ExpertShape:
        """Of one expert, from the shapes of its matrices in whichever orientation."""
        first = parts.get("gate_up") or parts.get("up")
        down = parts.get("down")
        if first is None or down is None or len(first) != 2 or len(down) != 2:
            have = ", ".join(f"{part} {list(shape)}" for part, shape in parts.items())
            raise ValueError(
                f"{self.name}: {where} has {have or 'no matrix'}, expected up and down, each of two dimensions"
            )
        gated = "gate_up" in parts or "gate" in parts
        ups = 2 if "gate_up" in parts else 1
        for width in widths:
            if width in down:
                d_ff = down[0] * down[1] // width
                if sorted(first) == sorted((ups * d_ff, width)) and parts.get("gate", first) == first:
                    return ExpertShape(width, d_ff, gated, module in self.biased)
        raise self._bad(
            f"{where} has a first matrix of {list(first)} and a second of {list(down)}; config.json gives a width of "
            f"{' or '.join(map(str, dict.fromkeys(widths)))}"
        )

    def shapes(self, widths: list[int]) -> tuple[dict[ExpertShape, int], dict[str, int]]:
        """Experts of each shape, and how many each module has."""
        shapes: dict[ExpertShape, int] = {}
        counts: dict[str, int] = {}
        for module, experts in self.single.items():
            if sorted(experts) != list(range(len(experts))):
                gap = next(index for index in range(len(experts)) if index not in experts)
                raise ValueError(f"{self.name}: {module} has experts up to {max(experts)}, but none of number {gap}")
            for index, parts in experts.items():
                given = {part: tensor.shape for part, tensor in parts.items()}
                shape = self._shape(module, given, widths, f"{module}.{index}")
                shapes[shape] = shapes.get(shape, 0) + 1
            counts[module] = len(experts)
        for module, parts in self.fused.items():
            sizes = {tensor.shape[0] if len(tensor.shape) == 3 else None for tensor in parts.values()}
            if len(sizes) != 1 or None in sizes:
                have = ", ".join(f"{part} {list(tensor.shape)}" for part, tensor in parts.items())
                raise ValueError(f"{self.name}: {module} has {have}, expected [experts, rows, columns] of one size")
            count = sizes.pop()
            shape = self._shape(module, {part: tensor.shape[1:] for part, tensor in parts.items()}, widths, module)
            shapes[shape] = shapes.get(shape, 0) + int(count or 0)
            counts[module] = int(count or 0)
        return shapes, counts


def _natural(name: str) -> list[Any]:
    return [
        (0, int(part), "") if part.isdigit() else (1, {"encoder": 0, "decoder": 1}.get(part, 2), part)
        for part in name.split(".")
    ]


def _rows(tensors: Mapping[str, TensorHeader]) -> dict[int, int]:
    """Numbers that one token adds to the cache of each attention layer: rows of what makes keys and values."""
    rows: dict[int, int] = {}
    for key, tensor in tensors.items():
        layer = LAYER.search(key)
        if layer is None or OTHER_SENSES.search(key) or ".encoder." in f".{key}":
            continue
        number = int(layer[1])
        leaf = key.removesuffix(".weight").rsplit(".", 1)[-1]
        keys = leaf in ("k_proj", "v_proj") and "linear_attn" not in key
        keys |= leaf in ("k", "v") and "Attention" in key  # T5's kind, self and cross attention
        # Latent attention: what is cached is the latent and the rotary part.
        if keys or leaf == "kv_a_proj_with_mqa":
            rows[number] = rows.get(number, 0) + tensor.shape[0]
    return rows


def _cache(rows: dict[int, int], configs: list[dict[str, Any]]) -> tuple[int, tuple[tuple[int, int], ...]]:
    """Numbers a token in layers without a window, and (numbers, window) of those with one."""
    kinds = _first(configs, ("layer_types",))
    window = _first(configs, ("sliding_window",))
    plain, windowed = 0, []
    for layer, count in rows.items():
        sliding = isinstance(kinds, list) and layer < len(kinds) and kinds[layer] == "sliding_attention"
        if sliding and isinstance(window, int) and window > 0:
            windowed.append((count, window))
        else:
            plain += count
    return plain, tuple(windowed)


def count_experts(headers: CheckpointHeaders) -> ModelFacts:
    """The experts of a checkpoint, and what everything else takes.

    Layers that transformers does not load (multi-token prediction) are not counted; shared experts, routers and vision
    towers are part of everything else.

    Raises:
        ValueError: no experts, a family that is not served, weights quantised in a way that is not read, or headers
            that disagree with config.json or with themselves; the message says which.
    """
    config, name = headers.config, headers.name
    family = _check_family(config, name)
    configs = list(_configs(config))
    named = _first(configs, EXPERT_COUNTS)
    depth = _first(configs, ("num_hidden_layers",))
    total = depth
    if family == "switch_transformers":
        depths = [
            config.get(key) or 0
            for stack, key in (("encoder.", "num_layers"), ("decoder.", "num_decoder_layers"))
            if any(name.startswith(stack) for name in headers.tensors)
        ]
        depth, total = max(depths, default=None), sum(depths)
    counted = _Counted(headers, depth if isinstance(depth, int) else None)
    if not counted.single and not counted.fused:
        if named is None:
            raise ValueError(
                f"{name}: config.json of the family {family} names no experts ({', '.join(EXPERT_COUNTS)}) and the "
                "headers hold none: it is no Mixture of Experts, and there is nothing to plan"
            )
        raise ValueError(
            f"{name}: config.json says {named} experts, but no tensor of the headers is an expert's"
            + ("" if family in SERVED else f"; the family {family} is unknown to sida plan")
        )
    if family not in SERVED:
        raise ValueError(
            f"{name}: the family {family} is unknown, expected one of transformers' families with an experts module "
            f"({', '.join(sorted(SERVED)[:6])}, ...); update sida_ext if it is newer"
        )
    widths = [int(value) for key in WIDTHS if isinstance(value := _first(configs, (key,)), int)]
    if not widths:
        raise ValueError(f"{name}: config.json names no width ({', '.join(WIDTHS)})")
    shapes, counts = counted.shapes(widths)
    layers = tuple(sorted(counts, key=_natural))
    expected = sum(named) if isinstance(named, list) else named
    for layer in layers:
        if expected is not None and counts[layer] != expected:
            raise counted._bad(f"{layer} holds {counts[layer]} experts, config.json says {expected}")
        if counts[layer] != counts[layers[0]]:
            raise ValueError(f"{name}: {layer} holds {counts[layer]} experts, but {layers[0]} {counts[layers[0]]}")
    if isinstance(depth, int):
        missing = sorted(set(range(depth)) - counted.depths)
        if missing:
            raise counted._bad(f"no tensor of layer {missing[0]}, config.json says {depth} layers; a file is missing")
    width = _first(configs, ("moe_intermediate_size",))
    found = {shape.d_ff for shape in shapes}
    if isinstance(width, int) and found != {width}:
        raise counted._bad(f"experts are {min(found)} wide, config.json's moe_intermediate_size is {width}")
    top_k = 1 if family == "switch_transformers" else _first(configs, CHOICES)
    if isinstance(top_k, list):
        top_k = sum(top_k) / len(top_k) if top_k else None
    if not isinstance(top_k, (int, float)) or not 1 <= top_k <= counts[layers[0]]:
        raise ValueError(
            f"{name}: config.json's number of experts a token is {top_k!r} ({', '.join(CHOICES)}), expected 1 to "
            f"{counts[layers[0]]}"
        )
    return _facts(headers, counted, configs, family, layers, counts[layers[0]], shapes, float(top_k), total)


def _facts(
    headers: CheckpointHeaders,
    counted: _Counted,
    configs: list[dict[str, Any]],
    family: str,
    layers: tuple[str, ...],
    experts: int,
    shapes: dict[ExpertShape, int],
    top_k: float,
    depth: Any,
) -> ModelFacts:
    other = dict(counted.other)
    scales = [key for key in other if key.endswith(("weight_scale_inv", "weight_scale"))]
    ignored = counted.ignored + sum(other.pop(key).numbers for key in scales)
    tables = [key for key in other if re.search(r"(?:^|\.)(?:embed_tokens|shared|wte|word_embeddings)\.weight$", key)]
    heads = [key for key in other if re.search(r"(?:^|\.)lm_head\.weight$", key)]
    if tables and _first(configs, ("tie_word_embeddings",)) is True:
        for key in heads:  # loaded as the table itself
            ignored += other.pop(key).numbers
        heads = tables
    elif tables and not heads:
        heads = tables  # the checkpoint leaves it out: tied
    dtypes: dict[str, int] = {}
    for tensor in other.values():
        dtypes[tensor.dtype] = dtypes.get(tensor.dtype, 0) + tensor.numbers
    architectures = headers.config.get("architectures") or []
    encoder_only = family == "switch_transformers" and not any(key.startswith("decoder.") for key in headers.tensors)
    rows = {} if encoder_only else _rows(other)
    plain, windowed = _cache(rows, configs)
    named_dtype = _first(configs, ("dtype", "torch_dtype"))
    table_numbers = sum(other[key].numbers for key in tables if key in other)
    tied = [] if _classifier(architectures) else [key for key in heads if key in tables and key in other]
    return ModelFacts(
        family=family,
        layers=layers,
        experts=experts,
        shapes=shapes,
        top_k=top_k,
        vocabulary=int(_first(configs, ("vocab_size",)) or 0),
        checkpoint_bytes=headers.bytes,
        expert_source_bytes=counted.source_bytes,
        other_numbers=sum(dtypes.values()),
        other_dtypes=dtypes,
        # A head that is the table itself is read whole for each token.
        embedding_numbers=0 if heads == tables and not _classifier(architectures) else table_numbers,
        dense=tuple(_dense({key: tensor for key, tensor in other.items() if key not in tables}))
        + tuple((other[key].shape[0], other[key].shape[1]) for key in tied),
        tied_numbers=sum(other[key].numbers for key in tied),
        layer_numbers=sum(
            tensor.numbers for key, tensor in other.items() if LAYER.search(key) and not OTHER_SENSES.search(key)
        ),
        head_numbers=sum(other[key].numbers for key in heads if key in other) if not _classifier(architectures) else 0,
        ignored_numbers=ignored,
        kv_numbers=plain,
        windowed=windowed,
        depth=depth if isinstance(depth, int) else len(layers),
        encoder_only=encoder_only,
        dtype=_dtype(named_dtype, dtypes),
    )


def _dense(tensors: Mapping[str, TensorHeader]) -> Iterator[tuple[int, int]]:
    """Rows and columns of the large matrices that are linears and choose no experts."""
    for key, tensor in tensors.items():
        large = len(tensor.shape) == 2 and tensor.numbers >= LARGE and key.endswith(".weight")
        if large and not TABLES.search(key) and not ROUTER.search(key):
            yield tensor.shape[0], tensor.shape[1]


def _dtype(named: Any, dtypes: dict[str, int]) -> str:
    """What transformers loads everything else in: what the configuration says, or what most of the file is."""
    if named is not None:
        return str(named).removeprefix("torch.")
    known = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
    found = {known[dtype]: count for dtype, count in dtypes.items() if dtype in known}
    return max(found, key=lambda dtype: found[dtype], default="float32")


def _classifier(architectures: list[str]) -> bool:
    """Models whose output is no distribution over the vocabulary: encoders and classifiers."""
    return not any(name.endswith(("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")) for name in architectures)
