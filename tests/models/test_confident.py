"""routing="confident": the table where its probability reaches the threshold, the router elsewhere."""

from __future__ import annotations

import re

import pytest
import torch
from torch.nn import functional as F
from transformers import SwitchTransformersEncoderModel
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersTop1Router

import sida_ext
from sida_ext import HashPredictor, HashTable
from sida_ext.training.routing_curve import routing_curve
from sida_ext.training.traces import collect_traces
from tests.support.reference import build, small_config

EXPERTS, LAYERS = 8, 2


class Scattered:
    """Any expert with any probability, the same for the same tokens; padding has none."""

    def __init__(self, calibrated: bool = True) -> None:
        self.calibrated = calibrated

    def predict(self, input_ids, attention_mask=None, top_k=1):
        random = torch.Generator().manual_seed(int(input_ids.sum()))
        shape = (*input_ids.shape, LAYERS, 1)
        index = torch.randint(0, EXPERTS, shape, generator=random)
        gate, probability = torch.rand(shape, generator=random), torch.rand(shape, generator=random)
        if attention_mask is not None:
            padding = (attention_mask == 0)[:, :, None, None]
            index = index.masked_fill(padding, -1)
            gate, probability = gate.masked_fill(padding, 0.0), probability.masked_fill(padding, 0.0)
        return HashTable(index, gate, probability if self.calibrated else None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("encoder")
    # So small a capacity that some tokens are over it.
    build(SwitchTransformersEncoderModel, small_config(expert_capacity=3)).save_pretrained(path)
    return path


def batches():
    random = torch.Generator().manual_seed(5)
    given = []
    for length in (1, 9, 14):
        mask = torch.ones(3, length, dtype=torch.int64)
        mask[0, length // 2 :] = 0
        mask[2] = 0  # a row of padding alone
        given.append({"input_ids": torch.randint(2, 97, (3, length), generator=random) * mask, "attention_mask": mask})
    return given


def served(folder, routing, predictor, **arguments):
    model = sida_ext.from_pretrained(
        folder, expert_dtype="float32", expert_memory="40%", routing=routing, predictor=predictor, **arguments
    )
    streamed = [output.last_hidden_state for output in sida_ext.stream(model, batches())]
    with torch.no_grad():
        called = [model(**batch).last_hidden_state for batch in batches()]
    model.sida.close()
    assert all(torch.equal(a, b) for a, b in zip(streamed, called, strict=True))
    return streamed


def plain(folder, predictor, threshold):
    """transformers' own modules, with every router's decision replaced, token by token, by the table's where sure."""
    model = SwitchTransformersEncoderModel.from_pretrained(folder).eval()
    routers = [m for m in model.modules() if isinstance(m, SwitchTransformersTop1Router)]
    out = []
    for batch in batches():
        table = predictor.predict(**batch)
        for layer, router in enumerate(routers):

            def forward(hidden, layer=layer, router=router, table=table):
                mask, gate, logits = SwitchTransformersTop1Router.forward(router, hidden)
                mask, gate = mask.clone(), gate.clone()
                for row in range(hidden.shape[0]):
                    for token in range(hidden.shape[1]):
                        place = (row, token, layer, 0)
                        sure = (table.gate if table.probability is None else table.probability)[place]
                        if sure < threshold:
                            continue
                        expert = int(table.expert_index[place])
                        mask[row, token] = 0 if expert < 0 else F.one_hot(torch.tensor(expert), EXPERTS)
                        gate[row, token] = table.gate[place]
                return mask, gate, logits

            router.forward = forward
        with torch.no_grad():
            out.append(model(**batch).last_hidden_state)
    return out


@pytest.mark.parametrize("calibrated", [True, False])
@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.9])
def test_confident_routing_is_its_definition(folder, threshold, calibrated):
    predictor = Scattered(calibrated)
    found = served(folder, "confident", predictor, confidence=threshold)
    for ours, theirs in zip(found, plain(folder, predictor, threshold), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("threshold", "same_as"), [(1.5, "router"), (0, "predicted")])
