"""Batches by tokens, results in the caller's order, and what another order of batches saves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import SwitchTransformersEncoderModel

import sida_ext
from sida_ext import SwitchTransformersForSequenceClassification, batches_by_tokens, stream_by_tokens
from sida_ext.serving.overlap import experts_wanted
from sida_ext.serving.savings import watch_order
from sida_ext.serving.token_batches import rows_of
from tests.support.predictors import ByToken
from tests.support.reference import build, small_config

LENGTHS = [5, 40, 1, 17, 17, 3, 90, 2, 23, 9, 9, 30]


def sequences(lengths=tuple(LENGTHS)):
    random = torch.Generator().manual_seed(7)
    return [torch.randint(2, 97, (length,), generator=random) for length in lengths]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("encoder")
    build(SwitchTransformersEncoderModel, small_config(expert_capacity=4)).save_pretrained(path)
    return path


@pytest.fixture
def model(folder):
    model = sida_ext.from_pretrained(folder, expert_dtype="float32", expert_memory="25%")
    yield model
    model.sida.close()


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), max_size=40),
    max_tokens=st.integers(1, 120),
    window=st.integers(1, 50),
)
def test_every_sequence_is_in_one_batch_and_no_batch_is_too_large(lengths, max_tokens, window):
    given = sequences(lengths)
    found: dict[int, list[int]] = {}
    firsts = []
    for batch in batches_by_tokens(given, max_tokens, window, pad_token_id=1):
        ids, mask = batch["input_ids"], batch["attention_mask"]
        assert ids.numel() <= max_tokens or len(batch.positions) == 1
        assert max(batch.positions) // window == min(batch.positions) // window
        firsts.append(batch.positions[0])
        for row, position in enumerate(batch.positions):
            assert position not in found
            found[position] = ids[row][mask[row].bool()].tolist()
            assert (ids[row][~mask[row].bool()] == 1).all()
            assert mask[row].diff().le(0).all()  # padded on the right
    assert firsts == sorted(firsts)
    assert [found[i] for i in range(len(given))] == [ids.tolist() for ids in given]


def test_sequences_of_similar_length_share_a_batch():
    lengths = [3, 50, 4, 49, 3, 50]
    batches = list(batches_by_tokens(sequences(lengths), 150))
    assert [batch.positions for batch in batches] == [(0, 2, 4), (1, 3, 5)]
    padded = sum(batch["input_ids"].numel() for batch in batches)
    assert padded == 12 + 150


def test_inputs_are_taken_a_window_at_a_time():
    taken = []

    def given():
        for ids in sequences():
            taken.append(ids)
            yield ids

    batches = batches_by_tokens(given(), 64, window=4)
    next(batches)
    assert len(taken) == 4


def test_kinds_of_input():
    kinds = [
        [3, 4, 5],
        torch.tensor([[3, 4, 5]]),
        {"input_ids": torch.tensor([[3, 4, 5, 0]]), "attention_mask": torch.tensor([[1, 1, 1, 0]])},
        "a text",
    ]
    (batch,) = batches_by_tokens(kinds, 100, tokenizer=lambda text: {"input_ids": [3, 4, 5]})
    assert batch["input_ids"].tolist() == [[3, 4, 5]] * 4
    assert batch["input_ids"].dtype == torch.int64


@pytest.mark.parametrize(
    ("given", "changes", "message"),
    [
        ([[1]], {"max_tokens": 0}, "max_tokens is 0"),
        ([[1]], {"window": 1.5}, "window is 1.5"),
        ([[1], []], {}, "input 1 has no tokens"),
        ([[1.5]], {}, r"input 0 is a torch.float32 tensor of shape \(1,\)"),
        ([[[1, 2], [3, 4]]], {}, r"input 0 is a torch.int64 tensor of shape \(2, 2\)"),
        (["text"], {}, "input 0 is a text, and there is no tokenizer"),
        ([{"inputs_embeds": [1]}], {}, "input 0 has the keys inputs_embeds"),
        ([{"input_ids": [1, 2], "attention_mask": [1]}], {}, "attention_mask of 1 entries for 2 tokens"),
    ],
)
def test_bad_inputs_are_named(given, changes, message):
    with pytest.raises(ValueError, match=message):
        list(batches_by_tokens(given, **{"max_tokens": 10, **changes}))


@pytest.mark.parametrize("order", ["given", "overlap"])
@pytest.mark.parametrize("max_tokens", [1, 64, 4096])
def test_outputs_are_those_of_their_batch_bit_for_bit_in_the_callers_order(model, max_tokens, order):
    given = sequences()
    expected = {}
    wanted = experts_wanted(model, ByToken()) if order == "overlap" else None
    with torch.no_grad():
        for batch in batches_by_tokens(given, max_tokens, 5, wanted=wanted):
            for position, row in zip(batch.positions, rows_of(model(**batch), batch), strict=True):
                expected[position] = row.last_hidden_state
        if max_tokens == 1:  # one sequence at a time: the bits of the sequence alone
            for position, ids in enumerate(given):
                assert torch.equal(expected[position], model(ids[None]).last_hidden_state)
    outputs = stream_by_tokens(model, given, ByToken(), lookahead=3, order=order, max_tokens=max_tokens, window=5)
    count = 0
    for position, output in enumerate(outputs):
        assert output.last_hidden_state.shape == (1, LENGTHS[position], 24)
        assert torch.equal(output.last_hidden_state, expected[position])
        count += 1
    assert count == len(given)


def test_neighbours_and_padding_change_no_bit_of_an_moe_layer(model):
    """An expert takes tokens of each row up to its capacity; neither padding nor other rows count."""
    layer = model.encoder.block[1].layer[1].mlp
    random = torch.Generator().manual_seed(0)
    rows = [torch.randn(1, length, 24, generator=random) for length in (40, 7, 23)]
    padded = torch.zeros(3, 40, 24)
    for number, row in enumerate(rows):
        padded[number, : row.shape[1]] = row[0]
    over = 0
    with torch.no_grad():
        logits = torch.nn.functional.linear(padded.double(), layer.router.classifier.weight.double()).float()
        index, gate = torch.ops.sida.route_top1(logits, 4)
        flat = (padded.view(-1, 24), index.view(-1, 1), gate.view(-1, 1), layer.handle)
        out = torch.ops.sida.moe_layer(*flat).view(padded.shape)
        for number, row in enumerate(rows):
            length = row.shape[1]
            alone_index, alone_gate = torch.ops.sida.route_top1(logits[number : number + 1, :length].contiguous(), 4)
            assert torch.equal(index[number, :length], alone_index[0])
            alone = torch.ops.sida.moe_layer(row[0], alone_index[0, :, None], alone_gate[0, :, None], layer.handle)
            assert torch.equal(out[number, :length], alone)
            over += int((alone_index < 0).sum())
    assert over > 0  # the capacity binds


def test_outputs_are_close_to_those_of_each_sequence_alone(model):
    given = sequences()
    with torch.no_grad():
        for ids, output in zip(given, stream_by_tokens(model, given, max_tokens=128), strict=True):
            alone = model(ids[None]).last_hidden_state
            torch.testing.assert_close(output.last_hidden_state, alone, rtol=0, atol=1e-4)


def test_rows_of_every_field_that_can_be_cut(tmp_path, model):
    (batch,) = batches_by_tokens(sequences([3, 6]), 100)
    with torch.no_grad():
        output = model(**batch, output_hidden_states=True, output_router_logits=True)
    short, long = rows_of(output, batch)
    assert [state.shape[:2] for state in short.hidden_states] == [(1, 3)] * len(output.hidden_states)
    assert [layer.shape[:2] for layer in long.router_logits] == [(1, 6)] * len(output.router_logits)
    assert torch.equal(short.hidden_states[1][0], output.hidden_states[1][0, :3])
    classifier = build(SwitchTransformersForSequenceClassification, small_config(num_labels=3))
    with torch.no_grad():
        logits = classifier(**batch).logits
        assert torch.equal(rows_of(classifier(**batch), batch)[1].logits, logits[1:])
        with pytest.raises(ValueError, match="field 'loss' cannot be cut"):
            rows_of(classifier(**batch, labels=torch.tensor([0, 1])), batch)


def test_another_order_saves_reads_and_says_how_many(folder):
    """Batches that use one half of the token ids and the other in turn; a memory that holds one half's experts."""
    model = sida_ext.from_pretrained(folder, expert_dtype="float32", expert_memory="50%", routing="predicted")
    random = torch.Generator().manual_seed(1)
    given = []
    for number in range(24):
        ids = torch.randint(0, 4, (1, 12), generator=random) + 4 * (number % 2) + 8
        given.append({"input_ids": ids})
    read = {}
    for order in ("given", "overlap"):
        model.sida.set_budget("7%")
        model.sida.set_budget("50%")
        model.sida.reset_stats()
        with watch_order(model) as watch:
            outputs = list(sida_ext.stream(model, watch.batches(given), ByToken(), lookahead=4, order=order))
        read[order] = watch.savings(4)
        assert len(outputs) == 24
        assert model.encoder.block[1].layer[1].mlp.observer is None
    assert read["given"].saved_bytes == 0
    assert read["overlap"].given_bytes == read["given"].given_bytes
    assert read["overlap"].saved_bytes > 0.2 * read["overlap"].given_bytes
    model.sida.close()
