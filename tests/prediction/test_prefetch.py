"""What stream reads ahead, and its watch over the predictor's hits."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import SwitchTransformersEncoderModel

import sida_ext
from sida_ext import HashPredictor, HashTable
from sida_ext.prediction.drift import DriftWarning, DriftWatch
from sida_ext.prediction.moe_facts import stack_facts
from sida_ext.prediction.prefetch import CANDIDATES, PrefetchPolicy

EXPERTS, LAYERS = 8, 2


def random_table(seed, candidates=3, calibrated=True, padding=False):
    random = torch.Generator().manual_seed(seed)
    index = torch.stack([torch.randperm(EXPERTS, generator=random) for _ in range(10)])[:, :candidates]
    index = index.reshape(1, 5, LAYERS, candidates).clone()
    probability = torch.rand(1, 5, LAYERS, EXPERTS, generator=random).pow(4)
    probability = (probability / probability.sum(-1, keepdim=True)).sort(-1, descending=True).values[..., :candidates]
    index[0, 4], probability[0, 4] = -1, 0.0
    need = torch.rand(LAYERS, EXPERTS, generator=random) if padding else None
    return HashTable(index, probability * 0.5, probability if calibrated else None, need)


def worth_it(table, layer, policy):
    """Expert -> expected gain of reading it ahead, from the definition, one candidate after the other."""
    gain = {}
    for expert in range(EXPERTS):
        unwanted = 1.0
        for token in range(table.sequence_length):
            index = table.expert_index[0, token, layer].tolist()
            p = table.probability[0, token, layer].tolist()
            if policy.routing == "confident" and p[0] >= policy.confidence:
                p = [1.0] + [0.0] * (len(p) - 1)
            unwanted *= 1 - sum(q for e, q in zip(index, p, strict=True) if e == expert)
        if table.padding_need is not None:
            unwanted *= 1 - float(table.padding_need[layer, expert])
        gain[expert] = (1 - unwanted) - unwanted * policy.waste_cost
    return gain


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    waste_cost=st.floats(0.01, 20),
    routing=st.sampled_from(["router", "confident"]),
    padding=st.booleans(),
)
def test_what_is_read_ahead_is_what_gains(seed, waste_cost, routing, padding):
    table, policy = random_table(seed, padding=padding), PrefetchPolicy(waste_cost, routing, confidence=0.6)
    for layer in range(LAYERS):
        found, gain = policy.experts(table, layer), worth_it(table, layer, policy)
        assert len(found) == len(set(found))
        for expert in range(EXPERTS):
            if abs(gain[expert]) > 1e-5:
                assert (expert in found) == (gain[expert] > 0), (expert, gain[expert])


def test_first_choices_alone_where_probabilities_are_not_known_or_do_not_matter():
    table = random_table(3)
    firsts = [set(table.expert_index[0, :4, layer, 0].tolist()) for layer in range(LAYERS)]
    for policy, asked in (
        (PrefetchPolicy(), random_table(3, calibrated=False)),
        (PrefetchPolicy(routing="predicted"), table),
        (PrefetchPolicy(routing="confident", confidence=0.0), table),
    ):
        assert [set(policy.experts(asked, layer)) for layer in range(LAYERS)] == firsts


@pytest.mark.parametrize("waste_cost", [-0.1, float("nan"), float("inf"), True, "cheap"])
def test_a_cost_that_is_none_is_refused(waste_cost):
    with pytest.raises(ValueError, match="waste_cost is"):
        PrefetchPolicy(waste_cost)


@pytest.mark.parametrize(
    ("need", "error", "says"),
    [
        (torch.zeros(3, EXPERTS), ValueError, r"padding_need has shape \(3, 8\)"),
        (torch.full((LAYERS, EXPERTS), float("nan")), ValueError, "padding_need holds nan"),
        (torch.zeros(LAYERS, EXPERTS, dtype=torch.float64), TypeError, "padding_need is a torch.float64"),
    ],
)
def test_a_wrong_padding_need_is_refused(need, error, says):
    table = random_table(0)
    with pytest.raises(error, match=says):
        HashTable(table.expert_index, table.gate, None, need)


def batches(count, length=20):
    random = torch.Generator().manual_seed(3)
    return [{"input_ids": torch.randint(2, 97, (2, length), generator=random)} for _ in range(count)]


def test_a_shadow_knows_what_padding_wants_of_the_first_layer(folder):
    model = SwitchTransformersEncoderModel.from_pretrained(folder).eval()
    predictor = HashPredictor.for_model(model).eval()
    input_ids = torch.randint(2, 97, (3, 12), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(12) < torch.tensor([[12], [7], [3]])).long()
    input_ids = input_ids * mask
    table = predictor.predict(input_ids, mask)
    with torch.no_grad():
        logits = model(input_ids, mask, output_router_logits=True).router_logits[0]
    true = logits[mask == 0].softmax(-1).amax(0)
    torch.testing.assert_close(table.padding_need[0], true, rtol=0, atol=1e-4)
    assert predictor.predict(input_ids[:1]).padding_need is None
    assert set(PrefetchPolicy(0.0).experts(table, 0)) == set(range(EXPERTS))


def test_stream_announces_what_the_policy_says(folder, monkeypatch):
    class Sure:
        """Expert 0 certainly, 1 perhaps, 2 hardly; asked for as many candidates as are weighed."""

        def predict(self, input_ids, attention_mask=None, top_k=1):
            assert top_k == min(CANDIDATES, EXPERTS)
            index = torch.arange(3).expand(*input_ids.shape, LAYERS, 3)
            probability = torch.tensor([1.0, 0.0, 0.0]).repeat(*input_ids.shape, LAYERS, 1)
            probability[0, 0] = torch.tensor([0.5, 0.4, 0.1])
            return HashTable(index, probability, probability)

    for waste_cost, expected in ((1.0, [0]), (0.4, [0, 1]), (0.05, [0, 1, 2])):
        model = sida_ext.from_pretrained(folder, expert_memory="50%")
        announced = []
        announce = model.sida.announce
        monkeypatch.setattr(model.sida, "announce", lambda w, a=announce, k=announced: k.append(w) or a(w))
        list(sida_ext.stream(model, batches(2), Sure(), waste_cost=waste_cost))
        model.sida.close()
        assert [list(w.values()) for w in announced] == [[expected] * LAYERS] * 2
    model = sida_ext.from_pretrained(folder, expert_memory="50%")
    with pytest.raises(ValueError, match="waste_cost is -1"):
        sida_ext.stream(model, batches(1), Sure(), waste_cost=-1)
    model.sida.close()


class Reported:
    """Names expert 3 for everything, or what the router says; its report promises 90 %."""

    held_out_top1 = 0.9

    def __init__(self, folder, right):
        self.stack = stack_facts(SwitchTransformersEncoderModel.from_pretrained(folder).eval()).stack
        self.right = right

    def predict(self, input_ids, attention_mask=None, top_k=1):
        with torch.no_grad():
            logits = self.stack(input_ids=input_ids, output_router_logits=True).router_logits
        gate, index = torch.stack(logits, dim=2).softmax(-1).max(-1, keepdim=True)
        return HashTable(index if self.right else torch.full_like(index, 3), gate)


@pytest.mark.parametrize("routing", ["router", "confident"])
def test_drift_in_a_stream_is_warned_of_once_and_names_the_command(folder, routing):
    def run(right, count=110, **arguments):
        arguments["waste_cost"] = 0.0  # this predictor is the model, and takes its time: judged, it would rest
        predictor = Reported(folder, right)
        model = sida_ext.from_pretrained(
            folder, expert_memory="100%", routing=routing, confidence=2.0, predictor=predictor
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            # Two streams, so that the window of 4096 tokens fills over both.
            for part in (batches(count // 2), batches(count - count // 2)):
                list(sida_ext.stream(model, part, **arguments))
        model.sida.close()
        return [str(w.message) for w in caught if issubclass(w.category, DriftWarning)]

    (said,) = run(right=False)
    assert "tokens; its report says 90.0%" in said
    assert f"sida train {folder} TEXT... -o PREDICTOR" in said
    assert run(right=True) == []
    assert run(right=False, drift=False) == []
    assert len(run(right=False, count=4, drift=DriftWatch(0.9, window=50))) == 1


def test_predicted_routing_asks_no_router_and_is_not_watched(folder):
    model = sida_ext.from_pretrained(folder, routing="predicted", predictor=Reported(folder, right=False))
    watch = DriftWatch(0.9, window=10)
    list(sida_ext.stream(model, batches(2), drift=watch))
    model.sida.close()
    assert watch.rate is None
