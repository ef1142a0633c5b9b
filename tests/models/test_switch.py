"""The swapped model against transformers' own: hidden states, generate, budgets, and everything that must refuse."""

from __future__ import annotations

import copy
import os
import pickle
import re
import shutil
import threading

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import SwitchTransformersEncoderModel, SwitchTransformersForConditionalGeneration
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

import sida_ext
from sida_ext import _C, SwitchTransformersForSequenceClassification
from sida_ext.models.families import moe_layers
from tests.support.reference import build, small_config

Encoder, EncoderDecoder = SwitchTransformersEncoderModel, SwitchTransformersForConditionalGeneration
Classifier = SwitchTransformersForSequenceClassification


def inputs(batch=3, length=11, seed=0, padding="right", vocab=97):
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, vocab, (batch, length), generator=random)
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        pad = int(torch.randint(0, length, (1,), generator=random))
        if pad:
            span = slice(length - pad, None) if padding == "right" else slice(0, pad)
            ids[row, span], mask[row, span] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """(folder, transformers' model) by class, fp32."""
    made = {}

    def get(model_class):
        if model_class not in made:
            folder = tmp_path_factory.mktemp(model_class.__name__)
            model = build(model_class, small_config())
            model.save_pretrained(folder)
            made[model_class] = folder, model
        return made[model_class]

    return get


def load(folder, **changes):
    return sida_ext.from_pretrained(folder, **{"expert_dtype": "float32", "expert_memory": "50%", **changes})


def hidden(output):
    return output.logits if "logits" in output else output.last_hidden_state


@pytest.mark.parametrize("model_class", [Encoder, Classifier])
def test_from_pretrained_equals_transformers(checkpoint, model_class):
    folder, reference = checkpoint(model_class)
    model = load(folder)
    assert type(model) is model_class
    assert not model.training
    with torch.no_grad():
        torch.testing.assert_close(hidden(model(**inputs())), hidden(reference(**inputs())), rtol=0, atol=1e-4)
    model.sida.close()


