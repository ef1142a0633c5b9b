"""Rows that decode together, and texts that are encoded together, have the bits that they have alone."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

import sida_ext
import sida_ext.serving.shared
from sida_ext import ops
from sida_ext.models.classification import SwitchTransformersForSequenceClassification
from sida_ext.models.layers import swapped_layers
from sida_ext.serving import row_exact
from sida_ext.serving.joined import joins
from sida_ext.serving.joined_encoder import JoinedEncoder, batches
from sida_ext.serving.model import ServedModel
from sida_ext.serving.packed import PackedEncoder
from sida_ext.serving.row_exact import RowExact, linear_joins
from sida_ext.serving.rows import SMALLEST_CAPACITY, KvPool
from sida_ext.serving.shared import _rms_eps, attend_shared
from tests.support.tiny_models import VOCABULARY, tiny_causal, tiny_tokenizer

EXAMPLES = Path(__file__).parents[2] / "examples"


def switch(dtype: torch.dtype):
    torch.manual_seed(0)
    config = SwitchTransformersConfig(
        vocab_size=VOCABULARY,
        d_model=64,
        d_ff=64,
        d_kv=16,
        num_heads=4,
        num_layers=4,
        num_decoder_layers=4,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=2,
        num_experts=8,
        expert_capacity=4,  # some prompts have tokens that no expert takes
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    return SwitchTransformersForConditionalGeneration(config).to(dtype).eval()


def alone(model, prompt, new):
    """What ``generate`` makes of one prompt: its tokens and the logits that each was chosen from."""
    ids = torch.tensor([prompt])
    done = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    start = 1 if model.config.is_encoder_decoder else len(prompt)
    return done.sequences[0].tolist()[start:], torch.cat(done.logits)


def together(served, prompts, wanted, draw, at_once=8):
    """The same rows joining and leaving at random boundaries: the logits of each."""
    logits = [[] for _ in prompts]
    waiting, running = list(range(len(prompts))), []
    while waiting or running:
        while waiting and len(running) < at_once and (not running or draw.random() < 0.5):
            place = waiting.pop(draw.randrange(len(waiting)))
            first, row = served.start(prompts[place], wanted[place])
            logits[place].append(first)
            running.append((place, row))
        going = [pair for pair in running if len(logits[pair[0]]) < wanted[pair[0]]]
        for pair in running:
            if pair not in going:
                served.drop(pair[1])
        running = going
        draw.shuffle(running)
        if running:
            step = served.step([row for _, row in running], [int(logits[place][-1].argmax()) for place, _ in running])
            for (place, _), row in zip(running, step, strict=True):
                logits[place].append(row)
    return [torch.stack(rows) for rows in logits]


MODELS = {
    "olmoe bfloat16": lambda: tiny_causal("olmoe"),
    "olmoe float32": lambda: tiny_causal("olmoe", torch.float32),
    "qwen3_moe bfloat16": lambda: tiny_causal("qwen3_moe"),
    "qwen3_moe float32": lambda: tiny_causal("qwen3_moe", torch.float32),
    "switch bfloat16": lambda: switch(torch.bfloat16),
    "switch float32": lambda: switch(torch.float32),
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("budget", ["100%", "30%"])
@pytest.mark.parametrize("shared", [False, True], ids=["rows", "shared"])
def test_a_row_has_the_bits_of_generate_whatever_runs_beside_it(kind, shared, budget, tmp_path):
    seed = random.randrange(2**32)
    draw = random.Random(seed)
    model = sida_ext.swap_experts(MODELS[kind](), expert_memory=budget, store=tmp_path / "experts.sida")
    with model.sida:
        served = ServedModel(model, tiny_tokenizer(), "tiny", shared=shared)
        assert served.joined is not None
        lengths = [1, 3, 3, 3, 8, 17, 30, 33, SMALLEST_CAPACITY - 4]
        prompts = [[draw.randrange(2, VOCABULARY) for _ in range(draw.choice(lengths))] for _ in range(8)]
        expected = [alone(model, prompt, draw.randint(1, 12)) for prompt in prompts]
        found = together(served, prompts, [len(tokens) for tokens, _ in expected], draw)
        for place, ((_, logits), row) in enumerate(zip(expected, found, strict=True)):
            assert torch.equal(row.float(), logits), f"seed {seed}, {kind}, row {place}"
        assert served.cache_bytes == 0


@pytest.mark.parametrize(
    ("kind", "shared"),
    [(kind, shared) for shared in (False, True) for kind in MODELS if shared or "switch" not in kind],
)
def test_prompts_that_start_together_have_the_bits_they_have_alone(kind, shared, tmp_path, monkeypatch):
    monkeypatch.setattr(sida_ext.serving.shared, "LONG", 32)  # of the prompts below some are longer
    seed = random.randrange(2**32)
    draw = random.Random(seed)
    model = sida_ext.swap_experts(MODELS[kind](), store=tmp_path / "experts.sida")
    with model.sida:
        served = ServedModel(model, tiny_tokenizer(), "tiny", shared=shared)
        prompts = [
            [draw.randrange(2, VOCABULARY) for _ in range(draw.choice([1, 2, 3, 9, 10, 12, 40, 41]))] for _ in range(11)
        ]
        together = served.start_all(prompts, [4] * len(prompts))
        rows = [row for _, row in together]
        after = served.step(rows, [int(logits.argmax()) for logits, _ in together])
        for place, prompt in enumerate(prompts):
            _, expected = alone(model, prompt, 2)
            assert torch.equal(together[place][0].float(), expected[0]), f"seed {seed}, row {place}"
            if len(expected) > 1:  # else the first token ended it
                assert torch.equal(after[place].float(), expected[1]), f"seed {seed}, row {place}"


@pytest.mark.parametrize("kind", ["olmoe bfloat16", "switch bfloat16"])
def test_what_is_shared_are_the_products_of_steps_and_the_norms(kind, tmp_path, monkeypatch):
    model = sida_ext.swap_experts(MODELS[kind](), store=tmp_path / "experts.sida")
    prompt = [5, 6, 7, 8]
    with model.sida:
        served = ServedModel(model, tiny_tokenizer(), "tiny", shared=True)
        count = sum(type(module).__name__.endswith("Norm") for module in model.modules())
        norms, steps, others = [], [], []
        norm, linear = ops.rms_norm, ops.linear

        def count_norm(x, weight, eps):
            norms.append(tuple(x.shape))
            return norm(x, weight, eps)

        def count_linear(x, *given):
            (steps if x.dim() == 3 and x.shape[1] == 1 else others).append(tuple(x.shape))
            return linear(x, *given)

        monkeypatch.setattr(ops, "rms_norm", count_norm)
        monkeypatch.setattr(ops, "linear", count_linear)
        logits, row = served.start(prompt, 4)
        assert len(norms) >= count > 4  # routers that are asked ahead take theirs once more
        norms.clear(), steps.clear()
        served.step([row, served.start(prompt, 4)[1]], [int(logits.argmax())] * 2)
        shapes = {shape for shape in steps if shape[0] == 2}
        width = model.config.hidden_size if kind.startswith("olmoe") else model.config.d_model
        assert (2, 1, width) in shapes
        assert all(parameter.__class__.__name__ != "StepWeight" for parameter in _of_the_texts(model))


def _of_the_texts(model):
    """Parameters that see an encoder's tokens."""
    if not model.config.is_encoder_decoder:
        return []
    across = [module for name, module in model.named_modules() if name.endswith("EncDecAttention")]
    head = model.get_output_embeddings().weight
    found = [*model.get_encoder().parameters(), *(part.weight for module in across for part in (module.k, module.v))]
    return [parameter for parameter in found if parameter is not head]


