"""stream(): order, look-ahead, errors from either thread, early ends, predicted routing; the user's own predictors."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from transformers import SwitchTransformersEncoderModel, SwitchTransformersForConditionalGeneration

import sida_ext
from sida_ext import _C, HashTable, PredictorError
from tests.support.reference import build, small_config

EXPERTS, LAYERS = 8, 2


def batches(count, batch=2, length=9):
    random = torch.Generator().manual_seed(3)
    return [{"input_ids": torch.randint(2, 97, (batch + i % 2, length + i), generator=random)} for i in range(count)]


@pytest.fixture
def model(folder):
    model = sida_ext.from_pretrained(folder, expert_dtype="float32", expert_memory="50%")
    yield model
    model.sida.close()


def true_table(reference, input_ids, attention_mask=None):
    """The routing of transformers' own model as a hash table."""
    with torch.no_grad():
        logits = reference(input_ids, attention_mask, output_router_logits=True).router_logits
    best = torch.stack([layer.softmax(-1).max(-1).indices for layer in logits], dim=2).unsqueeze(-1)
    gate = torch.stack([layer.softmax(-1).max(-1).values for layer in logits], dim=2).unsqueeze(-1)
    return HashTable(best, gate)


class Oracle:
    def __init__(self, folder):
        self.reference = SwitchTransformersEncoderModel.from_pretrained(folder).eval()

    def predict(self, input_ids, attention_mask=None, top_k=1):
        return true_table(self.reference, input_ids, attention_mask)


class Random:
    """Wrong on purpose: costs time, never accuracy."""

    def __init__(self, delay=0.0):
        self.random = torch.Generator().manual_seed(0)
        self.delay = delay
        self.calls = 0

    def predict(self, input_ids, attention_mask=None, top_k=1):
        time.sleep(self.delay)
        self.calls += 1
        index = torch.randint(0, EXPERTS, (*input_ids.shape, LAYERS, 1), generator=self.random)
        return HashTable(index, torch.full(index.shape, 0.5))


def states(outputs):
    return [output.last_hidden_state for output in outputs]


def expected(model, given):
    with torch.no_grad():
        return [model(**batch).last_hidden_state for batch in given]


def equal(left, right):
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("order", ["given", "overlap"])
@pytest.mark.parametrize("lookahead", [1, 3])
@pytest.mark.parametrize("memory", ["7%", "50%"])
def test_bits_do_not_depend_on_the_predictor(folder, memory, lookahead, order):
    model = sida_ext.from_pretrained(
        folder, expert_dtype="float32", expert_memory=memory, faults=_C.Faults(seed=1, delay_us_max=300)
    )
    given = batches(7)
    plain = expected(model, given)
    for predictor in (Oracle(folder), Random(), Random(delay=0.01)):
        assert equal(states(sida_ext.stream(model, given, predictor, lookahead, order)), plain)
    assert equal(states(sida_ext.stream(model, given)), plain)
    model.sida.close()


def test_an_oracle_leaves_no_misses_in_a_large_enough_memory(folder):
    model = sida_ext.from_pretrained(folder, expert_dtype="float32", expert_memory="100%")
    for _ in sida_ext.stream(model, batches(6), Oracle(folder)):
        pass
    stats = model.sida.stats()
    assert stats.misses == 0
    assert stats.hits + stats.late == stats.unique > 0
    assert stats.wasted_prefetches == 0
    model.sida.close()


def test_predictor_of_the_model_is_the_default(folder):
    predictor = Random()
    model = sida_ext.from_pretrained(folder, expert_memory="50%", predictor=predictor)
    assert len(list(sida_ext.stream(model, batches(3)))) == 3
    assert predictor.calls == 3
    model.sida.close()


def test_any_iterable_and_no_batches(model):
    given = batches(3)
    assert equal(states(sida_ext.stream(model, iter(given), Random())), expected(model, given))
    assert list(sida_ext.stream(model, [], Random())) == []
    assert list(sida_ext.stream(model, [])) == []


def threads_of_stream():
    return [thread for thread in threading.enumerate() if thread.name == "sida-hash-builder"]


def wait_until(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.001)
    assert condition()


