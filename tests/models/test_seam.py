"""Models of the experts seam, swapped, against transformers' own: logits, generation, budgets, and what must refuse."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import sida_ext
from sida_ext import _C
from sida_ext.experts.quantise import Quantised
from sida_ext.models.layers import swapped_layers
from tests.support.families import here, tiny_model
from tests.support.reference import assert_within

# One of each layout and gate: one matrix for each expert, fused, transposed, interleaved, biases, without a gate, a
# norm behind the experts, a clamped gate, a shared expert, routing weights in float32, a skipped token.
FAMILIES = [
    "olmoe",
    "mixtral",
    "gpt_oss",
    "nemotron_h",
    "aria_text",
    "granitemoe",
    "deepseek_v3",
    "muse_spark",
    "glm5_next",
    "zaya",
]


def tokens(vocab: int, batch: int = 2, length: int = 9, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def reference():
    """transformers' own model of a family, eager experts in fp32, and its logits; made once."""
    made = {}

    def get(family):
        if family not in made:
            model = tiny_model(family)[1].float().eval()
            model.set_experts_implementation("eager")
            ids = tokens(model.config.get_text_config().vocab_size)
            with torch.no_grad():
                made[family] = model, ids, model(input_ids=ids).logits
        return made[family]

    return get


def swapped(model, **options):
    return sida_ext.swap_experts(copy.deepcopy(model), **{"expert_dtype": "float32", **options})


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_eager_experts(reference, family):
    model, ids, expected = reference(family)
    served = swapped(model, expert_memory="25%")
    with served.sida as runtime, torch.no_grad():
        found = served(input_ids=ids).logits
        assert (found - expected).abs().max() < 1e-4
        assert runtime.stats().loads > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_bits_do_not_depend_on_the_budget(reference, family):
    """From one expert, which makes every layer run in waves, to all of them; four evictions, one lane and three."""
    model, ids, _ = reference(family)
    results = []
    for number, budget in enumerate((1, "40%", "100%")):
        served = swapped(
            model, expert_memory="100%", eviction=("fifo", "lru", "next_use")[number], lanes=1 + 2 * (number % 2)
        )
        with served.sida as runtime, torch.no_grad():
            runtime.set_budget(runtime.header.record_bytes if budget == 1 else budget)
            results.append(served(input_ids=ids).logits)
    assert all(torch.equal(result, results[0]) for result in results)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    family=st.sampled_from(here(FAMILIES)),
    dtype=st.sampled_from(["float32", "bfloat16", "float16", "int8", "int4", "mxfp4"]),
    slots=st.integers(1, 12),
    eviction=st.sampled_from(["next_use", "lru", "lfu", "fifo"]),
    delay=st.integers(0, 300),
    rows=st.integers(1, 6),
    seed=st.integers(0, 2**16),
)
def test_a_layer_is_within_the_bound_of_float64_whatever_the_timing(
    reference, family, dtype, slots, eviction, delay, rows, seed
):
    """Random rows and choices, -1 and too large ones among them, through one layer: float64 over the stored weights."""
    model, _, _ = reference(family)
    faults = _C.Faults(seed=seed, delay_us_max=delay)
    served = swapped(model, expert_dtype=dtype, expert_memory="100%", eviction=eviction, faults=faults)
    with served.sida as runtime, torch.no_grad():
        runtime.set_budget(slots * runtime.header.record_bytes)
        layer = swapped_layers(served)[-1]
        random = torch.Generator().manual_seed(seed)
        x = torch.randn(rows, layer.shape.d_model, generator=random)
        index = torch.randint(-1, layer.num_experts + 1, (rows, 3), generator=random)
        weights = torch.rand(rows, 3, generator=random)
        found = layer(x, index, weights)
        expected, bound = float64_layer(runtime, layer, x, index, weights)
        assert_within(found, expected, bound)
        # A token's bits are its own: alone it gets the same.
        for row in range(rows):
            alone = slice(row, row + 1)
            assert torch.equal(layer(x[alone], index[alone], weights[alone]), found[alone])


