"""Split-K decode attention over transform-coded keys and values. ``coded_launch.py`` starts it.

``coded_split_kernel``: program (batch × KV head, split, tile of 16 query rows) reads its share of the frames, up to 128
tokens at a time: codes as exact float16 numbers into one product with the frame's query, the token's scale after it,
the mean's score added; online softmax; values' codes weighted with the token's scale in the weight, and added as
components. ``coded_merge.py`` joins the parts and maps the components back. No key is turned, and no Hadamard matrix or
scale of a number is in the loop.

Precision: as in ``attention.py``, what is no code is cut into two halves of float16.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rotatekv.kernels.triton.coded_tiles import keys_tile, stored_scale, values_tile
from rotatekv.kernels.triton.tiles import LANES, RUN_TIME, halves, peak


@triton.jit(do_not_specialize=RUN_TIME)
def coded_split_kernel(
    coded_queries,
    key_pairs,
    key_singles,
    key_scale,
    key_form,
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
    frames,
    frames_per_split,
    frame_start,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    FRAME: tl.constexpr,
    TOKENS: tl.constexpr,
    Q_PAD: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Row i·T_q + t of a KV head is query t of its i-th query head. Parts: (splits, B, H_kv, rows, D), in components.

    coded_queries: of ``coded_queries_kernel``. EXACT: see ``attention.split_kernel``. frame_start: the first frame's
    first token, ≤ 0.
    """
    G: tl.constexpr = D // LANES
    pair = tl.program_id(0).to(tl.int64)
    batch, head = pair // HEADS, pair % HEADS
    split, tile = tl.program_id(1), tl.program_id(2)
    row = tile * Q_PAD + tl.arange(0, Q_PAD)
    real, own = (row < rows)[:, None], (total_tokens - query_tokens + row % query_tokens)[:, None]
    d, counted, within = tl.arange(0, D_PAD), tl.arange(0, TOKENS), tl.arange(0, TOKENS // LANES)
    lane = counted % LANES
    start = tl.load(first_seen + batch)
    top = tl.full((Q_PAD,), float("-inf"), tl.float32)
    total = tl.zeros((Q_PAD,), tl.float32)
    acc = tl.zeros((Q_PAD, D_PAD), tl.float32)
    seen_first = tl.maximum(start, total_tokens - query_tokens - window + 1)  # by the first query
    last = tl.minimum((split + 1) * frames_per_split, frames)
    for frame in range(tl.maximum(split * frames_per_split, (seen_first - frame_start) // FRAME), last):
        at = coded_queries + ((pair * frames + frame) * rows + row)[:, None] * (D + FRAME)
        u = tl.load(at + d[None, :], mask=real & (d < D)[None, :], other=0.0)  # (Q_PAD, D_PAD)
        scale = peak(u)
        high, low = halves(u * (1 / scale))
        for place in range(0, FRAME, TOKENS):
            first = frame_start + frame * FRAME + place
            token = first + counted
            here = (token >= 0) & (token < packed_tokens)
            block = batch * key_blocks + first // LANES + counted // LANES
            keys = keys_tile(
                key_pairs,
                key_singles,
                key_form,
                head,
                block,
                lane,
                here,
                key_pair_planes,
                key_single_planes,
                G,
                D_PAD // LANES,
            )
            scores = tl.dot(low, keys, tl.dot(high, keys))  # (Q_PAD, TOKENS)
            by = stored_scale(key_scale, (block * HEADS + head) * LANES + lane, here) * scale
            scores = scores * by[None, :] + tl.load(at + (D + place + counted)[None, :], mask=real, other=0.0)
            kept = here & (token >= start)
            if EXACT:
                at_lanes = exact_lanes + batch * exact_blocks + token // LANES
                kept = kept & (((tl.load(at_lanes, mask=here, other=0) >> lane) & 1) == 0)
            seen = kept[None, :] & (token[None, :] <= own) & (token[None, :] > own - window)
            scores = tl.where(seen, scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, 1))
            safe = tl.where(new_top == float("-inf"), 0.0, new_top)
            weights = tl.exp2(scores - safe[:, None])
            decay = tl.exp2(top - safe)
            total = total * decay + tl.sum(weights, 1)
            block = batch * value_blocks + first // LANES + counted // LANES
            weights *= stored_scale(value_scale, (block * HEADS + head) * LANES + lane, here)[None, :]
            of_weights = peak(weights)
            weights_high, weights_low = halves(weights * (1 / of_weights))
            token = first + within * LANES
            values = values_tile(
                value_pairs,
                value_singles,
                value_form,
                head,
                batch * value_blocks + first // LANES + within,
                (token >= 0) & (token < packed_tokens),
                value_pair_planes,
                value_single_planes,
                G,
                D_PAD,
            )
            new = tl.dot(weights_low, values, tl.dot(weights_high, values))
            acc = acc * decay[:, None] + new * of_weights
            top = new_top
    at = (split * batches * HEADS + pair) * rows + row
    tl.store(tops + at, top, mask=row < rows)
    tl.store(totals + at, total, mask=row < rows)
    tl.store(parts + at[:, None] * D + d[None, :], acc, mask=real & (d < D)[None, :])
