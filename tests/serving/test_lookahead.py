"""The lookahead that is picked: from what memory holds, what a batch wants and the rates that were measured."""

from __future__ import annotations

import pytest
import torch

import sida_ext
from sida_ext.experts.read_plan import ReadPlan
from sida_ext.serving.lookahead import choose_lookahead
from tests.support.predictors import ByToken

SLOW_DISK = (1e9, 30e9)


@pytest.mark.parametrize(
    ("slots", "wanted", "batches"),
    [(77, 159, 4), (230, 159, 4), (384, 159, 6), (538, 159, 11), (767, 159, 16), (384, 30, 16), (384, 768, 4)],
)
def test_the_tables_name_what_memory_holds(slots, wanted, batches):
    assert choose_lookahead(slots, 768, wanted, *SLOW_DISK).batches == batches


def test_it_grows_with_memory_and_falls_with_what_a_batch_wants():
    grown = [choose_lookahead(slots, 768, 120, *SLOW_DISK).batches for slots in range(1, 768)]
    assert grown == sorted(grown)
    fallen = [choose_lookahead(500, 768, wanted, *SLOW_DISK).batches for wanted in range(1, 769)]
    assert fallen == sorted(fallen, reverse=True)


@pytest.mark.parametrize(
    ("slots", "wanted", "rates", "why"),
    [
        (768, 100, SLOW_DISK, "all experts fit"),
        (600, 100, (30e9, 30e9), "reads hide behind the computation"),
        (600, 0, SLOW_DISK, "wants no expert"),
    ],
)
def test_where_a_longer_one_gains_nothing_it_is_the_default(slots, wanted, rates, why):
    found = choose_lookahead(slots, 768, wanted, *rates)
    assert found.batches == 4
    assert why in found.why


def test_without_rates_the_disk_is_taken_to_be_the_slower_one():
    found = choose_lookahead(600, 768, 100, 0, 0)
    assert found.batches == choose_lookahead(600, 768, 100, *SLOW_DISK).batches > 4
    assert "not measured" in found.why


@pytest.mark.parametrize("order", ["given", "overlap"])
def test_a_stream_picks_it_from_its_first_batch(folder, monkeypatch, order):
    model = sida_ext.from_pretrained(folder, expert_dtype="float32", expert_memory="75%")
    model.sida.read_plan = ReadPlan(2, 0, "", *SLOW_DISK)
    given = [{"input_ids": torch.arange(2, 14)[None]} for _ in range(24)]
    under_way, most = set(), [0]
    announce, retire = model.sida.announce, model.sida.retire

    def announced(wanted):
        under_way.add(number := announce(wanted))
        most[0] = max(most[0], len(under_way))
        return number

    def retired(number):
        under_way.discard(number)
        retire(number)

    monkeypatch.setattr(model.sida, "announce", announced)
    monkeypatch.setattr(model.sida, "retire", retired)
    assert model.sida.lookahead is None
    stream = sida_ext.stream(model, given, ByToken(2), lookahead="auto", order=order)
    with torch.no_grad():
        plain = model(**given[0]).last_hidden_state
    for output in stream:
        assert torch.equal(output.last_hidden_state, plain)
    picked = model.sida.lookahead
    assert picked == choose_lookahead(12, 16, 4, *SLOW_DISK)
    assert picked.batches > 4
    assert most[0] <= picked.batches + 1
    model.sida.close()


def test_words_other_than_auto_are_refused(folder):
    model = sida_ext.from_pretrained(folder, expert_memory="75%")
    with pytest.raises(ValueError, match="lookahead is 'much', expected a number of batches of at least 1, or 'auto'"):
        sida_ext.stream(model, [], ByToken(2), lookahead="much")
    model.sida.close()
