"""Predictors: hash tables, the token table, the hash predictor's padding, files and refusals."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import SwitchTransformersConfig, SwitchTransformersEncoderModel

from sida_ext.prediction.files import PREDICTOR_FILE
from sida_ext.prediction.hash_table import HashTable
from sida_ext.prediction.nets import sparsemax
from sida_ext.prediction.protocol import (
    ENTRY_POINTS,
    HashPredictor,
    Predictor,
    PredictorError,
    TokenTablePredictor,
    find_predictor,
    load_predictor,
)
from sida_ext.training.evaluation import evaluate
from sida_ext.training.traces import collect_traces

VOCABULARY, EXPERTS, LAYERS = 60, 6, 2
VARIANTS = ["paper", "shadow"]


def small_model(seed: int = 0) -> SwitchTransformersEncoderModel:
    torch.manual_seed(seed)
    config = SwitchTransformersConfig(
        vocab_size=VOCABULARY, d_model=16, d_kv=4, d_ff=32, num_layers=4, num_heads=2, num_experts=EXPERTS,
        num_sparse_encoder_layers=LAYERS, num_decoder_layers=2, is_encoder_decoder=False,
    )  # fmt: skip
    return SwitchTransformersEncoderModel(config).eval()


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors this small are slower on more threads, and much slower on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model() -> SwitchTransformersEncoderModel:
    return small_model()


@pytest.fixture(params=VARIANTS)
def predictor(request, model) -> HashPredictor:
    return HashPredictor.for_model(model, request.param, seed=3, hidden=32).eval()


def table_of(experts, probability) -> HashTable:
    """One sentence, one layer, from nested lists [S][K]."""
    index = torch.tensor(experts)[None, :, None]
    return HashTable(index, torch.tensor(probability, dtype=torch.float32)[None, :, None])


def test_experts_are_named_once_and_the_most_wanted_first():
    table = table_of([[3, 1], [1, 3], [-1, -1], [2, 1]], [[0.5, 0.4], [0.9, 0.05], [0, 0], [0.3, 0.2]])
    assert table.experts_of(0) == [1, 3, 2]
    experts, weight = table.demand(0)
    assert experts.tolist() == [1, 3, 2]
    torch.testing.assert_close(weight, torch.tensor([1.5, 0.55, 0.3]))
    experts, need = table.need(0)
    assert experts.tolist() == [1, 3, 2]
    torch.testing.assert_close(need, torch.tensor([1 - 0.6 * 0.1 * 0.8, 1 - 0.5 * 0.95, 0.3]))
    assert table.top(1).experts_of(0) == [1, 3, 2]
    assert table.experts_of(0, min_need=0.4) == [1, 3]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(0, 3), st.integers(1, 5), st.booleans())
def test_all_layers_at_once_are_each_layer(seed, rows, width, top_k, calibrated):
    random = torch.Generator().manual_seed(seed)
    shape = (rows, width, 3, top_k)
    index = torch.rand(*shape[:3], 9, generator=random).argsort(-1)[..., :top_k]
    absent = torch.rand(shape, generator=random) < 0.2
    gate, probability = (torch.rand(shape, generator=random).masked_fill(absent, 0) for _ in range(2))
    probability = torch.where(probability > 0.9, 1.0, probability)  # certain ones
    table = HashTable(index.masked_fill(absent, -1), gate, probability if calibrated else None)
    for least in (0.0, 0.3, 0.8, 1.0):
        expected = []
        for layer in range(3):
            likely, need = table.need(layer)
            enough = likely[need >= least] if least > 0 else likely
            expected.append([expert for expert in table.demand(layer)[0].tolist() if expert in enough])
        assert table.experts_by_layer(9, least) == expected
        assert [table.experts_of(layer, least) for layer in range(3)] == expected


def test_a_certain_candidate_is_needed_with_probability_one():
    assert table_of([[4], [2]], [[1.0], [0.5]]).need(0)[1].tolist() == [1.0, 0.5]


def test_calibrated_probability_decides_where_it_is_given():
    index = torch.tensor([0, 1]).view(1, 1, 1, 2)
    table = HashTable(index, torch.tensor([0.9, 0.1]).view(1, 1, 1, 2), torch.tensor([0.2, 0.8]).view(1, 1, 1, 2))
    assert table.experts_of(0) == [1, 0]


@pytest.mark.parametrize(
    ("index", "gate", "says"),
    [
        (torch.zeros(1, 2, 3, 1), torch.zeros(1, 2, 3, 1), "float32 tensor, expected an int16"),
        (torch.zeros(2, 3, 1, dtype=torch.int32), torch.zeros(2, 3, 1), r"expected \[B, S, layers, top_k\]"),
        (torch.full((1, 1, 1, 1), -2), torch.zeros(1, 1, 1, 1), "holds -2"),
        (torch.zeros(1, 1, 1, 1, dtype=torch.int64), torch.zeros(1, 1, 1, 2), r"expected expert_index's"),
        (torch.zeros(1, 1, 1, 1, dtype=torch.int64), torch.full((1, 1, 1, 1), float("nan")), "gate holds nan"),
        (torch.zeros(1, 1, 1, 1, dtype=torch.int64), torch.full((1, 1, 1, 1), 1.5), "gate holds 1.5"),
        (torch.full((1, 1, 1, 1), -1), torch.full((1, 1, 1, 1), 0.5), "not 0 where expert_index is -1"),
        (torch.zeros(1, 1, 1, 1, dtype=torch.int64), torch.zeros(1, 1, 1, 1).double(), "expected a float32 tensor"),
    ],
)
def test_a_wrong_hash_table_is_refused(index, gate, says):
    with pytest.raises((TypeError, ValueError), match=says):
        HashTable(index, gate)


def test_a_table_for_another_batch_or_model_is_refused():
    table = table_of([[3], [1]], [[0.5], [0.5]])
    table.check_for(torch.zeros(1, 2), layers=1, experts=4)
    with pytest.raises(ValueError, match=r"\(1, 2\) tokens"):
        table.check_for(torch.zeros(1, 3), layers=1, experts=4)
    with pytest.raises(ValueError, match="2 MoE layers"):
        table.check_for(torch.zeros(1, 2), layers=2, experts=4)
    with pytest.raises(ValueError, match="names expert 3"):
        table.check_for(torch.zeros(1, 2), layers=1, experts=3)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=12))
def test_sparsemax_is_the_nearest_point_of_the_simplex(values):
    scores = torch.tensor(values, dtype=torch.float64)
    result = sparsemax(scores)
    assert bool((result >= 0).all())
    assert float(result.sum()) == pytest.approx(1, abs=1e-9)
    # Optimality of the projection: score - result is one constant on the support and not above it elsewhere.
    slack = scores - result
    threshold = slack[result > 0].max()
    torch.testing.assert_close(slack[result > 0], threshold.expand(int((result > 0).sum())), atol=1e-9, rtol=0)
    assert bool((scores[result == 0] <= threshold + 1e-9).all())


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_padding_never_influences_another_position(data, model):
    variant = data.draw(st.sampled_from(VARIANTS))
    predictor = HashPredictor.for_model(model, variant, seed=1, hidden=32).eval()
    lengths = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=4))
    width = max(lengths) + data.draw(st.integers(0, 4))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    input_ids = torch.randint(0, VOCABULARY, (len(lengths), width), generator=generator)
    mask = torch.zeros_like(input_ids)
    starts = [data.draw(st.integers(0, width - n)) for n in lengths]
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        mask[row, start : start + length] = 1
    table = predictor.predict(input_ids, mask, top_k=EXPERTS)
    assert bool((table.expert_index[mask == 0] == -1).all())
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        alone = predictor(input_ids[row : row + 1, start : start + length])
        together = predictor(input_ids, mask)[row : row + 1, start : start + length]
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("width", [0, 1, 2, 512])
def test_any_length_is_predicted(predictor, model, width):
    input_ids = torch.randint(0, VOCABULARY, (2, width), generator=torch.Generator().manual_seed(0))
    for each in (predictor, TokenTablePredictor.for_model(model)):
        table = each.predict(input_ids, top_k=3)
        assert table.expert_index.shape == (2, width, LAYERS, 3)
        table.check_for(input_ids, LAYERS, EXPERTS)
        assert bool((table.probability[..., :-1] >= table.probability[..., 1:]).all())


def test_all_padding_has_no_expert(predictor, model):
    for each in (predictor, TokenTablePredictor.for_model(model)):
        table = each.predict(torch.ones(2, 5, dtype=torch.int64), torch.zeros(2, 5, dtype=torch.int64))
        assert bool((table.expert_index == -1).all())
        assert table.experts_of(0) == []


def test_gate_is_the_softmax_and_probability_the_tempered_one(predictor):
    predictor.temperature.fill_(2.0)
    input_ids = torch.tensor([[5, 6, 7]])
    logits = predictor(input_ids)
    table = predictor.predict(input_ids, top_k=2)
    best, index = logits.softmax(-1).topk(2)
    assert torch.equal(table.expert_index.long(), index)
    torch.testing.assert_close(table.gate, best)
    torch.testing.assert_close(table.probability, (logits / 2).softmax(-1).topk(2).values)


@pytest.mark.parametrize(
    ("ids", "mask", "top_k", "says"),
    [
        (torch.tensor([[-1, 2]]), None, 1, r"input_ids\[0, 0\] is -1"),
        (torch.tensor([1, 2]), None, 1, r"expected \[B, S\]"),
        (torch.tensor([[1.0, 2.0]]), None, 1, "torch.float32, expected an int32 or int64"),
        (torch.tensor([[1, 2]]), torch.tensor([[1]]), 1, "attention_mask has shape"),
        (torch.tensor([[1, 2]]), torch.tensor([[1.0, float("nan")]]), 1, "attention_mask holds nan"),
        (torch.tensor([[1, 2]]), None, 0, "top_k is 0, expected an integer in 1..6"),
        (torch.tensor([[1, 2]]), None, 7, "top_k is 7"),
    ],
)
def test_bad_input_is_named(predictor, model, ids, mask, top_k, says):
    for each in (predictor, TokenTablePredictor.for_model(model)):
        with pytest.raises((TypeError, ValueError), match=says):
            each.predict(ids, mask, top_k)


def test_an_unknown_id_under_padding_does_not_matter(predictor):
    table = predictor.predict(torch.tensor([[1, 10**6]]), torch.tensor([[1, 0]]))
    assert table.expert_index[0, 1].tolist() == [[-1]] * LAYERS


def test_damaged_weights_raise_and_do_not_guess(predictor):
    next(predictor.net.parameters()).data.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN or inf"):
        predictor.predict(torch.tensor([[1, 2]]))


def test_both_kinds_satisfy_the_protocol_and_come_back_from_disk(predictor, model, tmp_path):
    table = TokenTablePredictor.for_model(model)
    table.update(torch.tensor([[4, 5]]), torch.tensor([[[1, 2], [3, 4]]]), torch.full((1, 2, 2), 0.5))
    input_ids = torch.tensor([[4, 5, 6]])
    for number, each in enumerate((predictor, table)):
        assert isinstance(each, Predictor)
        each.save_pretrained(tmp_path / str(number))
        loaded = load_predictor(tmp_path / str(number), model)
        assert type(loaded) is type(each)
        before, after = each.predict(input_ids, top_k=2), loaded.predict(input_ids, top_k=2)
        assert torch.equal(before.expert_index, after.expert_index)
        assert torch.equal(before.gate, after.gate)


def test_the_models_embeddings_are_shared_and_not_saved(predictor, model, tmp_path):
    assert predictor.embedding.data_ptr() == model.shared.weight.data_ptr()
    assert not any("embedding" in name and "distance" not in name for name in predictor.state_dict())


def test_an_untrained_shadow_knows_the_first_moe_layer_exactly(model):
    """The first router's input depends on no expert, so a shadow of the model's width repeats it; also when cut off."""
    input_ids = torch.randint(0, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(2))
    mask = torch.tensor([[1] * 9, [1] * 5 + [0] * 4, [0] * 3 + [1] * 6])
    shadow = HashPredictor.for_model(model, "shadow").eval()
    (trace,) = collect_traces(model, [{"input_ids": input_ids, "attention_mask": mask}])
    logits = shadow(input_ids, mask)[mask == 1]
    torch.testing.assert_close(logits.softmax(-1).amax(-1)[:, 0], trace.gate[:, 0], atol=1e-5, rtol=1e-4)
    assert torch.equal(logits.argmax(-1)[:, 0], trace.top1[:, 0])


def test_a_narrow_shadow_keeps_the_models_routers(model):
    shadow = HashPredictor.for_model(model, "shadow", hidden=8)
    router = model.encoder.block[1].layer[-1].mlp.router.classifier.weight
    assert torch.equal(shadow.net.feed_forward[1].router.weight, router)


def test_a_bfloat16_copy_of_the_model_is_the_same_model(predictor, tmp_path):
    predictor.save_pretrained(tmp_path)
    HashPredictor.from_pretrained(tmp_path, small_model().to(torch.bfloat16)).predict(torch.tensor([[1, 2]]))


def test_missing_foreign_and_damaged_files_are_refused(predictor, model, tmp_path):
    with pytest.raises(PredictorError, match="there is no predictor"):
        HashPredictor.from_pretrained(tmp_path / "nowhere", model)
    predictor.save_pretrained(tmp_path)
    with pytest.raises(PredictorError, match="was trained for a model with fingerprint"):
        HashPredictor.from_pretrained(tmp_path, small_model(seed=1))
    drifted = small_model()
    drifted.encoder.block[1].layer[-1].mlp.router.classifier.weight.data[0, 0] += 1
    with pytest.raises(PredictorError, match="was trained for a model with fingerprint"):
        HashPredictor.from_pretrained(tmp_path, drifted)
    with pytest.raises(PredictorError, match="kind 'hash_predictor', expected 'token_table'"):
        TokenTablePredictor.from_pretrained(tmp_path, model)
    file = tmp_path / PREDICTOR_FILE
    good = file.read_bytes()
    for bad, says in (
        (good[:-100], "not a whole safetensors file"),
        (good[:-1] + bytes([good[-1] ^ 1]), "do not match their checksum"),
        (b"", "not a whole safetensors file"),
        (good.replace(b'\\"format_version\\": 1', b'\\"format_version\\": 9'), "format version 9"),
    ):
        assert bad != good
        file.write_bytes(bad)
        with pytest.raises(PredictorError, match=says):
            HashPredictor.from_pretrained(tmp_path, model)


def test_the_token_table_counts_and_backs_off():
    table = TokenTablePredictor(vocabulary=10, layers=1, experts=4, model_fingerprint="f", backoff=2.0)
    tokens = torch.tensor([[7, 7, 7, 3]])
    table.update(tokens, torch.tensor([[[2], [2], [1], [0]]]), torch.tensor([[[0.5], [0.7], [0.9], [0.3]]]))
    assert table.seen(torch.tensor([7, 3, 5])).tolist() == [3, 1, 0]
    marginal = (torch.tensor([1, 1, 2, 0]) + 0.25) / 5
    torch.testing.assert_close(table.probabilities(torch.tensor([5]))[0, 0], marginal)
    expected = (torch.tensor([0, 1, 2, 0]) + 2 * marginal) / 5
    torch.testing.assert_close(table.probabilities(torch.tensor([7]))[0, 0], expected)
    named = table.predict(torch.tensor([[7]]), top_k=2)
    assert named.expert_index.flatten().tolist() == [2, 1]
    torch.testing.assert_close(named.gate.flatten(), torch.tensor([0.6, 0.9]))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3), st.integers(0, 3)), max_size=30), st.integers(1, 29))
def test_counting_in_parts_is_counting_at_once(rows, cut):
    def counted(*parts):
        table = TokenTablePredictor(vocabulary=5, layers=2, experts=4, model_fingerprint="f")
        for part in parts:
            data = torch.tensor(part, dtype=torch.int64).view(-1, 3)
            table.update(data[:, 0], data[:, 1:], torch.full((len(part), 2), 0.5))
        return table.probabilities(torch.arange(5))

    whole = counted(rows)
    torch.testing.assert_close(whole.sum(-1), torch.ones(5, 2))
    torch.testing.assert_close(counted(rows[:cut], rows[cut:]), whole)


@pytest.fixture
def custom(monkeypatch):
    """examples/custom_predictor.py as an installed entry point."""
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "examples")
    points = {
        "popular": EntryPoint("popular", "custom_predictor:make", ENTRY_POINTS),
        "broken": EntryPoint("broken", "builtins:repr", ENTRY_POINTS),
    }
    monkeypatch.setattr("sida_ext.prediction.protocol.entry_points", lambda group: points.values())


def test_a_predictor_of_ones_own_plugs_in_by_name(custom):
    torch.manual_seed(0)
    config = SwitchTransformersConfig(
        vocab_size=3000, d_model=16, d_kv=4, d_ff=32, num_layers=4, num_heads=2, num_experts=EXPERTS,
        num_sparse_encoder_layers=LAYERS, num_decoder_layers=2, is_encoder_decoder=False,
    )  # fmt: skip
    model = SwitchTransformersEncoderModel(config).eval()
    popular = find_predictor("popular", model)
    input_ids = torch.randint(0, 3000, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 9, [1] * 4 + [0] * 5])
    table = popular.predict(input_ids, mask, top_k=2)
    table.check_for(input_ids, LAYERS, EXPERTS)
    assert len(table.experts_of(0)) == 2
    (trace,) = collect_traces(model, [{"input_ids": input_ids, "attention_mask": mask}])
    every = evaluate(find_predictor("popular", model), [trace]).summary()
    assert all(share > 3 / EXPERTS / 2 for share in every["top3"])


def test_a_name_that_is_nothing_says_what_there_is(custom, model):
    with pytest.raises(PredictorError, match=r"neither a folder .* \(installed: broken, popular\)"):
        find_predictor("nobody", model)
    with pytest.raises(PredictorError, match="made a str, expected an object with predict"):
        find_predictor("broken", model)
