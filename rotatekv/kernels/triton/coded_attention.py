"""Split-K decode attention over transform-coded keys and values. ``coded_launch.py`` starts it.

``coded_split_kernel``: program (batch × KV head, split, tile of 16 query rows) reads its share of the frames, up to 128
tokens at a time: planes of codes as exact float16 numbers (``spread.py``) into products with the frame's query, the
token's scale after them, the mean's score added; online softmax; values' planes weighted with the token's scale in the
weight, and added as components (``weights.py``). ``coded_merge.py`` joins the parts and maps the components back. No
key is turned, and no Hadamard matrix or scale of a number is in the loop.

Precision: queries and weights are one float16 number for a model in 16 bits (TERMS 1), and two halves for one in
float32, which then loses about 2^-21. The mean's score, the large part of one, is float32 always.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rotatekv.kernels.triton.query_tables import UNIT_BITS
from rotatekv.kernels.triton.spread import PAIRS, SINGLES, spread, token_bits
from rotatekv.kernels.triton.tiles import LANES, RUN_TIME, halves
from rotatekv.kernels.triton.weights import add_plane, store_rows, weigh

_UNIT_BITS = tl.constexpr(UNIT_BITS)


@triton.jit
def log_scale(scales, lane, here):
    """log2 of the scales of tokens, four in a word; 0 where not ``here``."""
    words = tl.load(scales + lane // 4, mask=here, other=0)
    return tl.where(here, ((words >> (lane % 4 * 8)) & 255).to(tl.float32) * 0.125 - 16, 0.0)


@triton.jit
def dot_keys(
    scores, queries, apart, planes, at, here, count, CHUNK: tl.constexpr, TERMS: tl.constexpr, ORDER: tl.constexpr
):
    """scores + queries @ codes of a head's ``count`` planes of one width, CHUNK planes at a time.

    Args:
        queries: pointers to each row's number for the first code, (Q_PAD, 1).
        apart: from a row's upper halves to its lower ones.
        planes: a pointer. at: (TOKENS,), the word of each token in the first plane, and ``here`` of them.
    """
    chunk, column = tl.arange(0, CHUNK), tl.arange(0, CHUNK * LANES)
    for first in range(0, count, CHUNK):
        words = tl.load(
            planes + at[:, None] + ((first + chunk) * LANES)[None, :],
            mask=here[:, None] & (first + chunk < count)[None, :],
            other=0,
        )
        codes = tl.trans(spread(words.to(tl.int32), 3 if ORDER == PAIRS else 1, ORDER, 0))  # (16·CHUNK, TOKENS)
        for term in tl.static_range(TERMS):
            u = tl.load(queries + term * apart + first * LANES + column[None, :])
            scores = tl.dot(u, codes, scores)
    return scores


@triton.jit
def value_places(form, head, d, G: tl.constexpr):
    """Of components ``d``: their bits, and their words in the first plane of pairs and of singles."""
    at, inside = form + head * (3 * G) + d // LANES, d < G * LANES
    pair = tl.max_constancy(tl.load(at + G, mask=inside, other=0), [16])
    single = tl.max_constancy(tl.load(at + 2 * G, mask=inside, other=0), [16])
    return tl.load(at, mask=inside, other=0), pair * LANES + d % LANES, single * LANES + d % LANES


@triton.jit
def add_components(acc, weights, pairs, singles, here, bits, TERMS: tl.constexpr):
    """acc + weights @ codes of a tile: pointers to words of 16 tokens, (D_PAD, TOKENS / 16); bits: (D_PAD, 1)."""
    upper, lower = halves(weights)
    if tl.max(bits) >= 2:
        acc = add_plane(acc, upper, lower, pairs, here & (bits >= 2), 0, 3, TERMS, PAIRS, 0)
    if tl.max(bits) >= 4:
        acc = add_plane(acc, upper, lower, pairs + LANES, here & (bits >= 4), 0, 12, TERMS, PAIRS, 2)
    if tl.max(bits % 2) == 1:
        lift = tl.maximum(bits - 1, 0)
        acc = add_plane(acc, upper, lower, singles, here & (bits % 2 == 1), lift, 1 << lift, TERMS, SINGLES, 0)
    return acc


@triton.jit(do_not_specialize=RUN_TIME)
def coded_split_kernel(
    queries,
    means,
    row_scale,
    key_pairs,
    key_singles,
    key_scale,
    key_planes,
    value_pairs,
    value_singles,
    value_scale,
    value_form,
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
    key_pair_planes,
    key_single_planes,
    value_pair_planes,
    value_single_planes,
    query_planes,
    single_start,
    frames,
    tiles_per_split,
    frame_start,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    FRAME: tl.constexpr,
    MEANS: tl.constexpr,
    TOKENS: tl.constexpr,
    Q_PAD: tl.constexpr,
    CHUNK: tl.constexpr,
    TERMS: tl.constexpr,
    SEVERAL: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Row i·T_q + t of a KV head is query t of its i-th query head. Parts: (splits, B, H_kv, rows, D), in components.

    Args:
        queries, means, row_scale: of ``coded_queries_kernel``.
        key_planes: ``FrameTable.first``. value_form: ``CodedTables.form``.
        query_planes, single_start: the planes that a row of ``queries`` has, and the first one of singles.
        frame_start: the first frame's first token, ≤ 0.
        EXACT: see ``attention.split_kernel``. SEVERAL: query_tokens > 1.
    """
    pair = tl.program_id(0).to(tl.int64)
    batch, head = pair // HEADS, pair % HEADS
    row = tl.program_id(2) * Q_PAD + tl.arange(0, Q_PAD)
    kept_row = tl.minimum(row, rows - 1)  # rows past the last one do as it does, and are not stored
    counted, within, d = tl.arange(0, TOKENS), tl.arange(0, TOKENS // LANES), tl.arange(0, D_PAD)
    lane, lane_bits = counted % LANES, token_bits(counted % LANES).to(tl.float32)
    start = tl.load(first_seen + batch)
    scale = tl.load(row_scale + pair * rows + kept_row)[:, None]
    apart = query_planes * LANES  # from a row's upper halves to its lower ones
    planes = key_planes + head * 4  # the first pair, pairs, the first single, singles
    key_pairs += (batch * key_blocks * key_pair_planes + tl.load(planes)) * LANES
    key_singles += (batch * key_blocks * key_single_planes + tl.load(planes + 2)) * LANES
    key_scale += (batch * key_blocks * HEADS + head) * 4
    value_scale += (batch * value_blocks * HEADS + head) * 4
    bits, pair_at, single_at = value_places(value_form, head, d, D // LANES)
    of_pairs = value_pairs + batch * value_blocks * value_pair_planes * LANES + pair_at[:, None]
    of_singles = value_singles + batch * value_blocks * value_single_planes * LANES + single_at[:, None]
    top = tl.full((Q_PAD,), float("-inf"), tl.float32)
    total, offsets = tl.zeros((Q_PAD, TOKENS), tl.float32), tl.zeros((Q_PAD, TOKENS), tl.float32)
    acc = tl.zeros((Q_PAD, D_PAD), tl.float32)
    seen_first = tl.maximum(start, total_tokens - query_tokens - window + 1)  # by the first query
    first_tile = tl.program_id(1) * tiles_per_split
    last = tl.minimum(first_tile + tiles_per_split, frames * (FRAME // TOKENS))
    for tile in range(tl.maximum(first_tile, (seen_first - frame_start) // TOKENS), last):
        token = frame_start + tile * TOKENS + counted
        block = (frame_start + tile * TOKENS) // LANES + counted // LANES
        here = (block >= 0) & (block < key_blocks)
        of_frame = (pair * frames + tile // (FRAME // TOKENS)) * rows
        mean = means + of_frame * MEANS + (kept_row * MEANS)[:, None]
        of_mean = tl.load(mean + (tile % (FRAME // TOKENS) * TOKENS + counted)[None, :])
        lowest = tl.load(mean + FRAME)
        of_rows = queries + of_frame * (apart * TERMS) + (kept_row * (apart * TERMS))[:, None]
        words = block * (key_pair_planes * LANES) + lane
        scores = tl.zeros((Q_PAD, TOKENS), tl.float32)
        scores = dot_keys(scores, of_rows, apart, key_pairs, words, here, tl.load(planes + 1), CHUNK, TERMS, PAIRS)
        words = block * (key_single_planes * LANES) + lane
        of_rows += single_start * LANES
        scores = dot_keys(scores, of_rows, apart, key_singles, words, here, tl.load(planes + 3), CHUNK, TERMS, SINGLES)
        by = tl.exp2(log_scale(key_scale + block * (HEADS * 4), lane, here) + _UNIT_BITS)
        scores = ((scores + lowest) * by[None, :] + of_mean) * scale
        seen = (token >= start) & (token < packed_tokens) & (token > total_tokens - query_tokens - window)
        if EXACT:
            lanes = tl.load(exact_lanes + batch * exact_blocks + block, mask=(token >= 0) & seen, other=0)
            seen = seen & (((lanes >> lane) & 1) == 0)
        if SEVERAL:
            own = (total_tokens - query_tokens + row % query_tokens)[:, None]
            scores = tl.where((token[None, :] <= own) & (token[None, :] > own - window), scores, float("-inf"))
        of_value = log_scale(value_scale + block * (HEADS * 4), lane, here & (block < value_blocks)) - lane_bits
        weights, top, total, offsets, acc = weigh(scores, seen, of_value, 1.0, top, total, offsets, acc)
        block = (frame_start + tile * TOKENS) // LANES + within
        here = ((block >= 0) & (block < value_blocks))[None, :]
        pairs = of_pairs + (block * (value_pair_planes * LANES))[None, :]
        singles = of_singles + (block * (value_single_planes * LANES))[None, :]
        acc = add_components(acc, weights, pairs, singles, here, bits[:, None], TERMS)
    at = (tl.program_id(1) * batches * HEADS + pair) * rows + row
    offsets = offsets * tl.exp2(lane_bits)[None, :]
    middle = tl.where(bits > 0, (1 << bits).to(tl.float32) * 0.5 - 0.5, 0.0)
    store_rows(parts, tops, totals, at, row < rows, top, total, offsets, acc, middle, D, Q_PAD)
