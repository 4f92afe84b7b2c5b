"""Queries in the frames of transform-coded keys: turned back by the frame's position, and mapped.

Equals ``q_f = R(−o)·q``, then ``q_f`` times the columns of ``coded_tables.QueryTable``: the score of the mean at each
place of a frame, and what a frame's codes are multiplied by. One product for all frames and query rows of a KV head.

A query is divided by a power of two near its length, so that the codes' numbers fit float16 as they are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rotatekv.kernels.triton.tiles import LANES, RUN_TIME, halves, power_below


@triton.jit(do_not_specialize=RUN_TIME)
def coded_queries_kernel(
    queries,
    table,
    table_lower,
    column_scale,
    unit,
    origin,
    coarse_cos,
    coarse_sin,
    fine_cos,
    fine_sin,
    table_rows,
    codes,
    means,
    row_scale,
    rows,
    frames,
    frame_start,
    query_planes,
    factor,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    MEANS: tl.constexpr,
    FRAME: tl.constexpr,
    HALF: tl.constexpr,
    TERMS: tl.constexpr,
    ROWS_TILE: tl.constexpr,
    COLUMNS_TILE: tl.constexpr,
):
    """Program (batch × KV head, tile of frames × query rows).

    Args:
        queries: (B, H_kv, rows, D). table … unit: of ``coded_tables.QueryTable``.
        codes: out, (B, H_kv, frames, rows, TERMS, 16·query_planes) float16, the upper and the lower halves.
        means: out, (B, H_kv, frames, rows, MEANS) float32. row_scale: out, (B, H_kv, rows) float32, what scores lack.
        frame_start: the first frame's first token, ≤ 0.
    """
    pair = tl.program_id(0).to(tl.int64)
    batch, head = pair // HEADS, pair % HEADS
    number, d = tl.program_id(1) * ROWS_TILE + tl.arange(0, ROWS_TILE), tl.arange(0, D_PAD)
    frame, row, real = number // rows, number % rows, number < frames * rows
    position = tl.load(origin + batch) + frame_start + frame * FRAME
    far = tl.abs(position)  # a frame of padding may begin before position 0
    coarse = tl.minimum(far // LANES, table_rows - 1)
    fine = tl.minimum(far - LANES * coarse, 2 * LANES - 1)[:, None]
    side = tl.where(position < 0, -1.0, 1.0)[:, None]
    keep = real[:, None] & (d < D)[None, :]
    at = queries + pair * rows * D + (row * D)[:, None]
    q = tl.load(at + d[None, :], mask=keep, other=0.0).to(tl.float32)
    length = power_below(tl.sqrt(tl.sum(q * q, 1)))
    if HALF:
        turns = keep & (d < 2 * HALF)[None, :]
        partner = tl.load(at + tl.where(d < HALF, d + HALF, d - HALF)[None, :], mask=turns, other=0.0).to(tl.float32)
        a, b = (coarse * HALF)[:, None] + (d % HALF)[None, :], (d % HALF * (2 * LANES))[None, :] + fine
        cos_a, sin_a = tl.load(coarse_cos + a, mask=turns, other=1.0), tl.load(coarse_sin + a, mask=turns, other=0.0)
        cos_b, sin_b = tl.load(fine_cos + b, mask=turns, other=1.0), tl.load(fine_sin + b, mask=turns, other=0.0)
        sin = (sin_a * cos_b + cos_a * sin_b) * side
        q = q * (cos_a * cos_b - sin_a * sin_b) + tl.where((d < HALF)[None, :], partner, -partner) * sin
    tl.store(row_scale + pair * rows + row, length * tl.load(unit + head) * factor, mask=real & (frame == 0))
    upper, lower = halves(q * (1 / length)[:, None])
    columns = MEANS + query_planes * LANES
    of_table = head * D * columns + d[:, None] * columns
    means += pair * frames * rows * MEANS + number[:, None].to(tl.int64) * MEANS
    codes += (pair * frames * rows + number[:, None]) * (TERMS * query_planes * LANES)
    for first in range(0, columns, COLUMNS_TILE):
        column = first + tl.arange(0, COLUMNS_TILE)
        inside = (d < D)[:, None] & (column < columns)[None, :]
        by = tl.load(table + of_table + column[None, :], mask=inside, other=0.0)
        acc = tl.dot(lower, by, tl.dot(upper, by))
        acc = tl.dot(upper, tl.load(table_lower + of_table + column[None, :], mask=inside, other=0.0), acc)
        acc *= tl.load(column_scale + head * columns + column, mask=column < columns, other=0.0)[None, :]
        tl.store(means + column[None, :], acc, mask=real[:, None] & (column < MEANS)[None, :])
        of_codes = real[:, None] & ((column >= MEANS) & (column < columns))[None, :]
        high, low = halves(acc)
        tl.store(codes + (column - MEANS)[None, :], high, mask=of_codes)
        if TERMS == 2:
            tl.store(codes + (column - MEANS + query_planes * LANES)[None, :], low, mask=of_codes)