@pytest.mark.parametrize("order", ["given", "overlap"])
@pytest.mark.parametrize("lookahead", [1, 3])
def test_exactly_the_lookahead_is_announced_ahead(model, monkeypatch, lookahead, order):
    taken, under_way, most = [], set(), []
    announce, retire = model.sida.announce, model.sida.retire

    def announced(wanted):
        under_way.add(number := announce(wanted))
        most.append(len(under_way))
        return number

    def retired(number):
        under_way.discard(number)  # before the queue can take another
        retire(number)

    monkeypatch.setattr(model.sida, "announce", announced)
    monkeypatch.setattr(model.sida, "retire", retired)

    def given():
        for batch in batches(12):
            taken.append(batch)
            yield batch

    window = 2 * lookahead if order == "overlap" and lookahead > 1 else lookahead
    for number, _ in enumerate(sida_ext.stream(model, given(), Random(), lookahead, order), 1):
        # The consumer holds a result: nothing computes, and the queue fills up to the look-ahead and no further.
        if order == "given":
            wait_until(lambda number=number: len(under_way) == min(lookahead, 12 - number))
            assert len(taken) <= number + lookahead
        assert len(under_way) <= lookahead
        # For a moment one is on its way from the window to the queue.
        wait_until(lambda number=number: len(taken) <= number + len(under_way) + window)
    assert max(most) <= lookahead + 1  # those that wait and the one that computes
    assert not threads_of_stream()
    assert not under_way


def test_consumer_that_leaves_early_ends_everything(model):
    given = batches(20)
    for number, output in enumerate(sida_ext.stream(model, given, Random(), lookahead=4)):
        assert output.last_hidden_state.shape[0] == given[number]["input_ids"].shape[0]
        if number == 2:
            break
    del output
    deadline = time.monotonic() + 5
    while threads_of_stream() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not threads_of_stream()
    assert equal(states(sida_ext.stream(model, given[:3], Random())), expected(model, given[:3]))


class Broken:
    def __init__(self, answer, after=2):
        self.answer, self.after, self.good = answer, after, Random()

    def predict(self, input_ids, attention_mask=None, top_k=1):
        self.after -= 1
        return self.good.predict(input_ids) if self.after >= 0 else self.answer(input_ids)


def raises(input_ids):
    raise ZeroDivisionError("a fault of the predictor's own")


def table(shape, expert=0, gate=0.5):
    return HashTable(torch.full(shape, expert), torch.full(shape, gate))


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (raises, ZeroDivisionError, "predictor's own"),
        (lambda ids: None, PredictorError, "Broken.predict returned NoneType"),
        (lambda ids: table((*ids.shape, 3, 1)), PredictorError, r"Broken.*3"),
        (lambda ids: table((1, 1, LAYERS, 1)), PredictorError, r"Broken.*\(1, 1"),
        (lambda ids: table((*ids.shape, LAYERS, 1), expert=EXPERTS), PredictorError, "8"),
        (lambda ids: table((*ids.shape, LAYERS, 1), gate=float("nan")), ValueError, "nan"),
    ],
)
def test_a_failing_predictor_is_raised_after_the_outputs_before_it(model, answer, error, message):
    given = batches(5)
    stream = sida_ext.stream(model, given, Broken(answer))
    outputs = [next(stream).last_hidden_state for _ in range(2)]
    with pytest.raises(error, match=message):
        next(stream)
    assert equal(outputs, expected(model, given[:2]))
    assert not threads_of_stream()
    assert equal(states(sida_ext.stream(model, given, Random())), expected(model, given))


def test_a_failing_iterable_is_raised(model):
    def given():
        yield batches(1)[0]
        raise OSError("the caller's file is gone")

    outputs = sida_ext.stream(model, given(), Random())
    next(outputs)
    with pytest.raises(OSError, match="file is gone"):
        next(outputs)


def test_a_failing_model_is_raised_and_the_stream_ends(model):
    given = batches(4)
    given[1] = {"input_ids": torch.full((1, 4), 7)}

    def fail(module, arguments):
        if arguments[0].shape[:2] == (1, 4):
            raise IndexError("a layer fails")

    hook = model.encoder.block[0].register_forward_pre_hook(fail)
    with pytest.raises(IndexError, match="a layer fails"):
        list(sida_ext.stream(model, given, Random()))
    hook.remove()
    assert not threads_of_stream()
    assert equal(states(sida_ext.stream(model, batches(2), Random())), expected(model, batches(2)))


def test_a_slow_predictor_meets_the_timeout(model):
    with pytest.raises(TimeoutError, match=r"0\.05 s"):
        list(sida_ext.stream(model, batches(2), Random(delay=0.5), timeout=0.05))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"order": "random"}, ValueError, "order is 'random'"),
        ({"lookahead": 0}, ValueError, "lookahead is 0"),
        ({"lookahead": 1.5}, ValueError, "lookahead is 1.5"),
        ({"predictor": object()}, TypeError, "predictor is object"),
        ({"predictor": None, "order": "overlap"}, ValueError, "needs a predictor"),
    ],
)
def test_bad_arguments(model, arguments, error, message):
    with pytest.raises(error, match=message):
        sida_ext.stream(model, batches(1), **{"predictor": Random(), **arguments})


