"""What ``from_pretrained`` and ``swap_experts`` do with each argument: as transformers does, or refused by name before
anything is packed or touched."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, OlmoeForCausalLM, SwitchTransformersEncoderModel

import sida_ext
from sida_ext import Options
from sida_ext.models.layers import swapped_layers
from tests.support.families import tiny_model
from tests.support.reference import build, small_config

IDS = torch.randint(3, 120, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("olmoe")
    tiny_model("olmoe", 1)[1].float().save_pretrained(folder)
    return folder


def load(folder, **arguments):
    return sida_ext.from_pretrained(folder, **{"expert_dtype": "float32", "expert_memory": "50%", **arguments})


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"num_experts_per_tok": 1},
        {"norm_topk_prob": True, "use_cache": False},
        {"attn_implementation": "eager"},
        {"dtype": torch.float16},
        {"torch_dtype": "bfloat16"},
        {"model_class": AutoModelForCausalLM},
        {"generation_config": GenerationConfig(max_new_tokens=3)},
        {"experts_implementation": "eager"},
        {"local_files_only": True, "low_cpu_mem_usage": True, "trust_remote_code": False},
        {"quantization_config": None, "device_map": None, "state_dict": None, "output_loading_info": False},
    ],
    ids=str,
)
def test_an_argument_means_what_it_means_to_transformers(checkpoint, arguments):
    own = dict(arguments)
    model_class = own.pop("model_class", AutoModelForCausalLM)
    reference = model_class.from_pretrained(checkpoint, **own).eval()
    served = load(checkpoint, **arguments)
    with served.sida, torch.no_grad():
        assert type(served) is type(reference)
        assert served.dtype == reference.dtype
        for field in ("num_experts_per_tok", "norm_topk_prob", "use_cache", "_attn_implementation"):
            assert getattr(served.config, field) == getattr(reference.config, field), field
        assert served.generation_config.max_new_tokens == reference.generation_config.max_new_tokens
        error = (served(input_ids=IDS).logits.float() - reference(input_ids=IDS).logits.float()).abs().max()
        assert error <= (1e-5 if served.dtype == torch.float32 else 2e-2)


def test_a_field_of_a_switch_configuration(tmp_path):
    build(SwitchTransformersEncoderModel, small_config()).save_pretrained(tmp_path)
    model = load(tmp_path, model_class=sida_ext.SwitchTransformersForSequenceClassification, num_labels=5)
    with model.sida:
        assert model.classifier.out_features == 5


def test_a_given_configuration_is_taken_as_it_is(checkpoint):
    config = tiny_model("olmoe", 1)[1].config
    served = load(checkpoint, config=config, model_class=AutoModelForCausalLM)
    with served.sida:
        assert served.config is not config
        assert served.config.num_experts == config.num_experts
    with pytest.raises(TypeError, match="config is dict, expected a PreTrainedConfig or the place of one"):
        load(checkpoint, config=config.to_dict())


def test_a_class_of_the_users_own(checkpoint):
    class Own(OlmoeForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            self.mark = 7

    served = load(checkpoint, model_class=Own)
    with served.sida:
        assert type(served) is Own
        assert served.mark == 7
    with pytest.raises(TypeError, match="model_class is an object of Own, expected a class"):
        load(checkpoint, model_class=served)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"device_map": "auto"}, ValueError, "device_map is 'auto', expected nothing"),
        ({"gguf_file": "x.gguf"}, ValueError, r"gguf_file is 'x\.gguf', expected nothing: experts are read from saf"),
        ({"key_mapping": {"a": "b"}}, ValueError, "key_mapping is {'a': 'b'}, expected nothing"),
        ({"tp_size": 2}, ValueError, "tp_size is 2, expected nothing"),
        ({"output_loading_info": True}, ValueError, "output_loading_info is True, expected nothing"),
        ({"expert_memroy": "1GiB"}, TypeError, r"expert_memroy= is no argument; did you mean expert_memory="),
        ({"options": {"lanes": 1}}, TypeError, r"options is dict, expected sida_ext\.Options"),
    ],
    ids=str,
)
def test_what_would_bring_the_experts_from_elsewhere_is_refused_before_packing(
    checkpoint, tmp_path, arguments, error, text
):
    with pytest.raises(error, match=text):
        load(checkpoint, store_cache=tmp_path / "cache", **arguments)
    assert not (tmp_path / "cache").exists()


def test_options_and_names_together(checkpoint):
    options = Options(expert_dtype="int8", expert_memory="100%", lanes=2)
    served = sida_ext.from_pretrained(checkpoint, options=options, lanes=3, expert_memory="50%")
    with served.sida as runtime:
        assert (runtime.header.dtype, runtime.options.lanes, runtime.slots) == ("int8", 3, 12)
        store = runtime.store_path
    for dtype in ("int8", "bfloat16"):  # the second is the default: not asked for
        load(checkpoint, store=store, expert_dtype=dtype).sida.close()
    with pytest.raises(ValueError, match="expert_dtype is 'float32', expected 'int8', what store="):
        load(checkpoint, store=store)


def test_swap_experts_wants_a_model_with_weights():
    model = tiny_model("olmoe", 1)[1]
    for other in (None, "olmoe", nn.Sequential(model)):
        with pytest.raises(TypeError, match=f"model is {type(other).__name__}, expected a model of transformers"):
            sida_ext.swap_experts(other)
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight has no data \(device meta\)"):
        sida_ext.swap_experts(copy.deepcopy(model).to("meta"))
    with pytest.raises(TypeError, match="expert_memroy= is no argument; did you mean"):
        sida_ext.swap_experts(model, expert_memroy=1)


def test_a_gate_that_fails_leaves_the_model_as_it_was(monkeypatch):
    model = tiny_model("olmoe", 1)[1]

    def failing(self, rows):
        raise RuntimeError("this gate fails")

    monkeypatch.setattr(type(model.model.layers[0].mlp.experts), "_apply_gate", failing)
    with pytest.raises(RuntimeError, match="this gate fails"):
        sida_ext.swap_experts(model)
    assert not swapped_layers(model)
    assert model.model.layers[0].mlp.experts.gate_up_proj.requires_grad


def test_a_model_that_is_served_writes_no_half_of_a_checkpoint(checkpoint, tmp_path):
    served = load(checkpoint)
    with served.sida:
        for module in (served, served.model):
            for save in (module.save_pretrained, module.push_to_hub):
                with pytest.raises(RuntimeError, match=r"save_pretrained\(\) of Olmoe.* would lack its experts"):
                    save(tmp_path / "out")
        assert not (tmp_path / "out").exists()
