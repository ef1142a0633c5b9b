"""``on_miss="low_bit"``: an expert that is not there in time is computed from its 4-bit copy, within a bound, and read
for the next time. What is decided depends on timing, so these models are settled: one lane, and each layer begins when
no read is under way."""

from __future__ import annotations

import pytest
import torch
from transformers import SwitchTransformersEncoderModel, SwitchTransformersForConditionalGeneration

import sida_ext
from sida_ext import _C
from sida_ext.errors import StoreError
from sida_ext.experts.runtime import Runtime
from sida_ext.models.packing import pack
from tests.support.families import tiny_model
from tests.support.reference import build, small_config

IDS = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
OTHER = torch.randint(3, 90, (1, 6), generator=torch.Generator().manual_seed(1))
SEAM = ("olmoe", "qwen3_moe", "gpt_oss")
SWITCH = ("encoder", "encoder-decoder")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Checkpoint folder by name."""
    made = {}

    def keep(name, model):
        made[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(made[name])

    for family in SEAM:
        keep(family, tiny_model(family)[1].float())
    keep("encoder", build(SwitchTransformersEncoderModel, small_config()))
    keep("encoder-decoder", build(SwitchTransformersForConditionalGeneration, small_config()))
    return made


@pytest.fixture
def nothing_in_memory(monkeypatch):
    """Without the check of the kernel at load, which leaves an expert in memory."""
    monkeypatch.setattr("sida_ext.models.seam._verify", lambda layer: None)


def load(folder, **changes):
    model = sida_ext.from_pretrained(
        folder,
        **{"expert_dtype": "float32", "dtype": torch.float32, "expert_memory": "100%", "lanes": 1, **changes},
    )
    model.sida.set_settled(True)
    return model


def low_bit(folder, share=1.0, **changes):
    return load(folder, on_miss="low_bit", max_low_bit=share, **changes)


def run(model, ids):
    more = {"decoder_input_ids": ids[:, :3]} if hasattr(model, "decoder") else {}
    with torch.no_grad():
        output = model(input_ids=ids, **more)
    return output.logits if "logits" in output else output.last_hidden_state


@pytest.mark.parametrize("name", [*SEAM, *SWITCH])
def test_all_late_has_the_bits_of_4_bit_experts_and_is_read_all_the_same(folders, name, nothing_in_memory):
    reference, four_bits = load(folders[name]), load(folders[name], expert_dtype="int4")
    model = low_bit(folders[name])
    with reference.sida, four_bits.sida, model.sida as runtime:
        assert torch.equal(run(model, IDS), run(four_bits, IDS))
        stats = runtime.stats()
        assert 0 < stats.choices == stats.low_bit_choices
        assert stats.low_bit_share == 1
        for layer in stats.layers:
            assert 0 < layer.choices == layer.low_bit_choices
        with runtime.exact():
            assert torch.equal(run(model, IDS), run(reference, IDS))
        later = runtime.stats()
        assert later.low_bit_choices == stats.low_bit_choices
        # Each was read once, though a copy had served it; anew only what the exact routing alone wants.
        assert later.loads == stats.unique + later.misses - stats.misses
        assert later.late == stats.late == stats.hits == 0
        assert later.hits > 0


@pytest.mark.parametrize("name", ["olmoe", "encoder"])
def test_a_share_of_nothing_and_a_wait_have_the_same_bits(folders, name):
    waiting, nothing = load(folders[name], expert_memory="25%"), low_bit(folders[name], 0, expert_memory="25%")
    with waiting.sida, nothing.sida:
        for ids in (IDS, OTHER, IDS):
            assert torch.equal(run(waiting, ids), run(nothing, ids))
        assert nothing.sida.stats().low_bit_choices == 0 < nothing.sida.stats().misses
        assert waiting.sida.low_bit_memory == 0
        assert waiting.sida.options.on_miss == "wait"


@pytest.mark.parametrize("name", ["olmoe", "encoder"])
@pytest.mark.parametrize("share", [0.02, 0.1, 0.35])
def test_the_share_holds_at_every_moment(folders, name, share):
    random = torch.Generator().manual_seed(3)
    model = low_bit(folders[name], share, expert_memory="20%")
    with model.sida as runtime:
        for _ in range(12):
            run(model, torch.randint(3, 90, (1, 4), generator=random))
            stats = runtime.stats()
            assert stats.low_bit_choices <= share * stats.choices
            assert stats.low_bit_choices == sum(layer.low_bit_choices for layer in stats.layers)
        assert stats.low_bit_choices > 0
        assert stats.misses + stats.late > 0
        runtime.reset_stats()
        run(model, IDS)
        assert runtime.stats().low_bit_choices <= share * runtime.stats().choices


def test_a_settled_model_gives_the_same_bits_whatever_reads_take(folders):
    found = []
    for delay in (0, 2000):
        faults = _C.Faults(delay_us_min=delay // 2, delay_us_max=delay)
        model = low_bit(folders["olmoe"], 0.3, expert_memory="25%", faults=faults)
        with model.sida as runtime:
            assert runtime.stats().choices == 0  # the check of the kernel at load does not count
            found.append([run(model, ids) for ids in (IDS, OTHER, IDS, OTHER)] + [runtime.stats().low_bit_choices])
    assert found[0][-1] == found[1][-1] > 0
    for one, other in zip(found[0][:-1], found[1][:-1], strict=True):
        assert torch.equal(one, other)


def test_generation_within_the_share(folders):
    model = low_bit(folders["olmoe"], 0.2, expert_memory="20%")
    model.sida.set_settled(False)
    with model.sida as runtime:
        assert model.generate(IDS, max_new_tokens=8, min_new_tokens=8, do_sample=False).shape == (2, 17)
        stats = runtime.stats()
        assert stats.low_bit_choices <= 0.2 * stats.choices
        assert stats.as_dict()["low_bit_choices"] == stats.low_bit_choices


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("name", ["olmoe", "encoder"])
def test_after_an_interrupted_forward_the_next_is_right(folders, name, kind):
    reference, model = load(folders[name]), low_bit(folders[name], wait_deadline=20.0)
    with reference.sida, model.sida as runtime:
        block = model.model.layers[1] if name == "olmoe" else model.encoder.block[1]

        def stop(*_):
            raise kind

        hook = block.register_forward_hook(stop)
        with pytest.raises(kind):
            run(model, IDS)
        hook.remove()
        assert runtime.stats().low_bit_choices > 0
        with runtime.exact():
            assert torch.equal(run(model, OTHER), run(reference, OTHER))
            assert torch.equal(run(model, IDS), run(reference, IDS))
        assert runtime.max_low_bit == 1.0
    assert runtime.closed


def test_a_copy_does_not_hide_that_reads_fail(folders, nothing_in_memory):
    model = low_bit(folders["olmoe"], faults=_C.Faults(fail_every=1))
    with model.sida as runtime:
        run(model, OTHER)  # all from copies; meanwhile every read fails
        with pytest.raises(OSError, match="expert"):
            run(model, OTHER)
        assert runtime.stats().failed_loads > 0


def test_the_bytes_of_the_copies_are_counted_and_said(folders, caplog, tmp_path):
    header = pack(folders["olmoe"], tmp_path / "int4.sida", "int4")
    model = low_bit(folders["olmoe"], store_cache=tmp_path)
    with model.sida as runtime:
        assert runtime.low_bit_memory == header.experts_bytes
        assert runtime.expert_memory == runtime.header.experts_bytes
    told = [record.message for record in caplog.records if "on_miss='low_bit'" in record.message]
    assert len(told) == 1
    assert f"int4 copies of all {header.total_experts} experts stay in memory" in told[0]
    assert sorted(path.name.rpartition("-")[2] for path in tmp_path.glob("*-*.sida")) == ["float32.sida", "int4.sida"]


def test_copies_of_another_kind_are_taken_and_of_another_checkpoint_refused(folders, tmp_path, nothing_in_memory):
    own, foreign, whole = tmp_path / "own.sida", tmp_path / "foreign.sida", tmp_path / "whole.sida"
    pack(folders["olmoe"], own, "mxfp4")
    pack(folders["encoder"], foreign, "int4")
    pack(folders["olmoe"], whole, "bfloat16")
    reference, model = load(folders["olmoe"], expert_dtype="mxfp4"), low_bit(folders["olmoe"], low_bit_store=own)
    with reference.sida, model.sida:
        assert torch.equal(run(model, IDS), run(reference, IDS))
    with pytest.raises(StoreError, match="fingerprint"):
        low_bit(folders["olmoe"], low_bit_store=foreign)
    with pytest.raises(StoreError, match="its experts are bfloat16, expected int4 or mxfp4"):
        low_bit(folders["olmoe"], low_bit_store=whole)
    with pytest.raises(ValueError, match="expected 'wait' with a store of mxfp4"):
        low_bit(folders["olmoe"], store=own, expert_dtype="bfloat16")
    with pytest.raises(StoreError, match=r"expected .* as in the store of the experts"):
        Runtime(whole, on_miss="low_bit", low_bit_store=foreign)
    with pytest.raises(ValueError, match="expected low_bit_store= with it"):
        Runtime(whole, on_miss="low_bit")


def test_a_swapped_model_has_copies_too(folders, tmp_path, nothing_in_memory):
    _, model = tiny_model("olmoe")
    store = tmp_path / "experts.sida"
    with pytest.raises(ValueError, match=r"low_bit_store is 'x\.sida', expected None"):
        sida_ext.swap_experts(tiny_model("olmoe")[1], on_miss="low_bit", low_bit_store="x.sida")
    served = sida_ext.swap_experts(
        model.float(), expert_memory="100%", expert_dtype="float32", store=store, on_miss="low_bit", max_low_bit=1.0
    )
    served.sida.set_settled(True)
    reference = load(folders["olmoe"])
    with served.sida as runtime, reference.sida:
        run(served, IDS)
        assert runtime.stats().low_bit_share == 1
        with runtime.exact():
            assert torch.equal(run(served, IDS), run(reference, IDS))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["experts.int4.sida", "experts.sida"]


def test_layers_whose_gate_is_the_modules_own_wait_and_say_so(folders, monkeypatch, caplog):
    monkeypatch.setattr("sida_ext.models.seam.gate_formula", lambda *_: None)
    reference, model = load(folders["olmoe"]), low_bit(folders["olmoe"])
    with reference.sida, model.sida as runtime:
        assert torch.equal(run(model, IDS), run(reference, IDS))
        assert runtime.stats().low_bit_choices == 0
    assert [record for record in caplog.records if "wait for their experts all the same" in record.message]


def test_copies_that_do_not_fit_are_refused_with_numbers(folders, monkeypatch):
    with low_bit(folders["olmoe"]).sida as runtime:
        copies, all_experts = runtime.low_bit_memory, runtime.expert_memory
    monkeypatch.setattr("sida_ext.experts.low_bit.available_memory", lambda: copies + all_experts)
    low_bit(folders["olmoe"]).sida.close()
    monkeypatch.setattr("sida_ext.experts.low_bit.available_memory", lambda: copies + all_experts - 1)
    with pytest.raises(ValueError, match=r"beside an expert_memory of .* are free; lower expert_memory to"):
        low_bit(folders["olmoe"])
    monkeypatch.setattr("sida_ext.experts.low_bit.available_memory", lambda: copies // 2)
    with pytest.raises(ValueError, match=r"are free; use on_miss='wait'"):
        low_bit(folders["olmoe"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"on_miss": "drop"}, "on_miss is 'drop', expected one of wait, low_bit"),
        ({"on_miss": "low_bit", "max_low_bit": 1.5}, r"max_low_bit is 1\.5, expected a share of the choices, 0 to 1"),
        ({"on_miss": "low_bit", "max_low_bit": "5%"}, "max_low_bit is '5%', expected a share"),
        ({"on_miss": "low_bit", "max_low_bit": float("nan")}, "max_low_bit is nan"),
        ({"on_miss": "low_bit", "expert_dtype": "int4"}, "expected 'wait' with expert_dtype='int4'"),
        ({"on_miss": "low_bit", "device": "cuda"}, "expected 'wait' on 'cuda'"),
        ({"low_bit_store": "x.sida"}, r"low_bit_store is 'x\.sida', expected None with on_miss='wait'"),
    ],
)
def test_what_cannot_work_is_refused_at_once(arguments, message):
    with pytest.raises(ValueError, match=message):
        sida_ext.from_pretrained("nowhere", **{"expert_dtype": "float32", **arguments})


def test_the_share_changes_while_the_model_is_loaded(folders):
    with load(folders["olmoe"]).sida as runtime, pytest.raises(ValueError, match="expected on_miss='low_bit' when"):
        runtime.set_max_low_bit(0.1)
    with low_bit(folders["olmoe"], 0.0).sida as runtime:
        with pytest.raises(ValueError, match="max_low_bit is 2, expected a share of 0 to 1"):
            runtime.set_max_low_bit(2)
        assert runtime.max_low_bit == 0
        runtime.set_max_low_bit(0.5)
        assert runtime.max_low_bit == 0.5