def test_bad_batches(model):
    for given, error, message in (
        ([3], TypeError, "batch 0 is int"),
        ([{"inputs_embeds": torch.zeros(1, 2, 24)}], ValueError, "batch 0 has no input_ids"),
    ):
        with pytest.raises(error, match=message):
            list(sida_ext.stream(model, given, Random()))
    with pytest.raises(ValueError, match="no expert runtime"):
        sida_ext.stream(build(SwitchTransformersEncoderModel, small_config()), batches(1))


def test_predicted_routing_with_true_tables_is_the_model(folder):
    model = sida_ext.from_pretrained(folder, expert_dtype="float32", expert_memory="50%", routing="predicted")
    given = batches(4)
    reference = Oracle(folder)
    with torch.no_grad():
        truth = [reference.reference(**batch).last_hidden_state for batch in given]
    for output, true in zip(sida_ext.stream(model, given, reference), truth, strict=True):
        torch.testing.assert_close(output.last_hidden_state, true, rtol=0, atol=1e-4)
    with pytest.raises(RuntimeError, match="needs the batch's hash table"):
        model(**given[0])
    with pytest.raises(ValueError, match="needs a predictor"):
        sida_ext.stream(model, given)
    model.sida.close()


def test_predicted_routing_follows_the_table_not_the_router(folder):
    class Zero:
        def predict(self, input_ids, attention_mask=None, top_k=1):
            shape = (*input_ids.shape, LAYERS, 1)
            return HashTable(torch.full(shape, -1), torch.zeros(shape))

    model = sida_ext.from_pretrained(
        folder, expert_dtype="float32", expert_memory="50%", routing="predicted", predictor=Zero()
    )
    with torch.no_grad():
        for layer in model.modules():
            if type(layer).__name__ == "SparseMLP":
                layer.router.forward = None  # a call would fail
        streamed = states(sida_ext.stream(model, batches(2)))
        assert equal(streamed, expected(model, batches(2)))  # a plain call builds its own table
    assert model.sida.stats().unique == 0
    model.sida.close()


def test_encoder_decoder_streams_with_its_encoder_predicted(tmp_path):
    build(SwitchTransformersForConditionalGeneration, small_config()).save_pretrained(tmp_path)
    model = sida_ext.from_pretrained(tmp_path, expert_dtype="float32", expert_memory="50%")
    given = [batch | {"decoder_input_ids": batch["input_ids"][:, :3]} for batch in batches(3)]
    with torch.no_grad():
        plain = [model(**batch).logits for batch in given]
    assert equal([output.logits for output in sida_ext.stream(model, given, Random())], plain)
    model.sida.close()


def test_generate_with_predicted_routing_builds_its_own_table(tmp_path):
    build(SwitchTransformersForConditionalGeneration, small_config()).save_pretrained(tmp_path)
    predictor = Random()
    model = sida_ext.from_pretrained(tmp_path, expert_memory="50%", routing="predicted", predictor=predictor)
    out = model.generate(batches(1)[0]["input_ids"], max_new_tokens=4, min_new_tokens=4)
    assert out.shape[1] == 5
    assert predictor.calls == 1
    model.sida.close()


def test_a_plain_call_checks_the_table(folder):
    model = sida_ext.from_pretrained(
        folder, expert_memory="50%", routing="predicted", predictor=Broken(lambda ids: None, after=0)
    )
    with pytest.raises(PredictorError, match="returned NoneType"):
        model(**batches(1)[0])
    assert model.sida.current.table is None
    model.sida.close()


@pytest.mark.parametrize("order", ["given", "overlap"])
def test_every_batch_before_a_failure_is_computed(model, order):
    given = batches(6)
    stream = sida_ext.stream(model, given, Broken(raises, after=4), lookahead=3, order=order)
    outputs = [next(stream).last_hidden_state for _ in range(4)]
    with pytest.raises(ZeroDivisionError):
        next(stream)
    assert equal(outputs, expected(model, given[:4]))