def float64_layer(runtime, layer, x, index, weights):
    """The layer in float64 by the module's own function over what the store holds, and the error's measure."""
    out = torch.zeros(x.shape[0], layer.shape.d_model, dtype=torch.float64)
    bound = torch.zeros_like(out)
    own = copy.copy(layer)
    for expert, stored in runtime.borrow(layer.name, [int(e) for e in index.unique() if 0 <= e < layer.num_experts]):
        wi, wo = (w.dequantise().double() if isinstance(w, Quantised) else w.double() for w in (stored.wi, stored.wo))
        for row, choice in (index == expert).nonzero().tolist():
            up, spread = wi @ x[row].double(), wi.abs() @ x[row].double().abs()
            last = torch.zeros(1).double()
            if stored.wi_bias is not None:
                up, spread = up + stored.wi_bias.double(), spread + stored.wi_bias.double().abs()
                last = stored.wo_bias.double()
            middle = gate(own, up)
            # What an error of the hidden rows, of the size of `spread`, does behind the gate: measured, not guessed.
            nudged = torch.stack([gate(own, up + sign * 1e-3 * spread) for sign in (-1, 1)])
            carried = (nudged - middle).abs().amax(0) * 1e3
            result = wo @ middle + last
            size = wo.abs() @ (middle.abs() + carried) + last.abs()
            if getattr(layer, "has_post_expert_norm", False):
                normed = layer.post_expert_norm(result.float()).double()
                size = size * (normed.abs().amax() / result.abs().amax().clamp(min=1e-9)) * 4
                result = normed
            weight = float(weights[row, choice])
            out[row] += weight * result
            bound[row] += abs(weight) * size
    return out, bound


def gate(layer, up):
    if not layer.has_gate:
        return layer.act_fn(up)
    if not layer.is_concatenated:
        up = torch.stack(up.chunk(2), dim=-1).flatten()
    return layer._apply_gate(up.unsqueeze(0))[0]


def test_no_expert_is_loaded_for_a_choice_of_none(reference):
    model, _, _ = reference("olmoe")
    served = swapped(model, expert_memory="100%")
    with served.sida as runtime, torch.no_grad():
        layer = swapped_layers(served)[0]
        x = torch.randn(4, layer.shape.d_model)
        index = torch.tensor([[-1, layer.num_experts], [-7, 2**40], [3, 3], [5, 1]])
        weights = torch.tensor([[0.5, 0.5], [1.0, 1.0], [0.0, 0.0], [0.0, 1.0]])
        runtime.reset_stats()
        out = layer(x, index, weights)
        assert torch.equal(out[:3], torch.zeros_like(out[:3]))
        assert out[3].abs().sum() > 0
        assert runtime.stats().unique == 1  # expert 1 alone


@pytest.mark.parametrize("family", ["olmoe", "muse_spark", "glm5_next"])
def test_no_tokens(reference, family):
    """By the kernel and by the module's own function."""
    served = swapped(reference(family)[0], expert_memory="100%")
    with served.sida, torch.no_grad():
        layer = swapped_layers(served)[0]
        none = torch.zeros(0, 2, dtype=torch.int64)
        assert layer(torch.zeros(0, layer.shape.d_model), none, none.float()).shape == (0, layer.shape.d_model)


def test_an_expert_twice_in_a_row_counts_twice(reference):
    model, _, _ = reference("mixtral")
    served = swapped(model, expert_memory="100%")
    with served.sida, torch.no_grad():
        layer = swapped_layers(served)[0]
        x = torch.randn(2, layer.shape.d_model)
        twice = layer(x, torch.tensor([[2, 2], [4, 4]]), torch.full((2, 2), 0.25))
        once = layer(x, torch.tensor([[2], [4]]), torch.full((2, 1), 0.5))
        torch.testing.assert_close(twice, once, rtol=1e-5, atol=1e-6)


GENERATION = {
    "greedy": {},
    "sampled": {"do_sample": True, "top_k": 20},
    "beams": {"num_beams": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "static cache": {"cache_implementation": "static"},
    "without a cache": {"use_cache": False},
}


def margin_of_decisions(output) -> float:
    """Smallest difference between the two largest scores over all steps."""
    return min(float((s.topk(2).values[..., 0] - s.topk(2).values[..., 1]).min()) for s in output.scores)


@pytest.mark.parametrize("way", GENERATION)
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_generate_gives_the_same_tokens(reference, family, way):
    model, ids, _ = reference(family)
    arguments = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **GENERATION[way]}
    ids = ids[:1] if way == "prompt lookup" else ids
    served = swapped(model, expert_memory="25%")
    with served.sida, torch.no_grad():
        torch.manual_seed(3)
        expected = model.generate(ids, **arguments)
        torch.manual_seed(3)
        assert torch.equal(served.generate(ids, **arguments), expected)


def test_assisted_generation_and_left_padding(reference):
    model, ids, _ = reference("olmoe")
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    arguments = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    served = swapped(model, expert_memory="25%")
    with served.sida, torch.no_grad():
        expected = model.generate(ids, attention_mask=mask, **arguments)
        assert torch.equal(served.generate(ids, attention_mask=mask, **arguments), expected)
        expected = model.generate(ids[:1], assistant_model=model, **arguments)
        assert torch.equal(served.generate(ids[:1], assistant_model=model, **arguments), expected)


