"""An interrupted forward leaves nothing behind; a model that is dropped gives its memory back at once."""

from __future__ import annotations

import functools
import gc
import threading
import weakref

import pytest
import torch
from transformers import SwitchTransformersEncoderModel, SwitchTransformersForConditionalGeneration

import sida_ext
from sida_ext.models.families import moe_layers
from sida_ext.prediction.decoder_predictor import RecurrentPredictor
from tests.support.families import tiny_model
from tests.support.predictors import ByToken
from tests.support.reference import build, small_config

IDS = torch.randint(2, 97, (2, 9), generator=torch.Generator().manual_seed(0))
OTHER = torch.randint(2, 97, (1, 4), generator=torch.Generator().manual_seed(1))


class StoppedError(Exception):
    pass


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Checkpoint folder by name: a Switch encoder, a Switch encoder-decoder, and a model of the experts seam."""
    made = {}
    for name, model in (
        ("encoder", build(SwitchTransformersEncoderModel, small_config())),
        ("encoder-decoder", build(SwitchTransformersForConditionalGeneration, small_config())),
        ("olmoe", tiny_model("olmoe", 1)[1].float()),
    ):
        made[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(made[name])
    return made


def load(folder, **changes):
    return sida_ext.from_pretrained(folder, **{"expert_dtype": "float32", "expert_memory": "50%", **changes})


def encoder(folders, routing):
    model = load(folders["encoder"], routing=routing)
    model.sida.predictor = ByToken(8, len(moe_layers(model)))
    return model


def hidden(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).last_hidden_state


def generated(model):
    return model.generate(IDS, max_new_tokens=5, do_sample=False)


def raising(module, kind, call=1):
    """Let the ``call``-th forward of a module raise."""
    calls = []

    def hook(*_):
        calls.append(None)
        if len(calls) == call:
            raise kind

    return module.register_forward_hook(hook)


@pytest.mark.parametrize("kind", [StoppedError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("routing", ["router", "predicted", "confident"])
def test_after_an_interrupted_encoder_the_next_call_is_right(folders, routing, kind):
    model = encoder(folders, routing)
    with model.sida as runtime:
        expected = [hidden(model, ids) for ids in (IDS, OTHER)]
        hook = raising(model.encoder.block[1], kind)
        with pytest.raises(kind):
            hidden(model, IDS)
        hook.remove()
        assert runtime.current.table is None
        assert runtime.current.number == 0
        # Of another shape and of the same: what was left of the table would show in either.
        for ids, right in zip((OTHER, IDS), reversed(expected), strict=True):
            assert torch.equal(hidden(model, ids), right)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("routing", ["router", "predicted", "confident"])
def test_a_call_inside_a_call_has_a_table_of_its_own(folders, routing, fails):
    model = encoder(folders, routing)
    with model.sida:
        expected, inner = (hidden(model, ids) for ids in (IDS, OTHER))
        seen = []

        def call_again(*_):
            outer.remove()
            if fails:
                hook = raising(model.encoder.block[1], KeyboardInterrupt)
                with pytest.raises(KeyboardInterrupt):
                    hidden(model, OTHER)
                hook.remove()
            seen.append(hidden(model, OTHER))

        outer = model.encoder.block[0].register_forward_hook(call_again)
        assert torch.equal(hidden(model, IDS), expected)
        assert torch.equal(seen[0], inner)


@pytest.mark.parametrize("routing", ["router", "predicted", "confident"])
def test_threads_do_not_see_one_anothers_tables(folders, routing):
    model = encoder(folders, routing)
    with model.sida:
        expected = [hidden(model, ids) for ids in (IDS, OTHER)]
        wrong = []

        def work(first):
            for turn in range(6):
                which = (first + turn) % 2
                if not torch.equal(hidden(model, (IDS, OTHER)[which]), expected[which]):
                    wrong.append((first, turn))

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong


@pytest.mark.parametrize("kind", [StoppedError, KeyboardInterrupt])
def test_after_an_interrupted_generation_the_next_one_is_right(folders, kind):
    model = load(folders["encoder-decoder"])
    model.sida.decoder_predictor = RecurrentPredictor.for_model(model)
    with model.sida as runtime:
        expected = generated(model)
        hook = raising(model.decoder.block[0], kind, call=3)
        with pytest.raises(kind):
            generated(model)
        hook.remove()
        assert runtime.current.number == 0
        assert torch.equal(generated(model), expected)
        with torch.no_grad():
            alone = model.generate(OTHER, max_new_tokens=3, do_sample=False)
        assert alone.shape[0] == 1


def used(folders, use):
    """A model that has computed, and has been interrupted."""
    if use == "olmoe":
        model = load(folders["olmoe"])
        generated(model)
        block, call = model.model.layers[0], generated
    elif use == "encoder-decoder":
        model = load(folders["encoder-decoder"])
        model.sida.decoder_predictor = RecurrentPredictor.for_model(model)
        generated(model)
        block, call = model.decoder.block[0], generated
    else:
        model = encoder(folders, use)
        block, call = model.encoder.block[1], functools.partial(hidden, ids=IDS)
        call(model)
    hook = raising(block, KeyboardInterrupt)
    try:
        call(model)
    except KeyboardInterrupt:
        hook.remove()
    return model


@pytest.mark.parametrize("use", ["encoder-decoder", "router", "predicted", "confident", "olmoe"])
def test_a_dropped_model_gives_its_memory_back_at_once(folders, use):
    """Not when the cycle collector comes by."""
    gc.collect()
    gc.disable()
    try:
        model = used(folders, use)
        runtime, closing = weakref.ref(model.sida), model.sida._finalizer
        assert closing.alive
        del model
        assert runtime() is None
        assert not closing.alive  # lanes have ended, slots are given back
    finally:
        gc.enable()
