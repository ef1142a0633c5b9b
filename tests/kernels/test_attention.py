"""``torch.ops.sida.attention`` beside a plain reference, and the bits of a sequence in any company."""

from __future__ import annotations

import random

import pytest
import torch

from sida_ext import ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def reference(query, key, value, spans, scale, bias, causal):
    """In float64, one query after the other: [B, M, H, D_v]."""
    batch, heads, queries, _ = query.shape
    group = heads // key.shape[1]
    out = torch.zeros(batch, queries, heads, value.shape[3], dtype=torch.float64)
    for b, (slot, first, last, column) in enumerate(spans):
        for h in range(heads):
            for m in range(queries):
                end = last - (queries - 1 - m if causal else 0)
                if end <= first:
                    continue
                scores = scale * (key[slot, h // group, first:end].double() @ query[b, h, m].double())
                if bias is not None:
                    row = bias.expand(batch, heads, queries, -1)[b, h, m]
                    scores += row[column : column + end - first].double()
                out[b, m, h] = scores.softmax(0) @ value[slot, h // group, first:end].double()
    return out


def case(draw, dtype, causal, biased, *, queries=None, keys=None):
    kv_heads, group = draw.choice([1, 2, 3]), draw.choice([1, 2])
    batch, heads, slots = draw.randint(1, 5), kv_heads * group, draw.randint(1, 4)
    queries = queries or draw.choice([1, 1, 2, 7, 17])
    keys = keys or draw.randint(1, 70)
    dim, value_dim = draw.choice([1, 8, 24, 32, 80, 128]), draw.choice([3, 16, 32, 33, 100])
    generator = torch.Generator().manual_seed(draw.randrange(2**31))

    def numbers(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    query = numbers(batch, queries, heads, dim).transpose(1, 2)  # as models give it
    key, value = numbers(slots, kv_heads, keys + 3, dim)[:, :, :keys], numbers(slots, kv_heads, keys, value_dim)
    bias = numbers(draw.choice([1, batch]), draw.choice([1, heads]), draw.choice([1, queries]), keys + 2)
    spans = []
    for _ in range(batch):
        first = draw.randint(0, keys - 1)
        spans.append((draw.randrange(slots), first, draw.randint(first, keys), draw.randint(0, 2)))
    return query, key, value, spans, dim**-0.5, bias if biased else None, causal


def attention(query, key, value, spans, scale, bias, causal):
    return ops.attention(query, key, value, torch.tensor(spans), scale, bias, causal)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_attention_is_the_formula(dtype, causal, biased):
    seed = random.randrange(2**32)
    draw = random.Random(seed)
    for _ in range(12):
        given = case(draw, dtype, causal, biased)
        found, expected = attention(*given), reference(*given)
        assert found.dtype == dtype
        # One rounding of the result, and sums in fp32.
        bound = 2e-5 if dtype == torch.float32 else float(torch.finfo(dtype).eps)
        error = (found.double() - expected).abs()
        assert (error <= bound * (expected.abs() + 0.05)).all(), f"seed {seed}: {error.max()}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_a_sequence_has_the_same_bits_in_any_company_and_padding(dtype, causal):
    seed = random.randrange(2**32)
    draw = random.Random(seed)
    for _ in range(12):
        query, key, value, spans, scale, bias, _ = given = case(draw, dtype, causal, True)
        together = attention(*given)
        for row, (slot, first, last, column) in enumerate(spans):
            wide = bias[row % bias.shape[0], None, :, :, column : column + last - first]
            alone = attention(
                query[row : row + 1].clone(),
                key[slot : slot + 1, :, first:last].clone(),
                value[slot : slot + 1, :, first:last].clone(),
                [(0, 0, last - first, 0)],
                scale,
                wide.clone(),
                causal,
            )
            assert torch.equal(alone[0], together[row]), f"seed {seed}, row {row}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_sequences_one_behind_the_other_have_the_bits_they_have_alone(dtype, causal, biased):
    seed = random.randrange(2**32)
    draw = random.Random(seed)
    for _ in range(12):
        query, key, value, spans, scale, bias, _ = case(draw, dtype, causal, biased)
        rows, longest = query.shape[0], query.shape[2]
        gaps = [draw.choice([0, 0, 2]) for _ in range(rows + 1)]  # of queries that belong to no sequence
        lengths = [longest, *(draw.randint(0, longest) for _ in range(rows - 1))]
        packed = torch.full((1, query.shape[1], sum(gaps) + sum(lengths), query.shape[3]), 3.0).to(dtype)
        placed, at = [], 0
        for row, (length, gap) in enumerate(zip(lengths, gaps, strict=False)):
            at += gap
            packed[0, :, at : at + length] = query[row, :, :length]
            placed.append((*spans[row], at, at + length))
            at += length
        found = ops.attention(packed, key, value, torch.tensor(placed), scale, bias, causal)
        assert found.shape == (1, packed.shape[2], query.shape[1], value.shape[3])
        left = torch.ones(packed.shape[2], dtype=torch.bool)
        for row, (*span, first, last) in enumerate(placed):
            own = None
            if bias is not None:
                own = bias[row % bias.shape[0], None, :, : max(1, last - first)]
            alone = attention(query[row : row + 1, :, : last - first], key, value, [tuple(span)], scale, own, causal)
            assert torch.equal(found[:, first:last], alone), f"seed {seed}, row {row}"
            left[first:last] = False
        assert not found[0, left].any()


def test_a_query_alone_is_the_last_of_a_prompt():
    """Decoding a token gives the bits of the prompt that holds it."""
    draw = random.Random(0)
    query, key, value, _, scale, _, _ = case(draw, torch.bfloat16, True, False, queries=17, keys=17)
    batch = min(query.shape[0], key.shape[0])
    spans = [(row, 0, 17, 0) for row in range(batch)]
    whole = attention(query[:batch], key, value, spans, scale, None, True)
    last = attention(query[:batch, :, -1:], key, value, spans, scale, None, True)
    assert torch.equal(whole[:, -1:], last)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("keys", [5, 33, 64, 1024, 1025], ids="{} keys".format)
def test_queries_of_a_prompt_have_the_bits_they_have_alone(dtype, causal, keys):
    """Together they share turned keys, up to 1,024 of them; alone, none are turned."""
    seed = random.randrange(2**32)
    draw = random.Random(seed)
    for queries in (1, 3, 4, 5, 11):
        query, key, value, _, scale, bias, _ = case(draw, dtype, causal, True, queries=queries, keys=keys)
        first, last = draw.randint(0, 2), keys
        together = attention(query[:1], key, value, [(0, first, last, 1)], scale, bias[:1], causal)
        for m in range(queries):
            end = last - (queries - 1 - m if causal else 0)
            own = bias[:1, :, min(m, bias.shape[2] - 1)][:, :, None]
            alone = attention(query[:1, :, m : m + 1], key, value, [(0, first, max(first, end), 1)], scale, own, False)
            assert torch.equal(together[:, m : m + 1], alone), f"seed {seed}, query {m} of {queries}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_a_query_does_not_see_does_not_reach_it(dtype):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 19, 24, generator=generator).to(dtype) for _ in range(3))
    expected = attention(query, key, value, [(0, 0, 19, 0)], 0.3, None, True)
    for at in range(1, 19):
        for bad in (float("nan"), float("inf"), -float("inf")):
            spoiled, moved = key.clone(), value.clone()
            spoiled[:, :, at:], moved[:, :, at:] = bad, bad
            found = attention(query, spoiled, moved, [(0, 0, 19, 0)], 0.3, None, True)
            assert torch.equal(found[:, :at], expected[:, :at]), (at, bad)


def test_extreme_scores_are_those_of_softmax():
    query = torch.tensor([1.0]).reshape(1, 1, 1, 1)
    for keys in ([300.0, -300.0, 299.0], [0.0, float("-inf"), 1.0], [float("nan"), 0.0]):
        key = torch.tensor(keys).reshape(1, 1, -1, 1)
        value = torch.arange(1.0, len(keys) + 1).reshape(1, 1, -1, 1)
        found = attention(query, key, value, [(0, 0, len(keys), 0)], 1.0, None, False)
        expected = (torch.tensor(keys).softmax(0) * value.flatten()).sum()
        assert torch.allclose(found.flatten()[0], expected, equal_nan=True), keys


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"key": torch.zeros(2, 1, 5, 9)}, ValueError, "key has shape .2, 1, 5, 9., expected 8 .dim of query."),
        ({"key": torch.zeros(2, 1, 5, 8).half()}, TypeError, "key has dtype Half, expected Float, that of query"),
        ({"value": torch.zeros(2, 1, 4, 8)}, ValueError, "value has shape .2, 1, 4, 8., expected 5"),
        ({"key": torch.zeros(2, 3, 5, 8)}, ValueError, "query has 2 heads, expected a multiple of the 3 of key"),
        ({"spans": torch.tensor([[2, 0, 5, 0]])}, IndexError, "spans.0. is slot 2, keys 0 to 5"),
        ({"spans": torch.tensor([[0, 0, 6, 0]])}, IndexError, "keys within 0 to 5"),
        ({"spans": torch.tensor([[0, 3, 2, 0]])}, IndexError, "keys 3 to 2"),
        ({"spans": torch.tensor([[0, 0, 5, 1]])}, IndexError, "takes columns 1 to 6 of bias, which has 5"),
        ({"spans": torch.tensor([[0, 0, 5]])}, ValueError, "spans has shape"),
        ({"spans": torch.tensor([[0, 0, 5, 0, 0, 2]])}, IndexError, "queries 0 to 2, expected them within 0 .* to 1"),
        ({"spans": torch.tensor([[0, 0, 5, 0, 0, 1]] * 2)}, IndexError, "spans.1. has queries 0 to 1, .*within 1 "),
        ({"spans": torch.tensor([[0, 0, 5, 0, 1, 0]])}, IndexError, "queries 1 to 0"),
        (
            {"query": torch.zeros(2, 2, 1, 8), "spans": torch.tensor([[0, 0, 5, 0, 0, 1]] * 2)},
            ValueError,
            "query has shape .2, 2, 1, 8., expected 1 .the row",
        ),
        ({"spans": torch.tensor([[0, 0, 5, 0]]).int()}, TypeError, "spans has dtype Int, expected int64"),
        ({"bias": torch.zeros(1, 3, 1, 5)}, ValueError, "bias has shape .1, 3, 1, 5., expected 1 or 2 in dimension 1"),
        ({"query": torch.zeros(1, 2, 8, 1).transpose(2, 3).expand(1, 2, 1, 8)[..., ::2]}, ValueError, "query"),
    ],
)
def test_what_does_not_fit_is_named(change, error, message):
    given = {
        "query": torch.zeros(1, 2, 1, 8),
        "key": torch.zeros(2, 1, 5, 8),
        "value": torch.zeros(2, 1, 5, 8),
        "spans": torch.tensor([[0, 0, 5, 0]]),
        "bias": torch.zeros(1, 1, 1, 5),
    } | change
    with pytest.raises(error, match=message):
        ops.attention(**given, scale=1.0)


def test_the_op_is_as_torch_wants_it():
    query, key, value = torch.randn(2, 2, 3, 8), torch.randn(2, 1, 5, 8), torch.randn(2, 1, 5, 4)
    spans = torch.tensor([[0, 0, 5, 0], [1, 2, 4, 0]])
    torch.library.opcheck(torch.ops.sida.attention.default, (query, key, value, spans, 0.3, None, True))
    packed = torch.cat([spans, torch.tensor([[0, 2], [2, 3]])], 1)
    torch.library.opcheck(torch.ops.sida.attention.default, (query[:1], key, value, packed, 0.3, None, True))
    query.requires_grad_()
    with pytest.raises(NotImplementedError, match="no backward"):
        ops.attention(query, key, value, spans, 0.3).sum().backward()