def test_the_ends_of_the_threshold_are_the_other_routings_bit_for_bit(folder, threshold, same_as):
    found = served(folder, "confident", Scattered(), confidence=threshold)
    expected = served(folder, same_as, Scattered())
    other = served(folder, "confident", Scattered(), confidence=0.5)
    for ours, theirs, between in zip(found, expected, other, strict=True):
        assert torch.equal(ours, theirs)
        assert not torch.equal(ours, between)


def test_confident_routing_says_what_it_needs(folder):
    with pytest.raises(ValueError, match="confidence is -1"):
        sida_ext.from_pretrained(folder, routing="confident", confidence=-1)
    with pytest.raises(ValueError, match="confidence is nan"):
        sida_ext.from_pretrained(folder, routing="confident", confidence=float("nan"))
    model = sida_ext.from_pretrained(folder, expert_memory="40%", routing="confident")
    with pytest.raises(ValueError, match="routing='confident' needs a predictor"):
        sida_ext.stream(model, batches())
    with pytest.raises(RuntimeError, match="routing='confident' needs the batch's hash table"):
        model(**batches()[0])
    model.sida.close()


def test_swap_experts_takes_the_same_arguments():
    model = build(SwitchTransformersEncoderModel, small_config())
    sida_ext.swap_experts(model, expert_dtype="float32", routing="confident", confidence=0.3, predictor=Scattered())
    assert len(list(sida_ext.stream(model, batches()))) == 3
    assert {layer.confidence for layer in model.modules() if hasattr(layer, "confidence")} == {0.3}
    model.sida.close()


@pytest.mark.parametrize("swapped", [False, True])
def test_the_reports_curve_is_what_serving_does(folder, swapped):
    reference = SwitchTransformersEncoderModel.from_pretrained(folder).eval()
    model = sida_ext.from_pretrained(folder, expert_dtype="float32") if swapped else reference
    random = torch.Generator().manual_seed(2)
    given = [{"input_ids": torch.randint(2, 97, (1, length), generator=random)} for length in (6, 12, 9)]
    traces = list(collect_traces(reference, given))
    predictor, thresholds = Scattered(), (0.0, 0.4, 1.5)
    # The traces come from the model while its routers are replaced.
    curve = routing_curve(predictor, model, collect_traces(model, given), thresholds=thresholds)
    with torch.no_grad():
        true = [reference(**batch).last_hidden_state for batch in given]
    for point, threshold in zip(curve, thresholds, strict=True):
        served = sida_ext.from_pretrained(
            folder, expert_dtype="float32", routing="confident", confidence=threshold, predictor=predictor
        )
        with torch.no_grad():
            found = [served(**batch).last_hidden_state for batch in given]
        served.sida.close()
        error = sum(float((a - b).square().sum()) for a, b in zip(found, true, strict=True))
        expected = (error / sum(float(b.square().sum()) for b in true)) ** 0.5
        assert abs(point["output_error"] - expected) < 1e-4
        assert "same_class" not in point  # no classifier
    # Counted by hand: what the router wanted and the table did not name.
    demanded = 0
    for trace, batch in zip(traces, given, strict=True):
        table = predictor.predict(**batch)
        for layer in range(LAYERS):
            demanded += len(set(trace.top1[:, layer].tolist()) - set(table.experts_of(layer)))
    assert curve[0]["demanded"] == 0
    assert curve[0]["transfers_saved"] == 1
    assert 0 < curve[1]["by_table"] < 1
    # Over capacity the router sends a token nowhere, so it can want less than its first choices.
    assert 0 < curve[-1]["demanded"] <= demanded / 3
    if swapped:
        model.sida.close()
    with torch.no_grad():
        assert torch.equal(reference(**given[0]).last_hidden_state, true[0])  # the routers are themselves again
    with pytest.raises(ValueError, match="expected the last to be above 1"):
        routing_curve(predictor, reference, traces, thresholds=(0.5,))