class Resizer:
    """Changes the budget from a thread of its own, at the start of a layer or while it computes."""

    def __init__(self, model, budgets, during=False):
        self.runtime, self.budgets, self.seen, self.during = model.sida, list(budgets), [], during
        self.thread = None

    def __call__(self, name, expert_index):
        if self.during:
            self.arrived()
        if not self.budgets:
            return
        self.thread = threading.Thread(target=self.runtime.set_budget, args=(self.budgets.pop(0),))
        self.thread.start()
        if not self.during:
            self.arrived()

    def arrived(self):
        """The change is made. No layer computes, so that nothing is pinned: what is over the new budget goes when the
        reads that are under way have ended, and before this layer takes anything."""
        if self.thread is None:
            return
        self.thread.join(30)
        self.thread = None
        slots = self.runtime.slots
        wait_until(lambda: self.runtime.stats().committed_slots <= slots)
        self.seen.append(slots)


@pytest.mark.parametrize("during", [False, True])
@pytest.mark.parametrize("predictor", [None, Random()])
def test_the_budget_changes_within_a_layer_of_a_stream(folder, predictor, during):
    model = sida_ext.from_pretrained(
        folder, expert_dtype="float32", expert_memory="100%", faults=_C.Faults(seed=3, delay_us_max=500)
    )
    given = batches(8)
    plain = expected(model, given)
    record = model.sida.header.record_bytes
    budgets = ["25%", "100%", record, "50%", str(3 * record), "auto", "7%", 5 * record, "100%", "12.5%"]
    resizer = Resizer(model, budgets, during)
    for layer in model.modules():
        if type(layer).__name__ == "SparseMLP":
            layer.observer = resizer
    assert equal(states(sida_ext.stream(model, given, predictor, 2)), plain)
    assert resizer.seen == [4, 16, 1, 8, 3, 16, 1, 5, 16, 2]
    model.sida.close()


def test_a_budget_that_grows_is_used_at_once(folder):
    model = sida_ext.from_pretrained(folder, expert_dtype="float32", expert_memory="7%")
    given = batches(4)
    plain = expected(model, given)
    resizer = Resizer(model, ["100%"])
    model.encoder.block[1].layer[1].mlp.observer = resizer
    model.sida.reset_stats()
    assert equal(states(sida_ext.stream(model, given)), plain)
    stats = model.sida.stats()
    assert resizer.seen == [16]
    assert stats.evictions == 0
    assert stats.committed_slots == stats.loads + 1  # the one that was there before
    model.sida.close()


def test_the_budget_changes_at_any_time_and_no_bit_with_it(folder):
    model = sida_ext.from_pretrained(
        folder, expert_dtype="float32", expert_memory="100%", faults=_C.Faults(seed=5, delay_us_max=300)
    )
    given = batches(16)
    plain = expected(model, given)
    changes, errors, done = [], [], threading.Event()

    def change():
        random = torch.Generator().manual_seed(2)
        try:
            while not done.is_set():
                slots = int(torch.randint(1, 17, (1,), generator=random))
                model.sida.set_budget(slots * model.sida.header.record_bytes)
                changes.append(slots)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        while len(changes) < 50:
            assert equal(states(sida_ext.stream(model, given, Random(), 3)), plain)
    finally:
        done.set()
        thread.join(30)
    assert not errors
    slots = model.sida.slots
    wait_until(lambda: model.sida.stats().committed_slots <= slots)
    model.sida.close()


def test_two_streams_that_begin_at_once_keep_the_number_of_threads(folder, monkeypatch):
    """The hash-building thread computes with one thread. Until its stream has put the number back, every thread that is
    born takes that one for its own; the caller of a second stream must not."""
    models = [sida_ext.from_pretrained(folder, expert_memory="50%") for _ in range(2)]
    before, set_threads = torch.get_num_threads(), torch.set_num_threads
    window, found = threading.Event(), []

    def slow(count):
        set_threads(count)
        if threading.current_thread().name == "sida-hash-builder":
            window.set()
            time.sleep(0.2)

    def consume(model, warm):
        if warm:  # a thread takes its number of threads at its first product
            expected(model, batches(1))
        list(sida_ext.stream(model, batches(1), Random()))
        found.append(torch.get_num_threads())

    monkeypatch.setattr(torch, "set_num_threads", slow)
    first = threading.Thread(target=consume, args=(models[0], True))
    first.start()
    window.wait(10)
    second = threading.Thread(target=consume, args=(models[1], False))
    second.start()
    first.join()
    second.join()
    monkeypatch.undo()
    for model in models:
        model.sida.close()
    assert found == [before, before]
    assert torch.get_num_threads() == before