def test_encoder_decoder_equals_transformers(checkpoint):
    folder, reference = checkpoint(EncoderDecoder)
    with load(folder).sida as runtime:
        model = load(folder, store=runtime.store_path)
    batch = inputs() | {"decoder_input_ids": torch.randint(2, 97, (3, 7))}
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, reference(**batch).logits, rtol=0, atol=1e-4)
    loss, expected = (m(**inputs(), labels=batch["decoder_input_ids"]).loss for m in (model, reference))
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    model.sida.close()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    experts=st.sampled_from([8, 13, 32, 64]),
    capacity=st.sampled_from([1, 2, 64]),
    activation=st.sampled_from(["relu", "gelu", "gelu_new", "silu", "tanh", "quick_gelu", "gelu_pytorch_tanh"]),
    encoder_only=st.booleans(),
    tied=st.booleans(),
    padding=st.sampled_from(["left", "right"]),
    batch=st.integers(1, 4),
    length=st.integers(1, 20),
    dense_first=st.booleans(),
    share=st.integers(5, 100),
    seed=st.integers(0, 2**16),
)
def test_random_configurations(
    experts, capacity, activation, encoder_only, tied, padding, batch, length, dense_first, share, seed
):
    config = small_config(
        num_experts=experts,
        expert_capacity=capacity,
        dense_act_fn=activation,
        tie_word_embeddings=tied,
        num_layers=2,
        num_decoder_layers=2,
        num_sparse_encoder_layers=1 if dense_first else 2,
        num_sparse_decoder_layers=1 if dense_first else 2,
    )
    reference = build(Encoder if encoder_only else EncoderDecoder, config, seed)
    batch_inputs = inputs(batch, length, seed, padding)
    if not encoder_only:
        batch_inputs["decoder_input_ids"] = inputs(batch, max(1, length // 2), seed + 1)["input_ids"]
    with torch.no_grad():
        expected = reference(**batch_inputs, output_hidden_states=True, output_router_logits=True)
        record = _C.ExpertFormat(config.d_model, config.d_ff, "float32").record_bytes
        slots = max(1, experts * len(moe_layers(reference)) * share // 100)
        model = sida_ext.swap_experts(copy.deepcopy(reference), expert_dtype="float32", expert_memory=slots * record)
        with model.sida:
            actual = model(**batch_inputs, output_hidden_states=True, output_router_logits=True)
    names = (
        ("last_hidden_state", "hidden_states", "router_logits")
        if encoder_only
        else (
            "logits",
            "encoder_hidden_states",
            "decoder_hidden_states",
            "encoder_router_logits",
            "decoder_router_logits",
            "encoder_z_loss",
        )
    )
    if not encoder_only and dense_first is False:
        names = names[:-1]  # transformers has no z loss where every layer is sparse
    for name in names:
        if expected[name] is None:
            assert actual[name] is None
            continue
        torch.testing.assert_close(
            actual[name], expected[name], rtol=0, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


class Margins(transformers.LogitsProcessor):
    """Records the smallest margin between the best and the second-best next token of each step."""

    def __init__(self):
        self.margins = []

    def __call__(self, input_ids, scores):
        best = scores.topk(2, dim=-1).values
        self.margins.append((best[:, 0] - best[:, 1]).min().item())
        return scores


GENERATE = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 20},
    "beams": {"num_beams": 3},
    "no cache": {"do_sample": False, "use_cache": False},
}


@pytest.mark.parametrize("mode", GENERATE)
def test_generate_gives_the_same_tokens(checkpoint, mode, record_property):
    folder, reference = checkpoint(EncoderDecoder)
    model = load(folder, expert_memory="30%")
    decisions, close, compared = 0, 0, 0
    for seed in range(4):
        batch = inputs(seed=seed)
        margins = Margins()
        torch.manual_seed(seed)
        expected = reference.generate(
            **batch,
            max_new_tokens=12,
            min_new_tokens=12,
            **GENERATE[mode],
            logits_processor=transformers.LogitsProcessorList([margins]),
        )
        torch.manual_seed(seed)
        actual = model.generate(**batch, max_new_tokens=12, min_new_tokens=12, **GENERATE[mode])
        # Free-running up to the first decision that is too close to call in float32.
        sure = next((i for i, margin in enumerate(margins.margins) if margin < 1e-4), len(margins.margins))
        assert torch.equal(actual[:, : sure + 1], expected[:, : sure + 1])
        decisions, compared = decisions + len(margins.margins), compared + sure
        close += sum(margin < 1e-4 for margin in margins.margins)
    record_property("decisions", decisions)
    record_property("decisions with a margin under 1e-4", close)
    print(f"{mode}: {close} of {decisions} decisions have a margin under 1e-4; compared up to the first, {compared}")
    assert compared > 0
    model.sida.close()


@pytest.mark.parametrize("mode", ["greedy", "beams"])
def test_generate_with_the_references_routing_gives_all_its_tokens(checkpoint, mode):
    folder, reference = checkpoint(EncoderDecoder)
    model = load(folder, expert_memory="30%")
    recorded: dict[str, list] = {}
    hooks = []
    for name, layer in moe_layers(reference).items():
        recorded[name] = []
        hooks.append(layer.router.register_forward_hook(lambda _, args, out, to=recorded[name]: to.append(out)))
    for name, layer in moe_layers(model).items():

        def forward(hidden_states, calls=recorded[name]):
            mask, probs, logits = calls.pop(0)
            index = torch.where(mask.sum(-1) > 0, mask.argmax(-1), -1)
            return index, probs.squeeze(-1).float(), logits

        layer.router.forward = forward
    for seed in range(4):
        expected = reference.generate(**inputs(seed=seed), max_new_tokens=12, min_new_tokens=12, **GENERATE[mode])
        assert torch.equal(
            model.generate(**inputs(seed=seed), max_new_tokens=12, min_new_tokens=12, **GENERATE[mode]), expected
        )
    for hook in hooks:
        hook.remove()
    model.sida.close()


def test_generate_with_a_cache_of_the_caller(checkpoint):
    folder, reference = checkpoint(EncoderDecoder)
    model = load(folder)
    results = []
    for m in (reference, model):
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        results.append(m.generate(**inputs(), max_new_tokens=6, min_new_tokens=6, past_key_values=cache))
    assert torch.equal(*results)
    model.sida.close()


def test_bits_do_not_depend_on_budget_eviction_lanes_or_timing(checkpoint):
    folder, _ = checkpoint(Encoder)
    batches = [inputs(batch=1 + seed % 3, length=5 + seed, seed=seed) for seed in range(6)]
    expected = None
    variants = [
        {"expert_memory": memory, "eviction": eviction, "lanes": lanes, "faults": faults}
        for memory, eviction, lanes, faults in [
            ("100%", "next_use", 4, None),
            ("100%", "lru", 1, None),
            ("50%", "lru", 2, None),
            ("25%", "fifo", 3, None),
            ("25%", "lfu", 4, _C.Faults(seed=1, delay_us_max=2000)),
            ("7%", "next_use", 2, _C.Faults(seed=2, delay_us_max=500)),
            ("7%", "lru", 1, None),
        ]
    ]
    for variant in variants:
        with load(folder, **variant).sida as runtime:
            model = load(folder, store=runtime.store_path, **variant)
        with torch.no_grad(), model.sida:
            outputs = [model(**batch).last_hidden_state for batch in batches]
        expected = outputs if expected is None else expected
        for ours, first in zip(outputs, expected, strict=True):
            assert torch.equal(ours, first), variant


def test_the_budget_is_hard_and_one_expert_is_enough(checkpoint):
    folder, reference = checkpoint(Encoder)
    record = load(folder).sida.header.record_bytes
    with pytest.raises(ValueError, match=rf"smallest that works is one expert of this store, {record} bytes"):
        load(folder, expert_memory=record - 1)
    model = load(folder, expert_memory=record)
    with torch.no_grad():
        torch.testing.assert_close(hidden(model(**inputs())), hidden(reference(**inputs())), rtol=0, atol=1e-4)
    stats = model.sida.stats()
    assert model.sida.expert_memory == record
    assert stats.evictions > 0
    assert stats.peak_slots == 1
    model.sida.close()


def test_set_budget_while_running(checkpoint):
    folder, _ = checkpoint(Encoder)
    model = load(folder, expert_memory="100%")
    with torch.no_grad():
        expected = model(**inputs()).last_hidden_state
        for budget in ("10%", "80%", "7%", "100%"):
            model.sida.set_budget(budget)
            assert torch.equal(model(**inputs()).last_hidden_state, expected)
            assert model.sida.expert_memory <= model.sida.header.experts_bytes * float(budget[:-1]) / 100 + 1
    with pytest.raises(ValueError, match="smallest that works"):
        model.sida.set_budget(1)
    model.sida.close()


def test_other_arguments_reach_transformers(checkpoint):
    folder, _ = checkpoint(Encoder)
    model = load(folder, dtype=torch.bfloat16, attn_implementation="eager")
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"
    reference = Encoder.from_pretrained(folder, dtype=torch.bfloat16)
    with torch.no_grad():
        ours, theirs = model(**inputs()).last_hidden_state, reference(**inputs()).last_hidden_state
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=0.1, atol=0.3)
    model.sida.close()
    for name, value in (("device_map", "auto"), ("quantization_config", {"bits": 8})):
        with pytest.raises(ValueError, match=name):
            load(folder, **{name: value})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"device": "xpu"}, ValueError, "device is 'xpu', expected 'cpu', 'cuda' or 'cuda:N'"),
        ({"host_memory": "1GiB"}, ValueError, "host_memory is '1GiB'"),
        ({"routing": "random"}, ValueError, "routing is 'random', expected one of router, predicted"),
        ({"predictor": 3}, TypeError, "predictor is int"),
        ({"expert_dtype": "int3"}, ValueError, "dtype is 'int3'"),
        ({"expert_memory": "lots"}, ValueError, "expert_memory is 'lots'"),
        ({"eviction": "random"}, ValueError, "eviction is 'random'"),
    ],
)
def test_bad_arguments_are_named(checkpoint, changes, error, message):
    folder, _ = checkpoint(Encoder)
    with pytest.raises(error, match=message):
        load(folder, **changes)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """huggingface_hub's cache as a download leaves it: a model in two revisions, by commit, branch and tag."""
    cache = tmp_path / "hub"
    repository = cache / "models--org--small-switch"
    references = {}
    for number, (commit, names) in enumerate({"a" * 40: ["main"], "b" * 40: ["next", "v2"]}.items()):
        references[commit] = build(Encoder, small_config(), seed=number)
        references[commit].save_pretrained(tmp_path / commit)
        for file in (tmp_path / commit).iterdir():
            blob = repository / "blobs" / f"{commit[0]}-{file.name}"
            blob.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(file, blob)
            link = repository / "snapshots" / commit / file.name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
        for name in names:
            (repository / "refs").mkdir(exist_ok=True)
            (repository / "refs" / name).write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    return cache, references


