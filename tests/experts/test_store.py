"""Checkpoint -> expert store: contents, damage of every kind, locks and space."""

from __future__ import annotations

import json
import os
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import SwitchTransformersEncoderModel, SwitchTransformersForConditionalGeneration

from sida_ext import _C, StoreError, ops
from sida_ext.experts.cache import ensure_store
from sida_ext.experts.quantise import Quantised, quantise, quantize_rows
from sida_ext.experts.source import ExpertWeights
from sida_ext.experts.store import open_store
from sida_ext.experts.store_writer import write_store
from sida_ext.models.packing import pack, source_of
from tests.support.reference import build, small_config


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    build(SwitchTransformersForConditionalGeneration, small_config()).save_pretrained(folder)
    return folder


@pytest.fixture
def store(checkpoint, tmp_path) -> Path:
    pack(checkpoint, tmp_path / "experts.sida", "float32")
    return tmp_path / "experts.sida"


def read(path: Path, layer: int, expert: int) -> np.ndarray:
    opened, header = open_store(path)
    return np.asarray(opened.read(layer, expert))[: header.record_bytes]


def part(record: np.ndarray, offset: int, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    size = rows * columns * torch.empty(0, dtype=dtype).element_size()
    return torch.from_numpy(record[offset : offset + size].copy()).view(dtype).view(rows, columns)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
def test_every_expert_arrives(checkpoint, tmp_path, dtype):
    path = tmp_path / "experts.sida"
    calls = []
    header = pack(checkpoint, path, dtype, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(i + 1, 32) for i in range(32)]
    assert header.layers == (
        "encoder.block.1.layer.1.mlp",
        "encoder.block.3.layer.1.mlp",
        "decoder.block.1.layer.2.mlp",
        "decoder.block.3.layer.2.mlp",
    )
    weights = load_file(checkpoint / "model.safetensors")
    fmt = header.format()
    for layer, name in enumerate(header.layers):
        for expert in range(8):
            record = read(path, layer, expert)
            for matrix, rows, columns in (("wi", 40, 24), ("wo", 24, 40)):
                weight = weights[f"{name}.experts.expert_{expert}.{matrix}.weight"]
                offset, scale_offset = getattr(fmt, f"{matrix}_offset"), getattr(fmt, f"{matrix}_scale_offset")
                if dtype == "int8":
                    q, scale = quantize_rows(weight)
                    assert torch.equal(part(record, offset, rows, columns, torch.int8), q)
                    assert torch.equal(part(record, scale_offset, 1, rows, torch.float32)[0], scale)
                    assert ((q * scale[:, None] - weight).abs() <= scale[:, None] * 0.5001).all()
                else:
                    stored = getattr(torch, dtype)
                    assert torch.equal(part(record, offset, rows, columns, stored), weight.to(stored))


class RandomExperts:
    """Gated experts with biases, of no checkpoint."""

    layers, num_experts, d_model, d_ff, gated, biased = ["a.mlp", "b.mlp"], 3, 24, 40, True, True
    family, layout, top_k, activation, gate = "random", "none", (2,), "silu", "act(gate) * up"
    fingerprint, name = "0" * 64, "random"

    def expert(self, layer: int, index: int, dtype: str | None = None) -> ExpertWeights:
        random = torch.Generator().manual_seed(10 * layer + index)
        return ExpertWeights(*(torch.randn(*shape, generator=random) for shape in ((80, 24), (24, 40), (80,), (24,))))


@pytest.mark.parametrize("dtype", ["float32", "int8", "int4", "mxfp4"])
def test_biases_arrive_and_are_computed_with(tmp_path, dtype):
    source = RandomExperts()
    path = tmp_path / "experts.sida"
    assert write_store(source, path, dtype).version == 2
    store, header = open_store(path)
    assert header.biased
    assert header.gated
    fmt = header.format()
    assert "'biased': True" in repr(fmt)
    for layer in range(2):
        for index in range(3):
            record = read(path, layer, index)
            expert = source.expert(layer, index)
            assert torch.equal(part(record, fmt.wi_bias_offset, 1, 80, torch.float32)[0], expert.wi_bias)
            assert torch.equal(part(record, fmt.wo_bias_offset, 1, 24, torch.float32)[0], expert.wo_bias)
    engine = _C.TransferEngine(
        store,
        slots=2,
        lanes=1,
        eviction="lru",
        wait_deadline_ms=60_000,
        faults=_C.Faults(),
        populate=False,
        read_bytes=0,
    )
    with pytest.raises(ValueError, match="activation is 'silu', but the expert store holds gated experts"):
        _C.register_layer(engine, 1, 3, "silu")
    handle = _C.register_layer(engine, 1, 3, "swiglu_oai")
    try:
        x, index, gate = torch.randn(7, 24), torch.randint(0, 3, (7, 2)), torch.rand(7, 2)
        found = ops.moe_layer(x, index, gate, handle)
        experts = [source.expert(1, i) for i in range(3)]
        wi, wo, *biases = (
            torch.stack([getattr(expert, name) for expert in experts]) for name in ("wi", "wo", "wi_bias", "wo_bias")
        )
        scales = {}
        if dtype != "float32":
            quantised = {"wi": quantise(wi, dtype), "wo": quantise(wo, dtype)}
            wi, wo = (each.values for each in quantised.values())
            scales = {f"{name}_scale": each.scale for name, each in quantised.items()}
        slots = torch.arange(3, dtype=torch.int32)
        expected = ops.moe_ffn(
            x, index, gate, wi, wo, slots, activation="swiglu_oai", wi_bias=biases[0], wo_bias=biases[1], **scales
        )
        assert torch.equal(found, expected)
    finally:
        _C.unregister_layer(handle)
        engine.close()


@pytest.mark.parametrize("dtype", ["int8", "int4", "mxfp4"])
def test_the_header_says_how_far_quantising_moved_the_weights(tmp_path, dtype):
    source = RandomExperts()
    written = write_store(source, tmp_path / "x.sida", dtype)
    _, header = open_store(tmp_path / "x.sida")
    for layer in range(2):
        experts = [source.expert(layer, index) for index in range(3)]
        weights = [matrix for expert in experts for matrix in (expert.wi, expert.wo)]
        error = sum((quantise(w, dtype).dequantise() - w).square().sum() for w in weights)
        expected = (error / sum(w.square().sum() for w in weights)).sqrt().item()
        assert header.rounding[layer] == pytest.approx(expected, rel=1e-3)
        assert written.rounding[layer] == pytest.approx(expected, rel=1e-3)
    assert write_store(source, tmp_path / "y.sida", "float32").rounding == ()


def test_what_is_quantised_already_is_kept_bit_for_bit(tmp_path):
    random = torch.Generator().manual_seed(3)

    def matrix(rows: int, columns: int) -> Quantised:
        groups = -(-columns // 32)
        values = torch.randint(0, 256, (rows, 16 * groups), dtype=torch.uint8, generator=random)
        return Quantised(values, torch.randint(100, 140, (rows, groups), dtype=torch.uint8, generator=random), columns)

    packed = {(layer, index): (matrix(80, 24), matrix(24, 40)) for layer in range(2) for index in range(3)}

    class Packed(RandomExperts):
        def expert(self, layer, index, dtype=None):
            return replace(super().expert(layer, index), **dict(zip(("wi", "wo"), packed[layer, index], strict=True)))

    header = write_store(Packed(), tmp_path / "x.sida", "mxfp4")
    assert header.rounding == (0.0, 0.0)
    fmt = header.format()
    for (layer, index), (wi, wo) in packed.items():
        record = read(tmp_path / "x.sida", layer, index)
        for given, rows, offset, scale_offset in (
            (wi, 80, fmt.wi_offset, fmt.wi_scale_offset),
            (wo, 24, fmt.wo_offset, fmt.wo_scale_offset),
        ):
            assert torch.equal(part(record, offset, rows, given.values.shape[1], torch.uint8), given.values)
            assert torch.equal(part(record, scale_offset, rows, given.scale.shape[1], torch.uint8), given.scale)
    write_store(Packed(), tmp_path / "y.sida", "float32")
    record = read(tmp_path / "y.sida", 1, 2)
    assert torch.equal(part(record, 0, 80, 24, torch.float32), packed[1, 2][0].dequantise())


def test_a_store_without_biases_stays_readable_by_older_versions(store):
    _, header = open_store(store)
    assert header.version == 1
    assert not header.biased
    assert b'"biased"' not in header.to_json()


@pytest.mark.parametrize("field", ["wi", "wo", "wi_bias", "wo_bias"])
def test_an_expert_of_another_shape_is_refused(tmp_path, field):
    class Wrong(RandomExperts):
        def expert(self, layer, index, dtype=None):
            right = super().expert(layer, index)
            return replace(right, **{field: getattr(right, field)[..., :-1]})

    with pytest.raises(ValueError, match=rf"a\.mlp expert 0: {field} is torch.float32 of shape .* expected a float"):
        write_store(Wrong(), tmp_path / "x.sida", "float32")


def test_experts_that_span_shards(tmp_path, checkpoint):
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    shutil.copy(checkpoint / "config.json", sharded)
    weights = load_file(checkpoint / "model.safetensors")
    shards: list[dict] = [{}, {}, {}]
    for position, key in enumerate(sorted(weights)):
        shards[position % 3][key] = weights[key]  # wi and wo of an expert lie in different shards
    weight_map = {}
    for number, shard in enumerate(shards):
        name = f"model-{number}.safetensors"
        save_file(shard, sharded / name)
        weight_map |= dict.fromkeys(shard, name)
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    pack(checkpoint, tmp_path / "one.sida", "float32")
    pack(sharded, tmp_path / "many.sida", "float32")
    one, many = open_store(tmp_path / "one.sida")[1], open_store(tmp_path / "many.sida")[1]
    assert one.checksums == many.checksums
    (sharded / "model-1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"names model-1\.safetensors, which is not there"):
        pack(sharded, tmp_path / "no.sida", "float32")


def rewrite(path: Path, change) -> None:
    """Change the header's JSON and make the prologue fit it again."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[8:12], "little")
    start = _C.store_prologue_bytes
    fields = json.loads(raw[start : start + length])
    change(fields)
    text = json.dumps(fields, separators=(",", ":")).encode()
    data = raw[start + length :]
    if len(text) <= length:
        text = text + b" " * (length - len(text))
    path.write_bytes(_C.store_prologue(text) + text + data)


def flip(path: Path, position: int) -> None:
    with open(path, "r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 0x10]))


def test_flipped_bit_in_a_record_names_the_expert(store):
    _, header = open_store(store)
    flip(store, header.data_offset + 9 * header.record_bytes + 100)
    assert read(store, 0, 0).size
    with pytest.raises(StoreError, match=r"encoder\.block\.3\.layer\.1\.mlp.*expert 1"):
        read(store, 1, 1)


@pytest.mark.parametrize("position", [0, 5, 9, 13, 16, 60, 300])
def test_flipped_bit_in_the_header(store, position):
    flip(store, position)
    with pytest.raises(StoreError, match=r"experts\.sida"):
        open_store(store)


@pytest.mark.parametrize("keep", [0, 3, 12, 100, 5000, -1, -4096])
def test_truncated_file(store, keep):
    size = store.stat().st_size
    os.truncate(store, keep if keep >= 0 else size + keep)
    with pytest.raises(StoreError, match=r"experts\.sida"):
        open_store(store)


def test_foreign_file(tmp_path):
    (tmp_path / "text.sida").write_text("not a store, but long enough to be read as one" * 10)
    with pytest.raises(StoreError, match="not an expert store"):
        open_store(tmp_path / "text.sida")
    with pytest.raises(OSError, match=r"none\.sida"):
        open_store(tmp_path / "none.sida")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("version", 3, "format 3, this sida_ext reads up to 2"),
        ("biased", 1, "'biased' is 1"),
        ("rounding", ["0.1"] * 4, "a number of four digits"),
        ("rounding", ["1.000e-02"], "a number for each layer"),
        ("version", "1", "'version' is '1', expected a positive integer"),
        ("dtype", "int3", "'dtype' is 'int3', expected one of"),
        ("d_model", -1, "'d_model' is -1"),
        ("d_model", 2**47, "'d_model' is 140737488355328, expected at most 268435456"),
        ("d_ff", 400, "'record_bytes' is"),
        ("num_experts", 7, "'checksums' is '32 entries', expected 28"),
        ("gated", 1, "'gated' is 1"),
        ("layers", [], "'layers' is"),
        ("layers", ["a", "a", "b", "c"], "distinct module paths"),
        ("data_offset", 4096 * 4096, "experts.sida"),
        ("data_offset", 4097, "experts.sida"),
        ("checksum", "md5", "'checksum' is 'md5'"),
        ("checksums", ["xyz"] * 32, "32 hexadecimal digits"),
        ("fingerprint", None, "'fingerprint' is None"),
    ],
)
def test_wrong_header_field(store, field, value, message):
    rewrite(store, lambda fields: fields.__setitem__(field, value))
    with pytest.raises(StoreError, match=message.replace("(", r"\(")):
        open_store(store)


def test_pickles_are_refused_unless_asked_for(checkpoint, tmp_path):
    folder = tmp_path / "pickle"
    folder.mkdir()
    shutil.copy(checkpoint / "config.json", folder)
    torch.save(load_file(checkpoint / "model.safetensors"), folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pickles.*allow_pickle=True"):
        pack(folder, tmp_path / "no.sida")
    assert not (tmp_path / "no.sida").exists()
    header = pack(folder, tmp_path / "yes.sida", "float32", allow_pickle=True)
    pack(checkpoint, tmp_path / "same.sida", "float32")
    assert header.checksums == open_store(tmp_path / "same.sida")[1].checksums


def test_checkpoints_that_cannot_be_packed(checkpoint, tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist, expected a checkpoint folder or a hub id"):
        pack(tmp_path / "nothing", tmp_path / "x.sida")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        pack(empty, tmp_path / "x.sida")
    shutil.copy(checkpoint / "config.json", empty)
    with pytest.raises(FileNotFoundError, match=r"finds no weights there: .*no file named model\.safetensors"):
        pack(empty, tmp_path / "x.sida")
    weights = load_file(checkpoint / "model.safetensors")
    wi = "encoder.block.1.layer.1.mlp.experts.expert_3.wi.weight"
    for change, message in (
        ({wi: None}, "expert_3.wi.weight is missing"),
        (
            {wi: torch.zeros(3, 3)},
            r"expert_3.wi.weight is torch.float32 of shape \(3, 3\), expected .* of shape \(40, 24\)",
        ),
        ({wi: torch.zeros(40, 24, dtype=torch.int64)}, "expected a floating-point type"),
        ({wi: torch.full((40, 24), float("nan"))}, "wi holds NaN"),
        ({wi.replace("wi.weight", "wi.bias"): torch.zeros(40)}, "wi.bias is an expert parameter"),
        (
            {
                wi.replace("expert_3", "expert_9"): weights[wi].clone(),
                wi.replace("expert_3.wi", "expert_9.wo"): weights[wi].T.contiguous(),
            },
            "has expert 9",
        ),
    ):
        changed = {key: value for key, value in {**weights, **change}.items() if value is not None}
        save_file(changed, empty / "model.safetensors")
        with pytest.raises(ValueError, match=message):
            pack(empty, tmp_path / "x.sida", "float32")
        assert not (tmp_path / "x.sida").exists()
        assert not list(tmp_path.glob(".x.sida*"))
    (empty / "model.safetensors").write_bytes(b"rubbish")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        pack(empty, tmp_path / "x.sida")


def test_failure_leaves_the_good_store_in_place(store, checkpoint, monkeypatch):
    before = store.read_bytes()
    calls = []

    def interrupt(done, total):
        calls.append(done)
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(checkpoint, store, "bfloat16", progress=interrupt)
    assert calls[-1] == 5
    assert store.read_bytes() == before
    assert [path.name for path in store.parent.iterdir()] == [store.name]


def test_float16_overflow_is_refused(tmp_path, checkpoint):
    folder = tmp_path / "large"
    folder.mkdir()
    shutil.copy(checkpoint / "config.json", folder)
    weights = load_file(checkpoint / "model.safetensors")
    weights["encoder.block.1.layer.1.mlp.experts.expert_0.wo.weight"][0, 0] = 1e6
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match="beyond the range of float16"):
        pack(folder, tmp_path / "x.sida", "float16")


def test_no_space(checkpoint, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    with pytest.raises(OSError, match="are free there"):
        pack(checkpoint, tmp_path / "x.sida")


def test_the_cache_packs_once_for_two_callers(checkpoint, tmp_path):
    said: list[str] = []
    packed: list[int] = []

    def work():
        with source_of(checkpoint) as source:
            ensure_store(
                source,
                "bfloat16",
                tmp_path / "cache",
                say=said.append,
                progress=lambda done, total: packed.append(done) if done == total else None,
            )

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert packed == [32]
    assert sum("packing" in text and "waiting" not in text for text in said) == 1


def test_a_damaged_store_in_the_cache_is_packed_again_and_said(checkpoint, tmp_path):
    said: list[str] = []
    with source_of(checkpoint) as source:
        path = ensure_store(source, "bfloat16", tmp_path)
        os.truncate(path, 10000)
        assert ensure_store(source, "bfloat16", tmp_path, say=said.append) == path
    assert any("packing again" in text for text in said)
    open_store(path)


def test_another_checkpoint_has_another_fingerprint(checkpoint, tmp_path):
    build(SwitchTransformersForConditionalGeneration, small_config(), seed=1).save_pretrained(tmp_path / "other")
    with source_of(checkpoint) as one, source_of(tmp_path / "other") as other:
        assert one.fingerprint != other.fingerprint


def test_encoder_only_checkpoint(tmp_path):
    build(SwitchTransformersEncoderModel, small_config()).save_pretrained(tmp_path / "encoder")
    assert len(pack(tmp_path / "encoder", tmp_path / "x.sida").layers) == 2


def test_unknown_dtype(checkpoint, tmp_path):
    with source_of(checkpoint) as source, pytest.raises(ValueError, match="dtype is 'int3', expected one of"):
        write_store(source, tmp_path / "x.sida", "int3")
