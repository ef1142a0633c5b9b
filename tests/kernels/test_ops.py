"""torch.ops.sida: values against float64, bad input, opcheck and torch.compile."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GptOssConfig, SwitchTransformersConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersTop1Router

from sida_ext import _C, ops
from sida_ext.experts.quantise import Quantised, quantise
from tests.support.reference import assert_within
from tests.support.reference import moe_ffn as reference_moe_ffn

X_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
W_DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8, "int4", "mxfp4"]
ACTIVATIONS = ["relu", "gelu", "gelu_new", "silu"]


def layer(
    tokens=5,
    experts=4,
    d_model=24,
    d_ff=40,
    top_k=1,
    x_dtype=torch.float32,
    w_dtype=torch.float32,
    gated=False,
    seed=0,
    slots=None,
):
    """Arguments of moe_ffn by name; experts sit in shuffled slots."""
    random = torch.Generator().manual_seed(seed)
    slots = experts if slots is None else slots
    x = torch.randn(tokens, d_model, generator=random).to(x_dtype)
    wi = torch.randn(slots, d_ff * (2 if gated else 1), d_model, generator=random) / d_model**0.5
    wo = torch.randn(slots, d_model, d_ff, generator=random) / d_ff**0.5
    arguments = {
        "x": x,
        "expert_index": torch.randint(-1, experts, (tokens, top_k), generator=random),
        "gate": torch.rand(tokens, top_k, generator=random),
        "slot_of_expert": torch.randperm(slots, generator=random)[:experts].int(),
    }
    if w_dtype == torch.int8 or isinstance(w_dtype, str):
        for name, weight in (("wi", wi), ("wo", wo)):
            quantised = quantise(weight, w_dtype if isinstance(w_dtype, str) else "int8")
            arguments[name], arguments[f"{name}_scale"] = quantised.values, quantised.scale
    else:
        arguments |= {"wi": wi.to(w_dtype), "wo": wo.to(w_dtype)}
    return arguments


def check(arguments, activation="relu"):
    expected, bound = reference_moe_ffn(**arguments, activation=activation)
    actual = ops.moe_ffn(**arguments, activation=activation)
    assert actual.dtype == arguments["x"].dtype
    assert_within(actual, expected, bound)
    return actual


@pytest.mark.parametrize("x_dtype", X_DTYPES, ids=str)
@pytest.mark.parametrize("w_dtype", W_DTYPES, ids=str)
@pytest.mark.parametrize("top_k", [1, 2])
def test_every_dtype(x_dtype, w_dtype, top_k):
    check(layer(tokens=13, top_k=top_k, x_dtype=x_dtype, w_dtype=w_dtype))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("w_dtype", [torch.float32, torch.int8, "int4", "mxfp4"], ids=str)
def test_every_activation(activation, gated, w_dtype):
    check(layer(tokens=9, gated=gated, w_dtype=w_dtype), ("gated-" if gated else "") + activation)


@pytest.mark.parametrize("w_dtype", ["int4", "mxfp4"])
def test_4_bit_slots_may_be_strided_as_in_a_record(w_dtype):
    arguments = layer(tokens=11, w_dtype=w_dtype, gated=True)
    expected = ops.moe_ffn(**arguments, activation="gated-silu")
    for name in ("wi", "wo", "wi_scale", "wo_scale"):
        tensor = arguments[name]
        wide = torch.full((tensor.shape[0], tensor[0].numel() + 96), 77, dtype=tensor.dtype)
        wide[:, : tensor[0].numel()] = tensor.flatten(1)
        arguments[name] = wide[:, : tensor[0].numel()].unflatten(1, tensor.shape[1:])
        assert not arguments[name].is_contiguous()
    assert torch.equal(ops.moe_ffn(**arguments, activation="gated-silu"), expected)


def test_4_bit_padding_is_never_used():
    arguments = layer(tokens=5, d_model=24, d_ff=40, w_dtype="int4")
    expected = ops.moe_ffn(**arguments)
    arguments["wi"][..., 12:] = 0x79
    arguments["wo"][..., 20:] = 0x97
    assert torch.equal(ops.moe_ffn(**arguments), expected)


@pytest.mark.skipif(_C.instruction_set() == "amx", reason="bfloat16 in tiles has an order of its own")
@pytest.mark.parametrize("tokens", [1, 3, 70])
def test_4_bit_weights_give_the_bits_of_bfloat16_ones(tokens):
    """mxfp4 weights are bfloat16 numbers, and both unfold in one order: there is one result for them."""
    arguments = layer(tokens=tokens, d_model=96, d_ff=160, w_dtype="mxfp4")
    wi, wo = (Quantised(arguments[n], arguments[f"{n}_scale"], c).dequantise() for n, c in (("wi", 96), ("wo", 160)))
    plain = {n: a for n, a in arguments.items() if not n.endswith("_scale")} | {
        "wi": wi.bfloat16(),
        "wo": wo.bfloat16(),
    }
    assert torch.equal(plain["wi"].float(), wi)
    assert torch.equal(ops.moe_ffn(**arguments), ops.moe_ffn(**plain))


def with_biases(arguments, seed=0):
    random = torch.Generator().manual_seed(seed)
    for name in ("wi", "wo"):
        arguments[f"{name}_bias"] = torch.randn(arguments[name].shape[:2], generator=random)
    return arguments


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("activation", ["relu", "silu", "gated-silu", "gated-gelu", "swiglu_oai"])
@pytest.mark.parametrize("w_dtype", W_DTYPES, ids=str)
def test_biases(w_dtype, activation, top_k):
    gated = activation.startswith("gated-") or activation == "swiglu_oai"
    arguments = with_biases(layer(tokens=9, top_k=top_k, gated=gated, w_dtype=w_dtype))
    without = check({name: a for name, a in arguments.items() if not name.endswith("_bias")}, activation)
    assert not torch.equal(check(arguments, activation), without)
    for missing in ("wi_bias", "wo_bias"):
        check({name: a for name, a in arguments.items() if name != missing}, activation)


def test_biases_may_be_strided_as_in_a_record():
    arguments = with_biases(layer(tokens=11))
    expected = ops.moe_ffn(**arguments)
    for name, wide in (("wi_bias", torch.randn(4, 100)), ("wo_bias", torch.randn(4, 71))):
        columns = arguments[name].shape[1]
        wide[:, 5 : 5 + columns] = arguments[name]
        arguments[name] = wide[:, 5 : 5 + columns]
    assert torch.equal(ops.moe_ffn(**arguments), expected)


@pytest.mark.parametrize("x_dtype", X_DTYPES, ids=str)
def test_swiglu_oai_is_transformers(x_dtype):
    """GptOssExperts, whose gate and up rows alternate, with values far beyond its clamps."""
    config = GptOssConfig(hidden_size=32, intermediate_size=48, num_local_experts=4, num_experts_per_tok=2)
    torch.manual_seed(0)
    experts = GptOssExperts(config).eval()
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=1.0)
    x = torch.randn(13, 32).to(x_dtype)
    index, gate = torch.randint(0, 4, (13, 2)), torch.rand(13, 2)
    with torch.no_grad():
        expected = experts.double()(x.double(), index, gate.double())
    gate_up, bias = experts.gate_up_proj.detach().float(), experts.gate_up_proj_bias.detach().float()
    actual = ops.moe_ffn(
        x,
        index,
        gate,
        torch.cat([gate_up[..., ::2], gate_up[..., 1::2]], -1).transpose(1, 2).contiguous(),
        experts.down_proj.detach().float().transpose(1, 2).contiguous(),
        torch.arange(4, dtype=torch.int32),
        activation="swiglu_oai",
        wi_bias=torch.cat([bias[..., ::2], bias[..., 1::2]], -1),
        wo_bias=experts.down_proj_bias.detach().float(),
    )
    assert expected.abs().max() > 50
    rtol = 3e-5 if x_dtype == torch.float32 else 2 * torch.finfo(x_dtype).eps
    torch.testing.assert_close(actual.double(), expected, rtol=rtol, atol=1e-3)


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 70),
    experts=st.integers(1, 9),
    d_model=st.integers(1, 80),
    d_ff=st.integers(1, 130),
    top_k=st.integers(1, 3),
    x_dtype=st.sampled_from(X_DTYPES),
    w_dtype=st.sampled_from(W_DTYPES),
    seed=st.integers(0, 2**16),
)
def test_any_shape(tokens, experts, d_model, d_ff, top_k, x_dtype, w_dtype, seed):
    check(layer(tokens, experts, d_model, d_ff, top_k, x_dtype, w_dtype, seed=seed))


def test_no_tokens():
    assert ops.moe_ffn(**layer(tokens=0)).shape == (0, 24)


def test_no_expert_contributes_zero():
    arguments = layer(tokens=4)
    arguments["expert_index"][:] = -1
    assert torch.equal(ops.moe_ffn(**arguments), torch.zeros(4, 24))


def test_slots_may_be_strided_and_lie_apart():
    arguments = layer(tokens=11)
    dense = ops.moe_ffn(**arguments)
    slots, d_ff, d_model = arguments["wi"].shape
    memory = torch.full((slots, d_ff * d_model * 2 + 64), float("nan"))
    memory[:, : d_ff * d_model] = arguments["wi"].reshape(slots, -1)
    memory[:, d_ff * d_model : 2 * d_ff * d_model] = arguments["wo"].reshape(slots, -1)
    arguments["wi"] = memory[:, : d_ff * d_model].view(slots, d_ff, d_model)
    arguments["wo"] = memory[:, d_ff * d_model : 2 * d_ff * d_model].view(slots, d_model, d_ff)
    assert torch.equal(ops.moe_ffn(**arguments), dense)


def test_strided_tokens_and_rows():
    arguments = layer(tokens=7)
    wide = torch.randn(7, 60)
    wide[:, 10:34] = arguments["x"]
    padded = torch.randn(4, 40, 31)
    padded[:, :, :24] = arguments["wi"]
    expected = ops.moe_ffn(**arguments)
    arguments |= {"x": wide[:, 10:34], "wi": padded[:, :, :24]}
    assert torch.equal(ops.moe_ffn(**arguments), expected)


@pytest.mark.parametrize("top_k", [1, 2])
def test_waves_add_up_to_the_layer(top_k):
    arguments = layer(tokens=17, top_k=top_k)
    whole = ops.moe_ffn(**arguments)
    total = torch.zeros_like(whole)
    for expert in range(4):
        wave = arguments["slot_of_expert"].clone()
        wave[torch.arange(4) != expert] = -1
        total += ops.moe_ffn(**{**arguments, "slot_of_expert": wave}, missing="skip")
    torch.testing.assert_close(total, whole, rtol=1e-5, atol=1e-6)
    if top_k == 1:
        assert torch.equal(total, whole)


def test_missing_expert_is_named():
    arguments = layer(tokens=6)
    arguments["expert_index"][:] = 2
    arguments["slot_of_expert"][2] = -1
    with pytest.raises(ValueError, match=r"expert 2.*not resident"):
        ops.moe_ffn(**arguments)
    assert torch.equal(ops.moe_ffn(**arguments, missing="skip"), torch.zeros(6, 24))


def replaced(**changes):
    return {**layer(tokens=6), **changes}


BAD = [
    (replaced(x=torch.zeros(6, 24, dtype=torch.float64)), TypeError, r"x has dtype Double.*float32"),
    (replaced(x=torch.zeros(24)), ValueError, r"x has shape \[24\], expected 2 dimensions"),
    (replaced(x=torch.zeros(6, 23)), ValueError, r"wi has shape .* expected 23 \(d_model"),
    (replaced(x=torch.zeros(24, 6).t()), ValueError, r"rows of x are not contiguous"),
    (replaced(expert_index=torch.zeros(6, 1)), TypeError, r"expert_index has dtype Float.*integer"),
    (replaced(expert_index=torch.zeros(5, 1, dtype=torch.int64)), ValueError, r"expert_index.*expected 6 \(tokens"),
    (replaced(expert_index=torch.zeros(6, 0, dtype=torch.int64)), ValueError, r"top_k of at least 1"),
    (replaced(expert_index=torch.full((6, 1), 4)), IndexError, r"expert_index holds 4 .* from -1 to 3"),
    (replaced(expert_index=torch.full((6, 1), -2)), IndexError, r"expert_index holds -2"),
    (replaced(expert_index=torch.full((6, 1), 2**40)), IndexError, r"expert_index holds 1099511627776"),
    (replaced(gate=torch.ones(6, 1, dtype=torch.bfloat16)), TypeError, r"gate has dtype BFloat16, expected float32"),
    (replaced(gate=torch.ones(6, 2)), ValueError, r"gate has shape \[6, 2\], expected \[6, 1\]"),
    (replaced(wo=torch.zeros(4, 24, 40, dtype=torch.bfloat16)), TypeError, r"wo has dtype BFloat16, expected Float"),
    (replaced(wi=torch.zeros(4, 39, 24)), ValueError, r"wi has shape .* expected 40 \(d_ff"),
    (replaced(wo=torch.zeros(3, 24, 40)), ValueError, r"wo has shape .* expected 4 \(slots"),
    (replaced(wi=torch.zeros(4, 24, 40).transpose(1, 2)), ValueError, r"rows of wi are not contiguous"),
    (replaced(wi=torch.zeros(4, 40, 24, device="meta")), ValueError, r"wi is on meta, expected cpu"),
    (replaced(slot_of_expert=torch.zeros(4, dtype=torch.int64)), TypeError, r"slot_of_expert has dtype Long.*int32"),
    (replaced(slot_of_expert=torch.full((4,), 4, dtype=torch.int32)), IndexError, r"slot_of_expert holds 4"),
    (replaced(activation="softmax"), ValueError, r"activation is 'softmax', expected one of"),
    (replaced(activation="gated-relu"), ValueError, r"expected 80 \(2 \* d_ff"),
    (replaced(missing="ignore"), ValueError, r"missing is 'ignore'"),
    (replaced(wi_scale=torch.ones(4, 40)), ValueError, r"wi_scale was given, but wi has dtype Float"),
    (replaced(activation="gated-swiglu_oai"), ValueError, r"activation is 'gated-swiglu_oai', expected one of"),
    (replaced(activation="swiglu_oai"), ValueError, r"expected 80 \(2 \* d_ff"),
    (replaced(wi_bias=torch.zeros(4, 40).double()), TypeError, r"wi_bias has dtype Double, expected float32"),
    (replaced(wo_bias=torch.zeros(24)), ValueError, r"wo_bias has shape \[24\], expected \[4, 24\]"),
    (replaced(wo_bias=torch.zeros(24, 4).t()), ValueError, r"rows of wo_bias are not contiguous"),
    ({**layer(tokens=6, w_dtype=torch.int8), "wi_scale": None}, ValueError, r"needs wi_scale"),
    ({**layer(tokens=6, w_dtype=torch.int8), "wo_scale": torch.ones(4, 23)}, ValueError, r"wo_scale has shape"),
    ({**layer(tokens=6, w_dtype="int4"), "wi_scale": None}, ValueError, r"wi has dtype uint8.*needs wi_scale: float16"),
    ({**layer(tokens=6, w_dtype="int4"), "wi_scale": torch.ones(4, 40, 1)}, TypeError, r"wi_scale has dtype Float"),
    (
        {**layer(tokens=6, w_dtype="int4"), "wo_scale": torch.ones(4, 24, 1).half()},
        ValueError,
        r"expected \[4, 24, 2\]",
    ),
    ({**layer(tokens=6, w_dtype="mxfp4"), "wo_scale": torch.ones(4, 24, 2).half()}, TypeError, r"wo is int4 .* mxfp4"),
    ({**layer(tokens=6, w_dtype="int4"), "x": torch.zeros(6, 33)}, ValueError, r"wi .* expected 32 \(16 for each 32"),
    ({**layer(tokens=6, w_dtype="int4"), "wo": torch.zeros(4, 24, 16).byte()}, ValueError, r"wo .*32 rows of wi"),
    (
        {**layer(tokens=6, w_dtype="int4"), "wo_scale": torch.ones(4, 2, 24).half().transpose(1, 2)},
        ValueError,
        r"rows of wo_scale are not contiguous",
    ),
    (
        {**layer(tokens=6, w_dtype=torch.int8), "wo_scale": torch.ones(4, 24, dtype=torch.float64)},
        TypeError,
        r"wo_scale has dtype Double",
    ),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD, ids=range(len(BAD)))
def test_bad_input_is_named(arguments, error, message):
    if arguments["wi"].device.type == "meta":
        # Straight to the CPU kernel: the dispatcher would send a meta argument to the fake implementation.
        call = torch.ops.sida.moe_ffn.default.redispatch
        with pytest.raises(error, match=message):
            call(
                torch._C.DispatchKeySet(torch._C.DispatchKey.CPU),
                *(arguments[name] for name in ("x", "expert_index", "gate", "wi", "wo", "slot_of_expert")),
            )
        return
    with pytest.raises(error, match=message):
        ops.moe_ffn(**arguments)


@pytest.mark.parametrize("dtype", X_DTYPES, ids=str)
@pytest.mark.parametrize("capacity", [1, 3, 64])
def test_route_top1_is_transformers_router(dtype, capacity):
    config = SwitchTransformersConfig(d_model=16, num_experts=6, expert_capacity=capacity)
    torch.manual_seed(0)
    router = SwitchTransformersTop1Router(config).eval()
    hidden = torch.randn(3, 20, 16).to(dtype)
    mask, probs, logits = router(hidden)
    expert_index, gate = ops.route_top1(logits, capacity, probs_dtype=dtype)
    kept = mask.sum(-1) > 0
    assert torch.equal(expert_index, torch.where(kept, mask.argmax(-1), -1).int())
    assert torch.equal(gate, probs.squeeze(-1).float())
    assert capacity > 20 or not bool(kept.all())


def test_route_top1_breaks_rounded_ties_like_transformers():
    logits = torch.tensor([[[1.0, 1.0005, 0.0]]])
    assert ops.route_top1(logits, 64)[0].item() == 1
    assert ops.route_top1(logits, 64, probs_dtype=torch.bfloat16)[0].item() == 0


def test_route_top1_refuses_bad_input():
    with pytest.raises(ValueError, match="3 dimensions"):
        ops.route_top1(torch.zeros(3, 4), 64)
    with pytest.raises(ValueError, match="capacity is -1"):
        ops.route_top1(torch.zeros(1, 3, 4), -1)
    with pytest.raises(TypeError, match="probs_dtype is Double"):
        ops.route_top1(torch.zeros(1, 3, 4), 1, probs_dtype=torch.float64)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("w_dtype", [torch.float32, torch.int8, "int4", "mxfp4"], ids=str)
def test_opcheck_moe_ffn(w_dtype, biased):
    arguments = layer(tokens=6, w_dtype=w_dtype)
    if biased:
        arguments = with_biases(arguments)
    names = ("x", "expert_index", "gate", "wi", "wo", "slot_of_expert")
    extra = [arguments.get("wi_scale"), arguments.get("wo_scale"), "relu"]
    keywords = {name: arguments.get(name) for name in ("wi_bias", "wo_bias")} | {"missing": "error"}
    torch.library.opcheck(torch.ops.sida.moe_ffn.default, [arguments[n] for n in names] + extra, keywords)


def test_opcheck_route_top1():
    torch.library.opcheck(torch.ops.sida.route_top1.default, (torch.randn(2, 5, 4), 2), {"probs_dtype": None})


def test_compiles_without_a_graph_break():
    arguments = layer(tokens=6)

    class Layer(torch.nn.Module):
        def forward(self, x, logits):
            expert_index, gate = ops.route_top1(logits, 3)
            out = ops.moe_ffn(
                x,
                expert_index.reshape(-1, 1),
                gate.reshape(-1, 1),
                arguments["wi"],
                arguments["wo"],
                arguments["slot_of_expert"],
            )
            return torch.nn.functional.layer_norm(out + x, (24,))

    x, logits = torch.randn(6, 24), torch.randn(2, 3, 4)
    model = Layer()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, logits), model(x, logits))


def test_backward_raises():
    arguments = layer(tokens=6)
    arguments["x"].requires_grad_(True)
    out = ops.moe_ffn(**arguments)
    with pytest.raises(NotImplementedError, match="moe_ffn has no backward"):
        out.sum().backward()


def test_nan_and_infinity_go_where_they_go_in_the_reference():
    arguments = layer(tokens=8)
    arguments["expert_index"] = torch.arange(8).remainder(4).reshape(8, 1)
    arguments["x"][2, 3] = float("nan")
    arguments["x"][5, 0] = float("inf")
    actual = ops.moe_ffn(**arguments)
    expected, _ = reference_moe_ffn(**arguments)
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.isinf(), expected.isinf())