@pytest.mark.parametrize(
    ("revision", "commit"), [(None, "a"), ("main", "a"), ("next", "b"), ("v2", "b"), ("b" * 40, "b")]
)
def test_a_hub_id_is_loaded_from_the_hubs_cache(hub, revision, commit):
    reference = hub[1][commit * 40]
    model = load("org/small-switch", **({} if revision is None else {"revision": revision}))
    with torch.no_grad(), model.sida:
        torch.testing.assert_close(hidden(model(**inputs())), hidden(reference(**inputs())), rtol=0, atol=1e-4)
    assert not any(
        torch.equal(a, b) for a, b in zip(*(r.parameters() for r in hub[1].values()), strict=True) if a.dim() > 1
    )


def test_a_hub_id_is_found_in_the_cache_dir_that_is_given(hub, tmp_path, monkeypatch):
    cache, references = hub
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "another"))
    with pytest.raises(FileNotFoundError, match="org/small-switch is no folder"):
        load("org/small-switch")
    model = load("org/small-switch", cache_dir=cache)
    with torch.no_grad(), model.sida:
        torch.testing.assert_close(
            hidden(model(**inputs())), hidden(references["a" * 40](**inputs())), rtol=0, atol=1e-4
        )


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("org/unknown", {}, "is no folder here, and the hub did not give it"),
        ("org/small-switch", {"revision": "v3"}, "is no folder here, and the hub did not give it"),
        ("no such thing", {}, "does not exist, expected a checkpoint folder or a hub id"),
        ("./not/a/folder", {}, "does not exist, expected a checkpoint folder or a hub id"),
    ],
)
def test_neither_a_folder_nor_in_the_hubs_cache(hub, name, changes, said):
    with pytest.raises(FileNotFoundError, match=f"{re.escape(name)} {said}"):
        load(name, **changes)


