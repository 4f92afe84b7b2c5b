"""Queries in the frames of transform-coded keys: turned back by the frame's position, and mapped.

Equals ``q_f = R(−o)·q``, then ``q_f·[A⁻¹·γ, (R(j)·μ)ᵀ]`` (``kernels/transform_coding.py``): what a frame's codes are
multiplied by, and the score of the mean at each of its places. One product for all frames and query rows of a KV head.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rotatekv.kernels.triton.coded_tiles import dot_table
from rotatekv.kernels.triton.tiles import LANES, RUN_TIME


@triton.jit(do_not_specialize=RUN_TIME)
def coded_queries_kernel(
    queries,
    table,
    origin,
    coarse_cos,
    coarse_sin,
    fine_cos,
    fine_sin,
    table_rows,
    out,
    rows,
    frames,
    frame_start,
    factor,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    FRAME: tl.constexpr,
    HALF: tl.constexpr,
    ROWS_TILE: tl.constexpr,
    COLUMNS_TILE: tl.constexpr,
    INNER: tl.constexpr,
):
    """Program (batch × KV head, tile of frames × query rows, tile of columns) → out (B, H_kv, frames, rows, D + FRAME).

    queries: (B, H_kv, rows, D). table: ``coded_tables.query_table``. frame_start: the first frame's first token, ≤ 0.
    """
    pair = tl.program_id(0).to(tl.int64)
    batch, head = pair // HEADS, pair % HEADS
    number = tl.program_id(1) * ROWS_TILE + tl.arange(0, ROWS_TILE)
    column = tl.program_id(2) * COLUMNS_TILE + tl.arange(0, COLUMNS_TILE)
    frame, row, real = number // rows, number % rows, number < frames * rows
    position = tl.load(origin + batch) + frame_start + frame * FRAME
    far = tl.abs(position)  # a frame of padding may begin before position 0
    coarse = tl.minimum(far // LANES, table_rows - 1)
    fine = tl.minimum(far - LANES * coarse, 2 * LANES - 1)[:, None]
    side = tl.where(position < 0, -1.0, 1.0)[:, None]
    acc = tl.zeros((ROWS_TILE, COLUMNS_TILE), tl.float32)
    for start in range(0, D, INNER):
        d = start + tl.arange(0, INNER)
        keep = real[:, None] & (d < D)[None, :]
        at = queries + ((pair * rows + row) * D)[:, None]
        q = tl.load(at + d[None, :], mask=keep, other=0.0)
        if HALF:
            turns = keep & (d < 2 * HALF)[None, :]
            partner = tl.load(at + tl.where(d < HALF, d + HALF, d - HALF)[None, :], mask=turns, other=0.0)
            a, b = (coarse * HALF)[:, None] + (d % HALF)[None, :], (d % HALF * (2 * LANES))[None, :] + fine
            cos_a, sin_a = (
                tl.load(coarse_cos + a, mask=turns, other=1.0),
                tl.load(coarse_sin + a, mask=turns, other=0.0),
            )
            cos_b, sin_b = tl.load(fine_cos + b, mask=turns, other=1.0), tl.load(fine_sin + b, mask=turns, other=0.0)
            sin = (sin_a * cos_b + cos_a * sin_b) * side
            q = q * (cos_a * cos_b - sin_a * sin_b) + tl.where((d < HALF)[None, :], partner, -partner) * sin
        of_table = table + (head * D + d)[:, None] * (D + FRAME) + column[None, :]
        by = tl.load(of_table, mask=(d < D)[:, None] & (column < D + FRAME)[None, :], other=0.0)
        acc = dot_table(q * factor, by, acc)
    at = out + (pair * frames * rows + number)[:, None] * (D + FRAME) + column[None, :]
    tl.store(at, acc, mask=real[:, None] & (column < D + FRAME)[None, :])