@pytest.mark.parametrize("routing", ["router", "predicted", "confident"])
def test_odd_sentences_are_served_under_every_routing(folder, routing):
    """One token, 512 tokens, a row and a batch of padding alone, an unknown id."""
    reference = SwitchTransformersEncoderModel.from_pretrained(folder).eval()
    predictor = HashPredictor.for_model(reference).eval()
    random = torch.Generator().manual_seed(8)
    long = torch.randint(2, 97, (1, 512), generator=random)
    row = torch.tensor([[1] * 5, [0] * 5])
    given = [
        {"input_ids": torch.tensor([[7]])},
        {"input_ids": long},
        {"input_ids": long[:, :10].view(2, 5), "attention_mask": row},
        {"input_ids": torch.zeros(2, 5, dtype=torch.int64), "attention_mask": torch.zeros(2, 5, dtype=torch.int64)},
    ]
    model = sida_ext.from_pretrained(folder, expert_dtype="float32", expert_memory="40%", routing=routing)
    streamed = list(sida_ext.stream(model, given, predictor))
    for batch, output in zip(given, streamed, strict=True):
        assert output.last_hidden_state.shape[:2] == batch["input_ids"].shape
        assert bool(torch.isfinite(output.last_hidden_state).all())
        if routing == "router":
            with torch.no_grad():
                true = reference(**batch).last_hidden_state
            torch.testing.assert_close(output.last_hidden_state, true, rtol=0, atol=2e-4)
    with pytest.raises(ValueError, match=r"input_ids\[0, 1\] is 97; the model knows tokens 0..96"):
        list(sida_ext.stream(model, [{"input_ids": torch.tensor([[5, 97]])}], predictor))
    model.sida.close()


@pytest.mark.parametrize("routing", ["router", "predicted", "confident"])
def test_nan_goes_where_it_goes_in_the_reference(folder, routing):
    """A weight that is NaN in front of the first MoE layer: its rows are NaN, and nothing hangs or is made up."""
    reference = SwitchTransformersEncoderModel.from_pretrained(folder).eval()
    predictor = HashPredictor.for_model(reference).eval()
    model = sida_ext.from_pretrained(folder, expert_dtype="float32", expert_memory="40%", routing=routing)
    for each in (reference, model):
        each.encoder.block[0].layer[0].SelfAttention.o.weight.data[0, 0] = float("nan")
    batch = {"input_ids": torch.tensor([[5, 6, 7, 8]])}
    with torch.no_grad():
        expected = reference(**batch).last_hidden_state.isnan()
    assert expected.any()
    (output,) = sida_ext.stream(model, [batch], predictor)
    assert torch.equal(output.last_hidden_state.isnan(), expected)
    model.sida.close()


@pytest.mark.parametrize("routing", ["router", "predicted", "confident"])
def test_a_sentence_of_no_token_is_what_it_is_without_us(folder, routing):
    """transformers' own model answers, or says what it says; the next batch is served either way."""
    reference = SwitchTransformersEncoderModel.from_pretrained(folder).eval()
    predictor = HashPredictor.for_model(reference).eval()
    model = sida_ext.from_pretrained(folder, expert_dtype="float32", expert_memory="40%", routing=routing)
    empty = {"input_ids": torch.zeros(1, 0, dtype=torch.int64)}
    try:
        with torch.no_grad():
            expected = reference(**empty).last_hidden_state.shape
    except RuntimeError as error:
        with pytest.raises(RuntimeError, match=re.escape(str(error)[:40])):
            list(sida_ext.stream(model, [empty], predictor))
    else:
        (output,) = sida_ext.stream(model, [empty], predictor)
        assert output.last_hidden_state.shape == expected
    (output,) = sida_ext.stream(model, [{"input_ids": torch.tensor([[5, 6]])}], predictor)
    assert bool(torch.isfinite(output.last_hidden_state).all())
    model.sida.close()
