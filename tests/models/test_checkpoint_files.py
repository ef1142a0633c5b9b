"""Which files a checkpoint means: experts and everything else always come from the same save, transformers' choice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, SwitchTransformersEncoderModel

import sida_ext
from sida_ext.models.checkpoint_files import resolve_checkpoint
from sida_ext.models.packing import pack, source_of
from tests.support.checkpoints import assert_experts_are, edit_config
from tests.support.families import tiny_model
from tests.support.reference import build, small_config

SHARDS = {"max_shard_size": "20KB"}


def olmoe(seed: int):
    return tiny_model("olmoe", seed)[1]


def assert_one_save(folder: Path, **location) -> None:
    """What is packed are the experts of the very model that transformers loads."""
    model_class = type(olmoe(0))
    with source_of(folder, **location) as source:
        assert_experts_are(source, model_class.from_pretrained(folder, **location))


@pytest.mark.parametrize("sharded_first", [False, True])
def test_two_saves_in_one_folder(sharded_first, tmp_path):
    """save_pretrained removes what it knows of an older save; a copy, or a download, does not."""
    saves = []
    for seed, options in ((1, {}), (2, SHARDS)):
        olmoe(seed).save_pretrained(tmp_path / str(seed), **options)
        saves.append(tmp_path / str(seed))
    for save in reversed(saves) if sharded_first else saves:
        shutil.copytree(save, tmp_path / "both", dirs_exist_ok=True)
    assert_one_save(tmp_path / "both")
    with source_of(tmp_path / "both") as source:
        assert_experts_are(source, olmoe(1))  # transformers takes the single file, whatever came last
    # An index that names a shard which is gone is nobody's business then.
    for shard in list((tmp_path / "both").glob("model-*-of-*.safetensors"))[:1]:
        shard.unlink()
    assert_one_save(tmp_path / "both")


@pytest.mark.parametrize("options", [{}, SHARDS])
def test_variant_and_subfolder(options, tmp_path):
    olmoe(1).save_pretrained(tmp_path, **options)
    olmoe(2).save_pretrained(tmp_path, variant="ema", **options)
    olmoe(3).save_pretrained(tmp_path / "inner", **options)
    for seed, location in ((1, {}), (2, {"variant": "ema"}), (3, {"subfolder": "inner"})):
        assert_one_save(tmp_path, **location)
        with source_of(tmp_path, **location) as source:
            assert_experts_are(source, olmoe(seed))


@pytest.mark.parametrize(
    "arguments", [{"variant": "ema"}, {"subfolder": "inner"}, {"config": "inner"}, {"use_safetensors": True}]
)
def test_they_reach_both_sides_of_from_pretrained(arguments, tmp_path):
    for seed, folder, options in ((1, ".", {}), (2, ".", {"variant": "ema"}), (3, "inner", {})):
        build(SwitchTransformersEncoderModel, small_config(), seed=seed).save_pretrained(tmp_path / folder, **options)
    if "config" in arguments:
        arguments = {"config": tmp_path / arguments["config"]}
    model = sida_ext.from_pretrained(tmp_path, expert_dtype="float32", **arguments)
    reference = SwitchTransformersEncoderModel.from_pretrained(tmp_path, **arguments)
    ids = torch.randint(2, 97, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), model.sida:
        found, expected = (each(input_ids=ids).last_hidden_state for each in (model, reference))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_configuration_object_and_a_place_of_one(tmp_path):
    olmoe(1).save_pretrained(tmp_path / "a")
    config = AutoConfig.from_pretrained(tmp_path / "a")
    for given in (config, tmp_path / "a", str(tmp_path / "a")):
        assert resolve_checkpoint(tmp_path / "a", config=given).config.num_experts == 8
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        resolve_checkpoint(tmp_path / "a", config=tmp_path)


def test_transformers_weights_names_the_file(tmp_path):
    olmoe(1).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "best.safetensors")
    olmoe(2).save_pretrained(tmp_path)
    edit_config(tmp_path, transformers_weights="best.safetensors")
    assert_one_save(tmp_path)


def test_pickles_are_read_for_those_who_trust_them(tmp_path):
    model = olmoe(1)
    model.config.architectures = ["OlmoeForCausalLM"]
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"holds only pytorch_model\.bin files, which are Python pickles"):
        pack(tmp_path, tmp_path / "x.sida")
    with pytest.raises(ValueError, match=r"use_safetensors=False asks for pytorch_model\.bin"):
        pack(tmp_path, tmp_path / "x.sida", use_safetensors=False)
    with source_of(tmp_path, allow_pickle=True) as source:
        assert_experts_are(source, model)
    # Safetensors come first, for both sides.
    model.save_pretrained(tmp_path)
    assert resolve_checkpoint(tmp_path, allow_pickle=True).weights == (tmp_path / "model.safetensors",)
    assert resolve_checkpoint(tmp_path, allow_pickle=True, use_safetensors=False).weights == (
        tmp_path / "pytorch_model.bin",
    )


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="none does not exist, expected a checkpoint folder or a hub id"):
        resolve_checkpoint(tmp_path / "none")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match="is a file, expected a checkpoint folder"):
        resolve_checkpoint(tmp_path / "file")
    olmoe(1).save_pretrained(tmp_path / "a", **SHARDS)
    with pytest.raises(ValueError, match="gguf_file= says nothing about which files to take"):
        resolve_checkpoint(tmp_path / "a", gguf_file="x.gguf")
    with pytest.raises(FileNotFoundError, match=r"no file named model\.fp8\.safetensors"):
        resolve_checkpoint(tmp_path / "a", variant="fp8")
    index = tmp_path / "a" / "model.safetensors.index.json"
    for text in ("{", "[]", '{"metadata": {}}'):
        index.write_text(text)
        with pytest.raises(ValueError, match="its shard index cannot be read"):
            resolve_checkpoint(tmp_path / "a")
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(ValueError, match="holds an adapter"):
        resolve_checkpoint(tmp_path / "a")