@pytest.mark.parametrize("change", ["weight + 1", "mean", "eps", "a gate", "another parameter"])
def test_a_norm_that_is_something_else_keeps_its_own_function(change):
    class Norm(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.rand(32) + 0.5)
            self.eps = 1e-5

        def forward(self, x):
            if change == "mean":
                x = x - x.mean(-1, keepdim=True)
            eps = 1e-6 if change == "eps" else self.eps
            weight = 1 + self.weight if change == "weight + 1" else self.weight
            return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight

    class Gated(Norm):
        def forward(self, x, gate=None):
            return super().forward(x) if gate is None else super().forward(x) * gate

    norm = Gated() if change == "a gate" else Norm()
    if change == "another parameter":
        change = ""
        assert _rms_eps(norm) == 1e-5
        norm.bias = torch.nn.Parameter(torch.zeros(32))
    assert _rms_eps(norm) is None


def test_the_model_is_as_it_was_after_a_step_that_failed(tmp_path):
    model = sida_ext.swap_experts(tiny_causal(), expert_memory="100%", store=tmp_path / "experts.sida")
    with model.sida:
        served = ServedModel(model, tiny_tokenizer(), "tiny")
        rows = [served.start([5, 6, 7], 9)[1], served.start([8, 9], 9)[1]]
        before = served.step(rows, [10, 11])
        lengths = [row.own.length for row in rows]
        broken = model.model.layers[2].mlp.forward
        model.model.layers[2].mlp.forward = lambda *given: 1 / 0
        with pytest.raises(ZeroDivisionError):
            served.step(rows, [12, 13])
        model.model.layers[2].mlp.forward = broken
        assert [row.own.length for row in rows] == lengths
        assert model.config._attn_implementation == "sdpa"
        again = served.step(rows, [12, 13])
        fresh = [served.start([5, 6, 7], 9)[1], served.start([8, 9], 9)[1]]
        assert torch.equal(served.step(fresh, [10, 11]), before)
        assert torch.equal(served.step(fresh, [12, 13]), again)


