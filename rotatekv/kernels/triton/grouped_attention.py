"""Split-K decode attention over keys that meet the query as codes: after RoPE, rounded in groups of whole heads.

``grouped_split_kernel``: program (batch × KV head, split, tile of 16 query rows) as in ``coded_attention.py``, for
the blocks of ``layout.py``: q·k = scale·(Σ u·code − zero·Σ u) with the query u rotated as the keys are, once
(``coded_queries.py``). So the inverse Hadamard matrix is in no loop, and a token's scale and zero come after its dot.
Values are weighted likewise, and un-rotated in ``merge.py``.

Precision: as in ``coded_attention.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rotatekv.kernels.triton.query_tables import UNIT_BITS
from rotatekv.kernels.triton.spread import PAIRS, SINGLES_IN_TURN, spread, token_bits
from rotatekv.kernels.triton.tiles import LANES, RUN_TIME, halves
from rotatekv.kernels.triton.weights import add_plane, store_rows, weigh

_UNIT_BITS = tl.constexpr(UNIT_BITS)


@triton.jit
def scale_and_zero(scales, zeros, at, lane, here):
    """Of tokens, float32; at: (TOKENS,), their blocks' first ones of the group. Four zeros are in a word."""
    scale = tl.load(scales + at * LANES + lane, mask=here, other=1.0).to(tl.float32)
    word = tl.load(zeros + at * 4 + lane // 4, mask=here, other=0)
    zero = ((word << (24 - lane % 4 * 8)) >> 24).to(tl.float32)
    return tl.where(scale > 0, scale, 1.0), zero


@triton.jit
def dot_plane(scores, u, u_lower, words, here, mask, TERMS: tl.constexpr, ORDER: tl.constexpr, LIFT: tl.constexpr):
    """scores + u @ codes of a plane, times 2^LIFT: pointers to words of 16 tokens, (D_PAD, TOKENS / 16)."""
    codes = spread(tl.load(words, mask=here, other=0).to(tl.int32), mask, ORDER, LIFT)  # (D_PAD, TOKENS)
    scores = tl.dot(u, codes, scores)
    if TERMS == 2:
        scores = tl.dot(u_lower, codes, scores)
    return scores


@triton.jit(do_not_specialize=RUN_TIME)
def grouped_split_kernel(
    queries,
    sums,
    row_scale,
    key_low,
    key_high,
    key_scale,
    key_zero,
    value_low,
    value_high,
    value_scale,
    value_zero,
    exact_lanes,
    first_seen,
    parts,
    tops,
    totals,
    batches,
    packed_tokens,
    total_tokens,
    query_tokens,
    rows,
    window,
    key_blocks,
    value_blocks,
    exact_blocks,
    tiles_per_split,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    SUMS: tl.constexpr,
    KEY_GROUPS: tl.constexpr,
    VALUE_GROUPS: tl.constexpr,
    KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    TOKENS: tl.constexpr,
    Q_PAD: tl.constexpr,
    TERMS: tl.constexpr,
    SEVERAL: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Row i·T_q + t of a KV head is query t of its i-th query head. Parts: (splits, B, H_kv, rows, D).

    Args:
        queries, sums, row_scale: of ``coded_queries_kernel``, over one frame; Σ u is the first of a row of ``sums``.
        EXACT: see ``attention.split_kernel``. SEVERAL: query_tokens > 1.
    """
    pair = tl.program_id(0).to(tl.int64)
    batch, head = pair // HEADS, pair % HEADS
    row = tl.program_id(2) * Q_PAD + tl.arange(0, Q_PAD)
    kept_row = pair * rows + tl.minimum(row, rows - 1)  # rows past the last one do as it does, and are not stored
    counted, within, d = tl.arange(0, TOKENS), tl.arange(0, TOKENS // LANES), tl.arange(0, D_PAD)
    lane, lane_bits = counted % LANES, token_bits(counted % LANES).to(tl.float32)
    start = tl.load(first_seen + batch)
    scale, of_zero = tl.load(row_scale + kept_row)[:, None], tl.load(sums + kept_row * SUMS)[:, None]
    of_rows = queries + kept_row[:, None] * (TERMS * D) + d[None, :]
    u = tl.load(of_rows, mask=(d < D)[None, :], other=0.0)
    u_lower = tl.load(of_rows + (TERMS - 1) * D, mask=(d < D)[None, :], other=0.0)
    key_at, value_at = head * KEY_GROUPS // HEADS, head * VALUE_GROUPS // HEADS
    first_key, first_value = batch * key_blocks, batch * value_blocks
    top = tl.full((Q_PAD,), float("-inf"), tl.float32)
    total, offsets = tl.zeros((Q_PAD, TOKENS), tl.float32), tl.zeros((Q_PAD, TOKENS), tl.float32)
    acc = tl.zeros((Q_PAD, D_PAD), tl.float32)
    seen_first = tl.maximum(start, total_tokens - query_tokens - window + 1)  # by the first query
    first_tile = tl.program_id(1) * tiles_per_split
    last = tl.minimum(first_tile + tiles_per_split, (packed_tokens + TOKENS - 1) // TOKENS)
    for tile in range(tl.maximum(first_tile, seen_first // TOKENS), last):
        token, block = tile * TOKENS + counted, tile * (TOKENS // LANES) + counted // LANES
        of_words = tile * (TOKENS // LANES) + within
        at = (first_key + of_words)[None, :] * (HEADS * D) + (head * D + d)[:, None]
        here = (d < D)[:, None] & (of_words < key_blocks)[None, :]
        scores = tl.zeros((Q_PAD, TOKENS), tl.float32)
        scores = dot_plane(scores, u, u_lower, key_low + at, here, 3, TERMS, PAIRS, 0)
        if KEY_BITS == 3:
            scores = dot_plane(scores, u, u_lower, key_high + at, here, 4, TERMS, SINGLES_IN_TURN, 2)
        if KEY_BITS == 4:
            scores = dot_plane(scores, u, u_lower, key_high + at, here, 12, TERMS, PAIRS, 2)
        at = (first_key + block) * KEY_GROUPS + key_at
        by, zero = scale_and_zero(key_scale, key_zero, at, lane, block < key_blocks)
        scores = scores * (by * tl.exp2(-lane_bits + _UNIT_BITS))[None, :] - of_zero * (by * zero)[None, :]
        scores *= scale
        seen = (token >= start) & (token < packed_tokens) & (token > total_tokens - query_tokens - window)
        if EXACT:
            lanes = tl.load(exact_lanes + batch * exact_blocks + block, mask=seen, other=0)
            seen = seen & (((lanes >> lane) & 1) == 0)
        if SEVERAL:
            own = (total_tokens - query_tokens + row % query_tokens)[:, None]
            scores = tl.where((token[None, :] <= own) & (token[None, :] > own - window), scores, float("-inf"))
        at = (first_value + block) * VALUE_GROUPS + value_at
        by, zero = scale_and_zero(value_scale, value_zero, at, lane, block < value_blocks)
        of_value = tl.log2(by) - lane_bits
        weights, top, total, offsets, acc = weigh(scores, seen, of_value, zero[None, :], top, total, offsets, acc)
        upper, lower = halves(weights)
        at = (first_value + of_words)[None, :] * (HEADS * D) + (head * D + d)[:, None]
        here = (d < D)[:, None] & (of_words < value_blocks)[None, :]
        acc = add_plane(acc, upper, lower, value_low + at, here, 0, 3, TERMS, PAIRS, 0)
        if VALUE_BITS == 3:
            acc = add_plane(acc, upper, lower, value_high + at, here, 0, 4, TERMS, SINGLES_IN_TURN, 2)
        if VALUE_BITS == 4:
            acc = add_plane(acc, upper, lower, value_high + at, here, 0, 12, TERMS, PAIRS, 2)
    at = (tl.program_id(1) * batches * HEADS + pair) * rows + row
    offsets = offsets * tl.exp2(lane_bits)[None, :]
    ones = tl.full((D_PAD,), 1.0, tl.float32)
    store_rows(parts, tops, totals, at, row < rows, top, total, offsets, acc, ones, D, Q_PAD)