def test_store_of_another_checkpoint_is_refused(checkpoint, tmp_path):
    folder, _ = checkpoint(Encoder)
    build(Encoder, small_config(), seed=5).save_pretrained(tmp_path / "other")
    sida_ext.pack(tmp_path / "other", tmp_path / "other.sida", "float32")
    with pytest.raises(sida_ext.StoreError, match="packed from a checkpoint with fingerprint"):
        load(folder, store=tmp_path / "other.sida")


@pytest.fixture
def model(checkpoint):
    model = load(checkpoint(Encoder)[0])
    yield model
    model.sida.close()


def test_training_is_refused_and_changes_nothing(model):
    with torch.no_grad():
        before = model(**inputs()).last_hidden_state
    for part in (model, model.encoder, model.encoder.block[1]):
        with pytest.raises(RuntimeError, match="frozen"):
            part.train()
    assert not any(module.training for module in model.modules())
    with torch.no_grad():
        assert torch.equal(model.eval()(**inputs()).last_hidden_state, before)


def test_gradients(model):
    model(**inputs())  # outside no_grad
    embeddings = torch.randn(1, 4, 24, requires_grad=True)
    out = model(inputs_embeds=embeddings).last_hidden_state
    with pytest.raises(NotImplementedError, match="has no backward"):
        out.sum().backward()


def test_saving_is_refused(model, tmp_path):
    with pytest.raises(RuntimeError, match="would lack"):
        model.state_dict()
    with pytest.raises(RuntimeError, match="would lack"):
        model.save_pretrained(tmp_path / "saved")
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(model)
    assert not list((tmp_path / "saved").glob("*.safetensors")) if (tmp_path / "saved").exists() else True


def test_moving(model):
    with torch.no_grad():
        before = model(**inputs()).last_hidden_state
        assert torch.equal(model.to("cpu")(**inputs()).last_hidden_state, before)
    for part in (model, model.encoder, model.encoder.block[1].layer[1].mlp):
        with pytest.raises(RuntimeError, match="cannot move to meta"):
            part.to("meta")
    with pytest.raises(RuntimeError, match=r"sida_ext\.plan says what it takes"):
        model.to("meta")
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())
    for cast in (model.double, lambda: model.to(torch.float64), model.encoder.double):
        with pytest.raises(RuntimeError, match=r"cannot be cast to float64: .* float32, float16, bfloat16; nothing"):
            cast()
    with torch.no_grad():
        assert torch.equal(model(**inputs()).last_hidden_state, before)
        assert model.to(torch.bfloat16)(**inputs()).last_hidden_state.dtype == torch.bfloat16