def test_without_the_split_float32_rows_would_differ(tmp_path, monkeypatch):
    """The check can fail: products that are not split give other bits."""
    if linear_joins(torch.zeros(64, 64), None):
        pytest.skip("this machine's float32 products do not depend on the number of rows")
    model = sida_ext.swap_experts(tiny_causal("olmoe", torch.float32), store=tmp_path / "experts.sida")
    with model.sida:
        served = ServedModel(model, tiny_tokenizer(), "tiny")
        prompts = [[5, 6, 7], [8, 9, 10, 11, 12]]
        rows = [served.start(prompt, 9)[1] for prompt in prompts]
        expected = served.step(rows, [20, 21])
        monkeypatch.setattr(row_exact, "linear_joins", lambda weight, bias: True)
        rows = [served.start(prompt, 9)[1] for prompt in prompts]
        assert not torch.equal(served.step(rows, [20, 21]), expected)


@pytest.mark.parametrize("capacity", [3, 64])
@pytest.mark.parametrize("shared", [False, True], ids=["rows", "shared"])
def test_texts_of_any_lengths_are_classified_with_the_bits_they_have_alone(shared, capacity, monkeypatch):
    monkeypatch.setattr(sida_ext.serving.shared, "LONG", 48)  # some of the texts below are longer
    seed = random.randrange(2**32)
    draw = random.Random(seed)
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLES / "demo_model")
    for dtype in (torch.bfloat16, torch.float32):
        model = sida_ext.from_pretrained(EXAMPLES / "demo_model", expert_memory="auto", dtype=dtype)
        with model.sida, torch.no_grad():
            assert JoinedEncoder.fits(model)
            encoder = ServedModel(model, tokenizer, "demo", shared=shared).encoder
            assert encoder is not None
            for layer in swapped_layers(model):
                layer.router.expert_capacity = capacity
            texts = [
                " ".join(draw.choice(["a", "fine", "film", "dull", "and", "never", "funny"]) for _ in range(words))
                for words in [draw.randint(1, 40) for _ in range(12)]
            ]
            prompts = [tokenizer(text)["input_ids"] for text in texts]
            found = encoder.logits(prompts)
            for prompt, logits in zip(prompts, found, strict=True):
                ids = torch.tensor([prompt])
                expected = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].float()
                assert torch.equal(logits, expected), f"seed {seed}, {dtype}"


def test_the_encoder_is_as_it_was_after_a_packed_batch_that_failed():
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLES / "demo_model")
    model = sida_ext.from_pretrained(EXAMPLES / "demo_model", expert_memory="auto")
    with model.sida:
        served = ServedModel(model, tokenizer, "demo", shared=True)
        prompts = [tokenizer(text)["input_ids"] for text in ("a fine film", "dull", "never funny and never dull")]
        before = served.classify(prompts)
        last, first = model.encoder.block[-1], model.encoder.block[0].layer[0].SelfAttention
        forward, last.forward = last.forward, lambda *given, **options: 1 / 0
        with pytest.raises(ZeroDivisionError):
            served.classify(prompts)
        last.forward = forward
        assert "compute_bias" not in vars(first)
        assert all(layer.router.packing is None for layer in swapped_layers(model))
        assert served.classify(prompts) == before == [served.classify([prompt])[0] for prompt in prompts]


def test_only_routers_that_are_told_of_it_see_a_packed_row(tmp_path):
    torch.manual_seed(0)
    model = switch(torch.float32)
    assert not PackedEncoder.fits(model.encoder)  # its experts are its own
    model = sida_ext.swap_experts(model, store=tmp_path / "experts.sida")
    with model.sida:
        assert PackedEncoder.fits(model.encoder)
        swapped_layers(model.encoder)[0].routing = "predicted"
        assert not PackedEncoder.fits(model.encoder)
        assert not ServedModel(model, tiny_tokenizer(), "tiny", shared=True).joined.starts_together
    assert not PackedEncoder.fits(tiny_causal())


def test_batches_of_texts_hold_little_padding():
    lengths = [random.randint(1, 64) for _ in range(100)]
    found = batches(lengths)
    assert sorted(place for batch in found for place in batch) == list(range(100))
    for batch in found:
        longest = max(lengths[place] for place in batch)
        assert sum(lengths[place] for place in batch) >= 0.75 * longest * len(batch)


