"""Split-K decode attention: the kernels over packed blocks and over exact tokens. ``launch.py`` starts them.

``split_kernel``: program (batch × rotation group, split, tile of queries) reads its share of the blocks, 16 tokens at
a time: unpack, (code − zero)·scale, the inverse Hadamard as two small dots, RoPE, scores of every query head of the
group, online softmax (``softmax.py``), packed values weighted and added in their rotated space. ``exact_kernel``:
program (batch × KV head, tile of queries) attends to the tokens kept in 16 bits, as attention sees them. ``merge.py``
joins the parts.

Queries come after RoPE. Packed keys before RoPE are turned without an exchange of channels: with q⊥ = (q_high, −q_low),
q·rope(k) = (k∘cos)·q + (k∘sin)·q⊥ channel by channel, in whatever order the dots left the channels. Queries carry
softmax_scale·log2(e), and W^-0.5 where packed keys lack it.

Precision: every dot takes float16 numbers and adds in float32. What is no ±1 is brought into float16's range by a power
of two. For a model in float32 it is cut into two halves (TERMS 2), so the Hadamard dots, scores and values are good to
about 2^-21; for one in 16 bits the upper half is enough. The interpreter multiplies the same halves, so its tests show
the same rounding.

Keys that come after RoPE with one scale a head do without this kernel: ``grouped_attention.py``. What both take, and
what bounds them, is in docs/gpu.md.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rotatekv.kernels.triton.softmax import accumulate, load_queries, query_rows, score, store_part, visible
from rotatekv.kernels.triton.tiles import (
    LANES,
    RUN_TIME,
    block_angles,
    halves,
    head_channels,
    load_matrices,
    peak,
    read_packed,
    rotate,
    tile_channels,
)


@triton.jit(do_not_specialize=RUN_TIME)
def split_kernel(
    queries,
    key_low,
    key_high,
    key_scale,
    key_zero,
    value_low,
    value_high,
    value_scale,
    value_zero,
    group_of_channel,
    exact_lanes,
    first_seen,
    origin,
    left,
    right,
    coarse_cos,
    coarse_sin,
    fine_cos,
    fine_sin,
    table_rows,
    parts,
    tops,
    totals,
    batches,
    packed_tokens,
    total_tokens,
    query_tokens,
    window,
    key_blocks,
    value_blocks,
    exact_blocks,
    blocks_per_split,
    factor,
    attention_scaling,
    C: tl.constexpr,
    KEY_GROUPS: tl.constexpr,
    VALUE_GROUPS: tl.constexpr,
    KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    HALF: tl.constexpr,
    REPEAT: tl.constexpr,
    TILE: tl.constexpr,
    Q_PAD: tl.constexpr,
    DV_PAD: tl.constexpr,
    TERMS: tl.constexpr,
    EXACT: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    A_PAD: tl.constexpr,
    B_PAD: tl.constexpr,
    G_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    ROWS_PAD: tl.constexpr,
    ROTATED: tl.constexpr,
):
    """Packed tokens. EXACT: ``exact_lanes`` (B, exact_blocks) int32 has bit t set where token t is kept exactly."""
    batch, group = (tl.program_id(0) // (C // (G * D))).to(tl.int64), tl.program_id(0) % (C // (G * D))
    split, tile = tl.program_id(1), tl.program_id(2)
    heads = C // D * REPEAT
    place, real = head_channels(B, B_PAD, ROWS, ROWS_PAD)
    turns = place < 2 * HALF
    factors = tl.where(turns, factor * attention_scaling, factor)[None, :, None]
    partner = tl.where(place < HALF, place + HALF, place - HALF)
    q = (
        load_queries(queries, batch, group, tile, query_tokens, heads, place, real, REPEAT, TILE, Q_PAD, G, D, G_PAD)
        * factors
    )
    q_turned = (
        load_queries(
            queries, batch, group, tile, query_tokens, heads, partner, real & turns, REPEAT, TILE, Q_PAD, G, D, G_PAD
        )
        * factors
    )
    q_turned = tl.where((place < HALF)[None, :, None], q_turned, -q_turned)
    scale = peak(q)
    q_high, q_low = halves(q * (1 / scale))
    turned_high, turned_low = halves(q_turned * (1 / scale))
    a, b = load_matrices(left, right, A_PAD, B_PAD, G_PAD * ROWS_PAD)
    inside, keep = tile_channels(A, B, A_PAD, B_PAD)
    channel = group * (G * D) + inside
    side = tl.load(group_of_channel + channel, mask=keep, other=0)
    head, d = tl.arange(0, G_PAD)[:, None, None], tl.arange(0, DV_PAD)[None, :, None]
    value_keep = (head < G) & (d < D)
    value_channel = (group * G + head) * D + d  # (G_PAD, DV_PAD, 1)
    value_side = value_channel // (C // VALUE_GROUPS)
    start, column_0 = tl.load(first_seen + batch), tl.load(origin + batch)
    _, query, _ = query_rows(tile, query_tokens, REPEAT, TILE, Q_PAD)
    own = (total_tokens - query_tokens + query)[None, :]
    top = tl.full((G_PAD, Q_PAD), float("-inf"), tl.float32)
    total = tl.zeros((G_PAD, Q_PAD), tl.float32)
    acc = tl.zeros((G_PAD, DV_PAD, Q_PAD), tl.float32)
    cos, sin = tl.zeros((1, 1), tl.float32), tl.zeros((1, 1), tl.float32)
    seen_first = tl.maximum(start, total_tokens - query_tokens + tile * TILE - window + 1)  # by the tile's first query
    last = tl.minimum((split + 1) * blocks_per_split, (packed_tokens + LANES - 1) // LANES)
    for block in range(tl.maximum(split * blocks_per_split, seen_first // LANES), last):
        x = read_packed(
            key_low,
            key_high,
            key_scale,
            key_zero,
            batch * key_blocks + block,
            channel,
            side,
            keep,
            C,
            KEY_GROUPS,
            KEY_BITS,
        )
        keys = rotate(x, a, b, A_PAD, B_PAD, G_PAD, ROWS_PAD, ROTATED, TERMS)
        token = block * LANES + tl.arange(0, LANES)
        kept = (token >= start) & (token < packed_tokens)
        if EXACT:
            lanes = tl.load(exact_lanes + batch * exact_blocks + block)
            kept = kept & (((lanes >> tl.arange(0, LANES)) & 1) == 0)
        if HALF:
            turn_cos, turn_sin = block_angles(
                coarse_cos, coarse_sin, fine_cos, fine_sin, table_rows, block * LANES + column_0, place, HALF
            )
        else:
            turn_cos, turn_sin = cos, sin
        scores = score(
            q_high,
            q_low,
            turned_high,
            turned_low,
            scale,
            keys,
            turn_cos,
            turn_sin,
            visible(token, kept, own, window),
            HALF,
            TERMS,
        )
        values = read_packed(
            value_low,
            value_high,
            value_scale,
            value_zero,
            batch * value_blocks + block,
            value_channel,
            value_side,
            value_keep,
            C,
            VALUE_GROUPS,
            VALUE_BITS,
        )
        top, total, acc = accumulate(scores, values, top, total, acc, TERMS)
    store_part(
        parts,
        tops,
        totals,
        split,
        batch,
        batches,
        group,
        tile,
        query_tokens,
        heads,
        top,
        total,
        acc,
        REPEAT,
        TILE,
        Q_PAD,
        G,
        D,
        G_PAD,
        DV_PAD,
    )


@triton.jit(do_not_specialize=RUN_TIME)
def exact_kernel(
    queries,
    exact_keys,
    exact_values,
    token_index,
    offsets,
    first_seen,
    parts,
    tops,
    totals,
    batches,
    part,
    total_tokens,
    query_tokens,
    window,
    factor,
    C: tl.constexpr,
    D: tl.constexpr,
    REPEAT: tl.constexpr,
    TILE: tl.constexpr,
    Q_PAD: tl.constexpr,
    DV_PAD: tl.constexpr,
    TERMS: tl.constexpr,
):
    """Tokens kept in 16 bits: of sequence b those from offsets[b] to offsets[b + 1] − 1, all in one part."""
    batch, kv = (tl.program_id(0) // (C // D)).to(tl.int64), tl.program_id(0) % (C // D)
    tile = tl.program_id(1)
    heads = C // D * REPEAT
    d = tl.arange(0, DV_PAD)
    q = load_queries(queries, batch, kv, tile, query_tokens, heads, d, d < D, REPEAT, TILE, Q_PAD, 1, D, 1) * factor
    scale = peak(q)
    high, low = halves(q * (1 / scale))
    start = tl.load(first_seen + batch)
    _, query, _ = query_rows(tile, query_tokens, REPEAT, TILE, Q_PAD)
    own = (total_tokens - query_tokens + query)[None, :]
    top = tl.full((1, Q_PAD), float("-inf"), tl.float32)
    total = tl.zeros((1, Q_PAD), tl.float32)
    acc = tl.zeros((1, DV_PAD, Q_PAD), tl.float32)
    stop = tl.load(offsets + batch + 1)
    for index in range(tl.load(offsets + batch), stop, LANES):
        number = tl.arange(0, LANES).to(tl.int64) + index
        here = number < stop
        token = tl.load(token_index + number, mask=here, other=0)
        at, keep = number[None, None, :] * C + (kv * D + d)[None, :, None], here[None, None, :] & (d < D)[None, :, None]
        keys = tl.load(exact_keys + at, mask=keep, other=0.0).to(tl.float32)  # (1, DV_PAD, 16)
        values = tl.load(exact_values + at, mask=keep, other=0.0).to(tl.float32)
        seen = visible(token, here & (token >= start), own, window)
        scores = score(high, low, high, low, scale, keys, 0.0, 0.0, seen, 0, TERMS)
        top, total, acc = accumulate(scores, values, top, total, acc, TERMS)
    store_part(
        parts,
        tops,
        totals,
        part,
        batch,
        batches,
        kv,
        tile,
        query_tokens,
        heads,
        top,
        total,
        acc,
        REPEAT,
        TILE,
        Q_PAD,
        1,
        D,
        1,
        DV_PAD,
    )