def test_a_model_cast_to_half_precision_computes_as_transformers_does(folder):
    """``model.half()`` casts everything but the experts; the reference's experts are cast too."""
    plain = Encoder.from_pretrained(folder).eval()
    served = sida_ext.from_pretrained(folder, model_class=Encoder, expert_dtype="float16")
    with served.sida, torch.no_grad():
        exact = plain(**inputs()).last_hidden_state
        expected, found = (model.half()(**inputs()).last_hidden_state for model in (plain, served))
    assert found.dtype == torch.float16
    rounding = (expected.float() - exact).abs().max()
    assert (found.float() - exact).abs().max() <= 2 * rounding


@pytest.mark.parametrize(
    ("expert_dtype", "said"), [("bfloat16", True), ("float16", True), ("float32", False), ("int8", False)]
)
def test_rounding_a_float32_checkpoint_is_said(folder, caplog, expert_dtype, said):
    """Not of int8 and less, which nobody takes for exact."""
    caplog.set_level("INFO", logger="sida_ext")
    sida_ext.from_pretrained(folder, model_class=Encoder, expert_dtype=expert_dtype).sida.close()
    assert (
        f"its experts are served as {expert_dtype}, rounded; expert_dtype='float32' keeps them" in caplog.text
    ) == said


def test_a_closed_model_says_so(folder):
    model = sida_ext.from_pretrained(folder, model_class=Encoder)
    model.sida.close()
    with pytest.raises(RuntimeError, match=r"this model was closed .*; load the model again"):
        model(**inputs())


def test_deepcopy_shares_the_runtime(model):
    twin = copy.deepcopy(model)
    assert twin.sida is model.sida
    with torch.no_grad():
        assert torch.equal(twin(**inputs()).last_hidden_state, model(**inputs()).last_hidden_state)
    with pytest.raises(RuntimeError, match="frozen"):
        twin.train()


def test_closed_runtime_is_an_error(model):
    model.sida.close()
    model.sida.close()
    assert model.sida.closed
    with pytest.raises(RuntimeError, match="closed"):
        model(**inputs())


def test_two_threads_in_one_model(checkpoint):
    model = load(checkpoint(Encoder)[0], expert_memory="10%")
    batches = [inputs(seed=seed) for seed in range(8)]
    with torch.no_grad():
        expected = [model(**batch).last_hidden_state for batch in batches]
    results: dict[int, torch.Tensor] = {}
    errors: list[BaseException] = []

    def work(offset):
        try:
            with torch.no_grad():
                for i in range(offset, len(batches), 2):
                    results[i] = model(**batches[i]).last_hidden_state
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(offset,)) for offset in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    assert all(torch.equal(results[i], expected[i]) for i in range(len(batches)))
    model.sida.close()


def test_swap_experts_twice_and_on_a_dense_model():
    model = sida_ext.swap_experts(build(Encoder, small_config()), expert_memory="100%")
    with pytest.raises(ValueError, match="swapped already"):
        sida_ext.swap_experts(model)
    model.sida.close()
    with pytest.raises(ValueError, match="has no experts modules"):
        sida_ext.swap_experts(build(Encoder, small_config(num_layers=1, num_sparse_encoder_layers=1)).shared)


def test_failed_swap_leaves_the_model_alone():
    model = build(Encoder, small_config())
    with torch.no_grad():
        before = model(**inputs()).last_hidden_state
        with pytest.raises(ValueError, match="smallest that works"):
            sida_ext.swap_experts(model, expert_memory=1)
        assert torch.equal(model(**inputs()).last_hidden_state, before)


def test_compiled_model_equals_eager(checkpoint):
    model = load(checkpoint(Encoder)[0])
    layer = model.encoder.block[1].layer[1].mlp
    x = torch.randn(2, 5, 24)
    with torch.no_grad():
        assert torch.equal(torch.compile(layer, fullgraph=True, backend="eager")(x), layer(x))
    model.sida.close()
