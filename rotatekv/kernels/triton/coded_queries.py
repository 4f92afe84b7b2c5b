"""Queries in the frames of transform-coded keys: turned back by the frame's position, and mapped.

Equals ``q_f = R(−o)·q``, then ``q_f`` times the columns of a ``QueryTable``: of a frame, the score of the mean at each
place, and what its codes are multiplied by. One product for all frames and query rows of a KV head. Keys that are in no
frame have one of all tokens.

A query is divided by a power of two near its length, so that the codes' numbers fit float16 as they are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from rotatekv.kernels.rope_tables import RopeTables
from rotatekv.kernels.transform_coding import FRAME, GROUP
from rotatekv.kernels.triton.plan import power_of_two, terms_of
from rotatekv.kernels.triton.query_tables import QueryTable
from rotatekv.kernels.triton.start import start
from rotatekv.kernels.triton.tiles import LANES, RUN_TIME, halves, power_below

ROWS_TILE, COLUMNS_TILE = 32, 64
_STAGES = 1


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
    floats,
    row_scale,
    rows,
    frames,
    frame_start,
    query_planes,
    factor,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    FLOATS: tl.constexpr,
    FRAME: tl.constexpr,
    HALF: tl.constexpr,
    TERMS: tl.constexpr,
    ROWS_TILE: tl.constexpr,
    COLUMNS_TILE: tl.constexpr,
):
    """Program (batch × KV head, tile of frames × query rows).

    Args:
        queries: (B, H_kv, rows, D). table … unit: of ``QueryTable``.
        codes: out, (B, H_kv, frames, rows, TERMS, 16·query_planes) float16, the upper and the lower halves.
        floats: out, (B, H_kv, frames, rows, FLOATS) float32. row_scale: out, (B, H_kv, rows) float32, what scores lack.
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
    columns = FLOATS + query_planes * LANES
    of_table = head * D * columns + d[:, None] * columns
    floats += pair * frames * rows * FLOATS + number[:, None].to(tl.int64) * FLOATS
    codes += (pair * frames * rows + number[:, None]) * (TERMS * query_planes * LANES)
    for first in range(0, columns, COLUMNS_TILE):
        column = first + tl.arange(0, COLUMNS_TILE)
        inside = (d < D)[:, None] & (column < columns)[None, :]
        by = tl.load(table + of_table + column[None, :], mask=inside, other=0.0)
        acc = tl.dot(lower, by, tl.dot(upper, by))
        acc = tl.dot(upper, tl.load(table_lower + of_table + column[None, :], mask=inside, other=0.0), acc)
        acc *= tl.load(column_scale + head * columns + column, mask=column < columns, other=0.0)[None, :]
        tl.store(floats + column[None, :], acc, mask=real[:, None] & (column < FLOATS)[None, :])
        of_codes = real[:, None] & ((column >= FLOATS) & (column < columns))[None, :]
        high, low = halves(acc)
        tl.store(codes + (column - FLOATS)[None, :], high, mask=of_codes)
        if TERMS == 2:
            tl.store(codes + (column - FLOATS + query_planes * LANES)[None, :], low, mask=of_codes)


def launch_queries(
    queries: torch.Tensor,
    origin: torch.Tensor,
    frames: int,
    frame_start: int,
    factor: float,
    table: QueryTable,
    rope: RopeTables | None,
) -> tuple[torch.Tensor, ...]:
    """What ``coded_queries_kernel`` writes: numbers for codes, those in float32, and the factor on a row's scores.

    Args:
        frames, frame_start: of keys in frames; 1 and 0 of others, without ``rope``.
        factor: makes scores of them, in log2 units.
    """
    batch, heads, query_tokens, dim = queries.shape
    kv_heads, device = len(table.unit), queries.device
    rows, columns = heads // kv_heads * query_tokens, table.table.shape[2]
    terms, floats = terms_of(queries), columns - table.planes * GROUP
    codes = torch.empty(batch, kv_heads, frames, rows, terms, table.planes * GROUP, dtype=torch.float16, device=device)
    means = torch.empty(batch, kv_heads, frames, rows, floats, dtype=torch.float32, device=device)
    row_scale = torch.empty(batch, kv_heads, rows, dtype=torch.float32, device=device)
    tables = (rope.coarse_cos, rope.coarse_sin, rope.fine_cos, rope.fine_sin) if rope else (table.unit,) * 4
    start(
        coded_queries_kernel,
        (batch * kv_heads, -(-frames * rows // ROWS_TILE)),
        queries,
        table.table,
        table.table_lower,
        table.column_scale,
        table.unit,
        origin,
        *tables,
        tables[0].shape[0],
        codes,
        means,
        row_scale,
        rows,
        frames,
        frame_start,
        table.planes,
        factor,
        HEADS=kv_heads,
        D=dim,
        D_PAD=power_of_two(dim),
        FLOATS=floats,
        FRAME=FRAME,
        HALF=rope.rotary_dim // 2 if rope else 0,
        TERMS=terms,
        ROWS_TILE=ROWS_TILE,
        COLUMNS_TILE=COLUMNS_TILE,
        num_warps=8 if dim > 128 else 4,  # 4 spill 440 bytes at 256
        num_stages=_STAGES,
    )
    return codes, means, row_scale
