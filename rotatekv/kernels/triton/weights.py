"""What the kernels that multiply plain codes share: softmax of a tile, values' planes weighted, a part's result.

The softmax is one of score + log2 of the value's scale, so that no weight is above 1 and weights fill float16 up to
2^15 without a look at the tile's numbers; ``total`` takes the scale out again. What ``spread.py`` leaves of a number's
place in its word is in the weight too.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rotatekv.kernels.triton.query_tables import UNIT_BITS
from rotatekv.kernels.triton.spread import spread

PEAK = tl.constexpr(15)  # log2 of the largest weight
_RESULT_BITS = tl.constexpr(UNIT_BITS - 15)  # log2 of what a sum of weights times codes lacks


@triton.jit
def weigh(scores, seen, of_value, offset, top, total, offsets, acc):
    """One tile of the online softmax → weights, and the rest with the tile in it.

    Args:
        scores: (Q_PAD, TOKENS), log2 units. seen: (TOKENS,).
        of_value: (TOKENS,), log2 of the factor that a token's weight gets. offset: of its codes, or 1 for all.
        top: (Q_PAD,). total, offsets: (Q_PAD, TOKENS), sums of weights without the factor, and of offset times weight.
        acc: (Q_PAD, D_PAD).
    """
    scores = scores + tl.where(seen, of_value, float("-inf"))[None, :]
    new_top = tl.maximum(top, tl.max(scores, 1))
    safe = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights, decay = tl.exp2(scores - (safe - PEAK)[:, None]), tl.exp2(top - safe)[:, None]
    total = total * decay + weights * tl.exp2(-of_value)[None, :]
    return weights, new_top, total, offsets * decay + weights * offset, acc * decay


@triton.jit
def add_plane(
    acc, weights, lower, words, here, lift, mask, TERMS: tl.constexpr, ORDER: tl.constexpr, LIFT: tl.constexpr
):
    """acc + weights @ codes of a plane, times 2^(lift + LIFT).

    Args:
        weights, lower: float16, (Q_PAD, TOKENS); the lower halves are read of two TERMS.
        words: pointers to words of 16 tokens, (D_PAD, TOKENS / 16), and ``here``.
        mask, ORDER, LIFT: see ``spread``. lift: a shift of the words before.
    """
    codes = tl.trans(spread(tl.load(words, mask=here, other=0).to(tl.int32) << lift, mask, ORDER, LIFT))
    acc = tl.dot(weights, codes, acc)
    if TERMS == 2:
        acc = tl.dot(lower, codes, acc)
    return acc


@triton.jit
def store_rows(parts, tops, totals, at, here, top, total, offsets, acc, middle, D: tl.constexpr, Q_PAD: tl.constexpr):
    """A program's part, Σ p·(code − middle)·scale for the softmax's p without its denominator; at: (Q_PAD,), rows."""
    tl.store(tops + at, tl.gather(top, tl.arange(0, Q_PAD), 0), mask=here)  # as they are they would drag the loop's
    tl.store(totals + at, tl.gather(tl.sum(total, 1), tl.arange(0, Q_PAD), 0) * 2.0**-PEAK, mask=here)  # layout along
    acc = acc * 2.0**_RESULT_BITS - (tl.sum(offsets, 1) * 2.0**-PEAK)[:, None] * middle[None, :]
    d = tl.arange(0, acc.shape[1])
    tl.store(parts + at[:, None] * D + d[None, :], acc, mask=here[:, None] & (d < D)[None, :])
