"""What shares experts comes together: the grouping, and bytes saved on prompts of two domains."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from transformers import OlmoeConfig, OlmoeForCausalLM

import sida_ext
from sida_ext import HashTable, batches_by_tokens, stream_by_tokens
from sida_ext.serving.language import likelihoods
from sida_ext.serving.overlap import bits_of, experts_wanted, grouped, most_alike
from sida_ext.serving.savings import watch_order
from sida_ext.serving.token_batches import rows_of

EXPERTS, LAYERS, VOCABULARY = 16, 3, 128


def rows(lengths):
    return [(position, torch.full((length,), position)) for position, length in enumerate(lengths)]


def positions(batches):
    return [[position for position, _ in batch] for batch in batches]


def test_bits_stand_for_a_layer_and_an_expert():
    assert bits_of([[0, 2], [], [1]], 4) == 0b0010_0000_0101


def test_the_most_alike_is_the_one_with_the_largest_share_in_common():
    assert most_alike(0b1100, [0b1111, 0b1100, 0b0011, 0b1100]) == 1  # the first of equals
    assert most_alike(0, [0b11, 0b01]) == 0
    assert most_alike(0b1, [0b0, 0b11]) == 1


def test_rows_of_the_same_experts_come_into_one_batch():
    wanted = {position: 0b1111 if position % 2 else 0b11110000 for position in range(8)}
    found = grouped(rows([5] * 8), wanted, max_tokens=20)
    assert sorted(map(sorted, positions(found))) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert sorted(map(sorted, positions(grouped(rows([5] * 8), wanted, rows_at_most=2)))) == [
        [0, 2],
        [1, 3],
        [4, 6],
        [5, 7],
    ]


def test_batches_keep_their_bounds_and_every_row():
    draw = random.Random(0)
    for _ in range(50):
        lengths = [draw.randint(1, 40) for _ in range(draw.randint(0, 30))]
        wanted = {position: draw.getrandbits(24) for position in range(len(lengths))}
        most, count = draw.choice([1, 30, 100, None]), draw.choice([1, 3, None])
        found = grouped(rows(lengths), wanted, most, count)
        assert sorted(itertools.chain.from_iterable(positions(found))) == list(range(len(lengths)))
        for batch in found:
            sizes = [len(ids) for _, ids in batch]
            assert most is None or len(batch) == 1 or len(batch) * max(sizes) <= most
            assert count is None or len(batch) <= count
            assert min(sizes) * 2 >= max(sizes)
        assert positions(grouped(rows(lengths), wanted, most, count)) == positions(found)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A decoder-only model of two domains: even token ids want the first half of the experts, odd ones the others."""
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    model = OlmoeForCausalLM(config).eval()
    domain = torch.arange(VOCABULARY) % 2
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "gate.weight" not in name:
                parameter.mul_(0.1)
        model.model.embed_tokens.weight.copy_(torch.randn(VOCABULARY, 32))
        model.model.embed_tokens.weight[:, 0] = 8.0 * (2.0 * domain - 1)
        for layer in model.model.layers:
            layer.mlp.gate.weight.copy_(torch.randn(EXPERTS, 32))
            layer.mlp.gate.weight[:, 0] = torch.where(torch.arange(EXPERTS) < EXPERTS // 2, -4.0, 4.0)
    path = tmp_path_factory.mktemp("two_domains")
    model.save_pretrained(path)
    return path


@pytest.fixture
def model(folder):
    model = sida_ext.from_pretrained(folder, expert_dtype="float32", expert_memory="25%")
    yield model
    model.sida.close()


class Oracle:
    """The routing of transformers' own model; padding, which is routed too, is named as well."""

    candidates = 2

    def __init__(self, folder):
        self.reference = OlmoeForCausalLM.from_pretrained(folder).eval()

    def predict(self, input_ids, attention_mask=None, top_k=1):
        with torch.no_grad():
            logits = self.reference(input_ids, attention_mask, output_router_logits=True, use_cache=False).router_logits
        index = torch.stack([layer.topk(2, -1).indices.reshape(*input_ids.shape, 2) for layer in logits], dim=2)
        return HashTable(index, torch.ones(index.shape), torch.ones(index.shape))


def prompts(count, seed=1):
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        domain = draw.randrange(2)
        found.append([2 * draw.randrange(1, VOCABULARY // 2) + domain for _ in range(draw.randint(8, 12))])
    return found


def read(model, predictor, order, given):
    model.sida.reset_stats()
    with watch_order(model) as watch:
        outputs = list(stream_by_tokens(model, given, predictor, order=order, max_tokens=48, window=64))
    domains = [len({ids.item() % 2 for ids in batch.flatten() if ids}) for batch in watch.run]
    return outputs, model.sida.stats().bytes_read, domains


def test_prompts_of_two_domains_are_read_for_once(model, folder):
    given, oracle = prompts(64), Oracle(folder)
    plain, before, mixed = read(model, oracle, "given", given)
    ordered, after, pure = read(model, oracle, "overlap", given)
    assert len(plain) == len(ordered) == 64
    assert sum(domains == 2 for domains in mixed) > len(mixed) / 2
    assert sum(domains == 2 for domains in pure) <= 2
    assert after < 0.8 * before


def test_outputs_are_their_batches_bit_for_bit_in_the_callers_order(model, folder):
    given, oracle = prompts(24), Oracle(folder)
    expected = {}
    formed = list(batches_by_tokens(given, 48, 64, wanted=experts_wanted(model, oracle)))
    with torch.no_grad():
        for batch in formed:
            for position, row in zip(batch.positions, rows_of(model(**batch, use_cache=False), batch), strict=True):
                expected[position] = row.logits
    outputs = list(stream_by_tokens(model, given, oracle, order="overlap", max_tokens=48, window=64))
    for position, output in enumerate(outputs):
        assert output.logits.shape == (1, len(given[position]), VOCABULARY)
        assert torch.equal(output.logits, expected[position])


def test_scores_come_in_the_callers_order_whatever_batches_were_formed(model, folder):
    given, oracle = prompts(24), Oracle(folder)
    alone = list(likelihoods(model, given))
    found = list(likelihoods(model, given, oracle, batch_size=4, order="overlap"))
    assert [count for _, count in found] == [count for _, count in alone]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in alone], abs=1e-3)


@pytest.mark.parametrize(("batch_size", "calls"), [(1, 12), (4, 12 + 3)])
def test_texts_that_run_alone_are_predicted_once(model, folder, batch_size, calls):
    class Counting(Oracle):
        calls = 0

        def predict(self, input_ids, attention_mask=None, top_k=1):
            self.calls += 1
            return super().predict(input_ids, attention_mask, top_k)

    oracle, given = Counting(folder), [ids[:8] for ids in prompts(12)]
    assert len(list(likelihoods(model, given, oracle, batch_size=batch_size, order="overlap"))) == 12
    assert oracle.calls == calls


def test_a_wider_window_finds_more_that_are_alike(model, folder):
    given, oracle = [{"input_ids": torch.tensor([ids]), "use_cache": False} for ids in prompts(40)], Oracle(folder)
    bytes_read = {}
    for window in (1, 12):
        with watch_order(model) as watch:
            for _ in sida_ext.stream(model, watch.batches(given), oracle, 1, "overlap", window=window):
                pass
        bytes_read[window] = watch.savings(1).run_bytes
        turns = sum(int(a[0, 0] % 2 != b[0, 0] % 2) for a, b in zip(watch.run, watch.run[1:], strict=False))
        if window == 12:
            assert turns <= 6
    assert bytes_read[12] < bytes_read[1]


@pytest.mark.parametrize("wrong", [0, True, 2.5])
def test_a_window_that_holds_nothing_is_refused(model, folder, wrong):
    with pytest.raises(ValueError, match=r"window is .*, expected a number of batches of at least 1, or None"):
        sida_ext.stream(model, [], Oracle(folder), window=wrong)


def test_wanted_must_be_a_function():
    with pytest.raises(TypeError, match="wanted is int, expected a function"):
        batches_by_tokens([[1]], 10, wanted=3)
