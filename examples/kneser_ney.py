"""An interpolated n-gram model with modified Kneser-Ney smoothing: the baseline that a language model must beat.

Source: S. F. Chen and J. Goodman, An Empirical Study of Smoothing Techniques for Language Modeling, 1998.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Order:
    """One order's counts. An n-gram is one integer, its last token in the lowest bits."""

    grams: np.ndarray  # sorted, int64 [n-grams]
    discounted: np.ndarray  # count less its discount, float64 [n-grams]
    contexts: np.ndarray  # sorted, int64 [contexts]
    totals: np.ndarray  # the counts behind a context, float64 [contexts]
    left: np.ndarray  # what the discounts leave to the next lower order, a share, float64 [contexts]


def found(keys: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each wanted value stands in the sorted keys, and whether it does."""
    place = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    return place, keys[place] == wanted


def count_order(grams: np.ndarray, counts: np.ndarray, bits: int) -> Order:
    """The counts of one order with the three discounts that its counts of counts ask for.

    A small vocabulary has no tokens that are seen once, twice, three and four times: there the estimate says nothing,
    and the discounts are 0.5, 1 and 1.5.
    """
    of = [int((counts == n).sum()) for n in (1, 2, 3, 4)]
    discounts = np.array([0.0, 0.5, 1.0, 1.5])
    if min(of) > 0:
        share = of[0] / (of[0] + 2 * of[1])
        discounts[1:] = [n - (n + 1) * share * of[n] / of[n - 1] for n in (1, 2, 3)]
        # Where counts of counts do not fall, as in a tiny text, the estimate leaves its bounds.
        discounts = discounts.clip(0.0, np.arange(4))
    discount = discounts[counts.clip(max=3)]
    contexts, first = np.unique(grams >> bits, return_index=True)
    totals = np.add.reduceat(counts, first).astype(np.float64)
    left = np.add.reduceat(discount, first) / totals
    return Order(grams, counts - discount, contexts, totals, left)


class KneserNey:
    """P(token | the `order` - 1 tokens before it), trained on a row of tokens.

    Args:
        tokens: int64 [tokens], each in [0, vocab_size).
        order: length of the longest n-grams, at least 2.
        vocab_size: number of tokens that exist.

    Raises ValueError where the longest n-gram does not fit an integer or the text is shorter than it.
    """

    def __init__(self, tokens: np.ndarray, order: int, vocab_size: int) -> None:
        self.bits = max(1, int(vocab_size - 1).bit_length())
        if order < 2 or order * self.bits > 62:
            raise ValueError(f"order is {order}, expected 2 to {62 // self.bits} for a vocabulary of {vocab_size}")
        if len(tokens) < order:
            raise ValueError(f"the text has {len(tokens)} tokens, expected at least the order, {order}")
        self.order, self.vocab_size = order, vocab_size
        grams, counts = np.unique(self.encode(tokens, order), return_counts=True)
        self.orders = [count_order(grams, counts, self.bits)]
        for length in range(order - 1, 0, -1):
            # Below the highest order counts the number of different tokens seen before the n-gram.
            grams, counts = np.unique(grams & ((1 << (length * self.bits)) - 1), return_counts=True)
            self.orders.append(count_order(grams, counts, self.bits))

    def encode(self, tokens: np.ndarray, length: int) -> np.ndarray:
        """The n-grams that end at tokens length - 1 and later, int64 [len(tokens) - length + 1]."""
        grams = np.zeros(len(tokens) - length + 1, np.int64)
        for place in range(length):
            grams = (grams << self.bits) | tokens[place : len(tokens) - length + 1 + place]
        return grams

    def log_probabilities(self, tokens: np.ndarray) -> np.ndarray:
        """Natural logarithm of each token's probability after those before it, the first without: [len(tokens)]."""
        probability = np.full(len(tokens), 1.0 / self.vocab_size)
        for length in range(1, self.order + 1):
            grams = self.encode(tokens, length)
            counts = self.orders[self.order - length]
            context, known = found(counts.contexts, grams >> self.bits)
            gram, seen = found(counts.grams, grams)
            # The first tokens have fewer before them: they keep what the lower order says.
            lower = probability[length - 1 :]
            own = np.where(seen, counts.discounted[gram], 0.0) / counts.totals[context]
            probability[length - 1 :] = np.where(known, own + counts.left[context] * lower, lower)
        return np.log(probability)