def test_router_logits_and_hidden_states_are_given_as_ever(reference):
    model, ids, _ = reference("mixtral")
    served = swapped(model, expert_memory="50%")
    with served.sida, torch.no_grad():
        found = served(input_ids=ids, output_router_logits=True, output_hidden_states=True)
        expected = model(input_ids=ids, output_router_logits=True, output_hidden_states=True)
        assert len(found.router_logits) == len(expected.router_logits) > 0
        for ours, theirs in zip(found.router_logits, expected.router_logits, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        assert len(found.hidden_states) == len(expected.hidden_states)


def test_a_compiled_model_gives_the_same(reference):
    model, ids, expected = reference("olmoe")
    served = swapped(model, expert_memory="50%")
    with served.sida, torch.no_grad():
        compiled = torch.compile(served, fullgraph=True, backend="eager")
        assert (compiled(input_ids=ids).logits - expected).abs().max() < 1e-4


def test_what_cannot_be_is_refused(reference):
    model, _, _ = reference("olmoe")
    served = swapped(model)
    with served.sida:
        for call, error, text in (
            (lambda: served.state_dict(), RuntimeError, "would lack them"),
            (lambda: served.train(), RuntimeError, "cannot be trained|are frozen"),
            (lambda: served.model.layers[0].mlp.train(), RuntimeError, "are frozen"),
            (lambda: served.to("meta"), RuntimeError, "cannot move to meta"),
            (lambda: pickle.dumps(served), TypeError, "cannot be pickled"),
            (lambda: sida_ext.swap_experts(served), ValueError, "swapped already"),
        ):
            with pytest.raises(error, match=text):
                call()
        assert not served.training
        assert all(not parameter.requires_grad for parameter in served.parameters())
        assert not any("gate_up_proj" in name for name, _ in served.named_parameters())


def test_predicted_routing_is_for_switch(reference):
    model, _, _ = reference("olmoe")
    before = sum(parameter.numel() for parameter in model.parameters())
    with pytest.raises(ValueError, match=r"routing is 'predicted', expected 'router' for OlmoeForCausalLM"):
        sida_ext.swap_experts(model, routing="predicted")
    assert sum(parameter.numel() for parameter in model.parameters()) == before


def test_a_model_without_such_experts_is_named():
    from transformers import GPT2Config, GPT2LMHeadModel, NllbMoeConfig, NllbMoeForConditionalGeneration

    with pytest.raises(ValueError, match=r"GPT2LMHeadModel \(model_type gpt2\) has no experts modules"):
        sida_ext.swap_experts(GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=10)))
    config = NllbMoeConfig(
        vocab_size=20,
        d_model=8,
        encoder_layers=2,
        decoder_layers=2,
        encoder_ffn_dim=8,
        decoder_ffn_dim=8,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        num_experts=4,
        encoder_sparse_step=1,
        decoder_sparse_step=1,
    )
    with pytest.raises(ValueError, match=r"nllb-moe\) cannot be served: .*runs only two of its experts"):
        sida_ext.swap_experts(NllbMoeForConditionalGeneration(config))


def test_copies_share_the_experts_and_a_dropped_model_gives_its_memory_back(reference):
    model, ids, expected = reference("olmoe")
    served = swapped(model, expert_memory="50%")
    twin = copy.deepcopy(served)
    assert twin.sida is served.sida
    with torch.no_grad():
        assert (twin(input_ids=ids).logits - expected).abs().max() < 1e-4
    del twin
    runtime = weakref.ref(served.sida)
    gc.disable()  # at once: not when the cycle collector comes by
    try:
        del served
        assert runtime() is None
    finally:
        gc.enable()


def test_a_kernel_that_differs_from_the_module_is_an_error(reference, monkeypatch):
    """Were a formula wrongly taken for the module's, loading would say so."""
    model, _, _ = reference("olmoe")
    monkeypatch.setattr("sida_ext.models.seam.gate_formula", lambda module, d_ff: "gated-gelu")
    with pytest.raises(RuntimeError, match="another result than the module's own function"):
        swapped(model)


def test_experts_of_another_gate_run_through_the_modules_own_function(reference):
    model, ids, _ = reference("olmoe")
    model = copy.deepcopy(model)
    for layer in model.model.layers:
        layer.mlp.experts.act_fn = nn.Mish()
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        served = swapped(model, expert_memory="25%")
        with served.sida:
            assert all(layer.formula is None for layer in swapped_layers(served))
            assert (served(input_ids=ids).logits - expected).abs().max() < 1e-4
