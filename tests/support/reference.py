"""Plain PyTorch references in float64, and small random models to compare with."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import SwitchTransformersConfig
from transformers.activations import ACT2FN


def activate(name: str, hidden: Tensor) -> Tensor:
    return ACT2FN[name](hidden)


def unpacked(values: Tensor, scale: Tensor, columns: int) -> Tensor:
    """int4 (float16 scales) or mxfp4 (exponents) weights in float64, as their formats define them."""
    codes = torch.stack([values % 16, values // 16], -1).flatten(-2).long()
    if scale.dtype == torch.float16:
        numbers, factor = torch.where(codes < 8, codes, codes - 16).double(), scale.double()
    else:
        sign, exponent, mantissa = codes // 8, codes // 2 % 4, codes % 2
        magnitude = torch.where(exponent == 0, mantissa / 2, (1 + mantissa / 2) * 2.0 ** (exponent - 1.0))
        numbers, factor = (1 - 2 * sign) * magnitude.double(), 2.0 ** (scale.double() - 127)
        factor[scale == 255] = torch.nan
    return (numbers * factor.repeat_interleave(32, -1))[..., :columns]


# A rounding among fp32's denormals, in terms of the bounds below, of which an error may have 1e-5.
DENORMAL = 1e5 * 2.0**-149


def moe_ffn(
    x: Tensor,
    expert_index: Tensor,
    gate: Tensor,
    wi: Tensor,
    wo: Tensor,
    slot_of_expert: Tensor,
    wi_scale: Tensor | None = None,
    wo_scale: Tensor | None = None,
    activation: str = "relu",
    wi_bias: Tensor | None = None,
    wo_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The layer in float64 over the stored, dequantised weights, and what an error may be measured against:
    ``|gate| * (sum |wo| |h| + |bias|)`` plus the same term carried from wi ([T, d_model], before any constant).
    Each term of a sum may be rounded among the denormals, too."""
    gated = activation.startswith("gated-") or activation == "swiglu_oai"
    function = activation.removeprefix("gated-")
    if wi.dtype == torch.uint8:
        assert wi_scale is not None
        assert wo_scale is not None
        d_ff = wi.shape[1] // (2 if gated else 1)
        wi, wo = unpacked(wi, wi_scale, x.shape[1]), unpacked(wo, wo_scale, d_ff)
        wi_scale = wo_scale = None
    x, wi, wo = x.double(), wi.double(), wo.double()
    if wi_scale is not None and wo_scale is not None:
        wi, wo = wi * wi_scale.double()[:, :, None], wo * wo_scale.double()[:, :, None]
    out = torch.zeros(x.shape, dtype=torch.float64)
    bound = torch.zeros(x.shape, dtype=torch.float64)
    for token in range(x.shape[0]):
        for choice in range(expert_index.shape[1]):
            expert = int(expert_index[token, choice])
            if expert < 0:
                continue
            slot = int(slot_of_expert[expert])
            if slot < 0:
                continue
            rows = wi[slot] @ x[token]
            spread = wi[slot].abs() @ x[token].abs() + DENORMAL * (x.shape[1] + 1)
            if wi_bias is not None:
                rows, spread = rows + wi_bias[slot].double(), spread + wi_bias[slot].double().abs()
            half = rows.shape[0] // 2
            if activation == "swiglu_oai":
                gate_half, up = rows[:half].clamp(max=7.0), rows[half:].clamp(-7.0, 7.0) + 1.0
                act = gate_half * torch.sigmoid(1.702 * gate_half)
                hidden = up * act
                carried = spread[:half] * up.abs() * 1.2 + act.abs() * (spread[half:] + 1.0)
            elif gated:
                act = activate(function, rows[:half])
                hidden = act * rows[half:]
                carried = spread[:half] * rows[half:].abs() * 1.2 + act.abs() * spread[half:]
            else:
                hidden = activate(function, rows)
                carried = spread * 1.2  # no activation here has a slope above 1.2
            weight = float(gate[token, choice])
            last = torch.zeros(1) if wo_bias is None else wo_bias[slot].double()
            out[token] += weight * (wo[slot] @ hidden + last)
            total = wo[slot].abs() @ (hidden.abs() + carried) + last.abs() + DENORMAL * (hidden.shape[0] + 1)
            bound[token] += abs(weight) * total
    return out, bound


def assert_within(actual: Tensor, expected: Tensor, bound: Tensor) -> None:
    """|error| <= 1e-5 * bound + half a unit in the last place of the result's dtype."""
    info = torch.finfo(actual.dtype)
    ulp = torch.clamp(expected.abs(), min=info.tiny) * info.eps  # at least the spacing of the values around
    allowed = 1e-5 * bound + 0.5 * ulp + info.smallest_normal * info.eps
    error = (actual.double() - expected).abs()
    worst = (error - allowed).max().item() if error.numel() else 0.0
    assert worst <= 0, f"largest error beyond the bound: {worst:g}; largest error {error.max().item():g}"


def fast_error(weights: Tensor, values: Tensor, off: Tensor, stored: torch.dtype | str) -> Tensor:
    """How far ``set_precision``'s docstring lets ``weights @ values`` be from exact under ``"fast"``.

    Args:
        weights: float64 ``[rows, columns]``, scales included.
        values: float64 ``[columns]``, true values of the activations.
        off: float64 ``[columns]``, how far the activations that are multiplied may be from ``values`` already.
        stored: the dtype or the format of the weights.
    """
    columns = values.shape[0]
    size = values.abs() + off
    if stored == torch.bfloat16:
        rounding, sums, lost = 2**-8 * size, columns + 2, 2.0**-126 * (weights.abs().sum(1) + size.sum() + 4 * columns)
    elif stored in ("int8", torch.int8, "int4", "mxfp4"):
        groups = -(-columns // 32)
        padded = torch.nn.functional.pad(size, (0, groups * 32 - columns)).view(groups, 32)
        largest = padded.amax(1).repeat_interleave(32)[:columns]
        rounding, sums = largest / 254 * (1 + 2**-14), groups + 4
        lost = 2.0**-119 * weights.abs().sum(1) + 2.0**-133 * groups
    else:
        raise ValueError(f"stored is {stored!r}, whose activations are not rounded")
    return weights.abs() @ (off + rounding + sums * 2.0**-24 * (size + rounding)) + lost


def small_config(**changes: object) -> SwitchTransformersConfig:
    """A Switch configuration that runs in milliseconds."""
    fields: dict = {
        "vocab_size": 97,
        "d_model": 24,
        "d_kv": 6,
        "d_ff": 40,
        "num_heads": 4,
        "num_layers": 4,
        "num_decoder_layers": 4,
        "num_sparse_encoder_layers": 2,
        "num_sparse_decoder_layers": 2,
        "num_experts": 8,
        "expert_capacity": 64,
        "decoder_start_token_id": 0,
        "dropout_rate": 0.1,
        "initializer_factor": 1.0,
    }
    return SwitchTransformersConfig(**{**fields, **changes})


def build(model_class: type, config: SwitchTransformersConfig, seed: int = 0) -> torch.nn.Module:
    """A randomly initialised transformers model in evaluation mode, with routers that really spread the tokens."""
    torch.manual_seed(seed)
    model = model_class(config).eval()
    return model