def test_rows_end_where_generate_ends_them(tmp_path):
    model = sida_ext.swap_experts(switch(torch.float32), store=tmp_path / "experts.sida")
    with model.sida:
        assert ServedModel(model, tiny_tokenizer(), "tiny").ends == {1}
        model.generation_config.eos_token_id = None  # generate then goes on beyond the configuration's token
        assert ServedModel(model, tiny_tokenizer(), "tiny").ends == frozenset()
        model.generation_config.eos_token_id = [3, 5]
        assert ServedModel(model, tiny_tokenizer(), "tiny").ends == {3, 5}


def test_models_that_cannot_be_joined_say_why():
    model = tiny_causal("qwen3_moe", sliding_window=64, use_sliding_window=True, max_window_layers=0)
    assert joins(tiny_causal("qwen3_moe")) is None
    assert "only full attention can be joined" in (joins(model) or "")


def test_what_rows_cannot_share_is_refused_by_name(tmp_path):
    model = tiny_causal("qwen3_moe", sliding_window=16, use_sliding_window=True, max_window_layers=0)
    with pytest.raises(ValueError, match=r"cannot share its calls: .*only full attention.*serve without --shared"):
        ServedModel(model, tiny_tokenizer(), "tiny", shared=True)
    heads = torch.zeros(1, 1, 1, 4)
    with pytest.raises(RuntimeError, match="wants softcap, which rows cannot share; serve without --shared"):
        attend_shared(model, heads, heads, heads, [(0, 0, 1, 0)], False, {"softcap": 30.0})


def test_rows_of_a_model_that_cannot_be_joined_step_by_themselves(tmp_path):
    model = tiny_causal("qwen3_moe", sliding_window=16, use_sliding_window=True, max_window_layers=0)
    model = sida_ext.swap_experts(model, store=tmp_path / "experts.sida")
    with model.sida:
        served = ServedModel(model, tiny_tokenizer(), "tiny")
        assert served.joined is None
        assert "rows are computed one after the other" in served.notes[0]
        prompts = [[5, 6, 7], list(range(20, 50))]
        expected = [alone(model, prompt, 6) for prompt in prompts]
        found = together(served, prompts, [6, 6], random.Random(0))
        for (_, logits), row in zip(expected, found, strict=True):
            assert torch.equal(row.float(), logits)


def test_a_row_that_outgrows_its_slab_moves_and_memory_is_given_back():
    pool = KvPool(2)
    states = [(torch.randn(1, 2, SMALLEST_CAPACITY, 4), torch.randn(1, 2, SMALLEST_CAPACITY, 4)) for _ in range(2)]
    full, short = pool.put(states, 0), pool.put([(k[:, :, :5], v[:, :, :5]) for k, v in states], 3)
    assert (full.capacity, short.capacity) == (SMALLEST_CAPACITY, SMALLEST_CAPACITY)
    pool.make_room(full)
    assert full.capacity == 2 * SMALLEST_CAPACITY
    part = next(part for part in pool.parts([full, short]) if part.capacity == full.capacity)
    part.group(False)
    keys, values = pool.read(part, part.groups[0], 1, SMALLEST_CAPACITY)
    assert torch.equal(keys, states[1][0])
    assert torch.equal(values, states[1][1])
    pool.release(full)
    pool.release(short)
    assert pool.bytes == 0


def test_products_whose_rows_cannot_be_told_apart_are_refused():
    weight = torch.zeros(64, 64)
    if linear_joins(weight, None):
        pytest.skip("this machine's float32 products do not depend on the number of rows")
    with RowExact([2, 3]), pytest.raises(RuntimeError, match="cannot be told apart; serve this model with --rows 1"):
        F.linear(torch.zeros(5, 64), weight)


def test_the_probe_sees_a_kernel_that_changes_with_the_number_of_rows(monkeypatch):
    """A product that adds in another order for one row is found, also behind bfloat16."""

    def linear(rows, weight, bias=None):
        wide, factor = rows.float(), weight.float()
        if rows.shape[0] == 1:
            half = wide.shape[1] // 2
            return (wide[:, half:] @ factor[:, half:].T + wide[:, :half] @ factor[:, :half].T).to(rows.dtype)
        return torch.stack([(row * factor).double().sum(1) for row in wide]).to(rows.dtype)

    monkeypatch.setattr(row_exact.F, "linear", linear)
    monkeypatch.setattr(row_exact, "_verdicts", {})
    monkeypatch.setattr(row_exact, "_COUNTS", (1, 2, 16))
    assert not linear_joins(torch.zeros(64, 256, dtype=torch.bfloat16), None)


def test_the_classifier_that_is_joined_is_ours():
    assert not JoinedEncoder.fits(tiny_causal())
    assert issubclass(SwitchTransformersForSequenceClassification, torch.nn.Module)
