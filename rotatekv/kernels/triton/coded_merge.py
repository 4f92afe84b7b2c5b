"""The parts of an attention over transform-coded tokens joined, and their components mapped back to values."""

from __future__ import annotations

import triton
import triton.language as tl

from rotatekv.kernels.triton.coded_tiles import dot_table
from rotatekv.kernels.triton.merge import join
from rotatekv.kernels.triton.tiles import RUN_TIME


@triton.jit(do_not_specialize=RUN_TIME)
def coded_merge_kernel(
    parts,
    tops,
    totals,
    inverse,
    mean,
    out,
    splits,
    rows,
    rows_of_all,
    batches,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    Q_PAD: tl.constexpr,
    COLUMNS_TILE: tl.constexpr,
):
    """Program (batch × KV head, tile of 16 query rows): ``A⁻¹·γ·(Σ components) + μ·(Σ weights)``, an exact part added.

    inverse: (H_kv, D, D), transposed. rows_of_all: of all parts, B·H_kv·rows each; the exact one comes last.
    """
    pair = tl.program_id(0).to(tl.int64)
    head = pair % HEADS
    row = tl.program_id(1) * Q_PAD + tl.arange(0, Q_PAD)
    here, d = row < rows, tl.arange(0, D_PAD)
    top = tl.full((Q_PAD,), float("-inf"), tl.float32)
    total = tl.zeros((Q_PAD,), tl.float32)
    acc = tl.zeros((Q_PAD, D_PAD), tl.float32)
    at = pair * rows + row
    for _ in range(splits):
        top, total, decay, weight = join(
            top, total, tl.load(tops + at, mask=here, other=float("-inf")), tl.load(totals + at, mask=here, other=0.0)
        )
        part = tl.load(parts + at[:, None] * D + d[None, :], mask=here[:, None] & (d < D)[None, :], other=0.0)
        acc = acc * decay[:, None] + part * weight[:, None]
        at += batches * HEADS * rows
    packed = total
    kept = here & (at < rows_of_all)  # there is one more part
    top, total, decay, weight = join(
        top, total, tl.load(tops + at, mask=kept, other=float("-inf")), tl.load(totals + at, mask=kept, other=0.0)
    )
    share = tl.where(total > 0, 1 / total, 0.0)
    acc *= (decay * share)[:, None]
    for start in range(0, D_PAD, COLUMNS_TILE):
        column = start + tl.arange(0, COLUMNS_TILE)
        inside = column < D
        table = tl.load(
            inverse + (head * D + d)[:, None] * D + column[None, :], mask=(d < D)[:, None] & inside[None, :], other=0.0
        )
        y = dot_table(acc, table, tl.zeros((Q_PAD, COLUMNS_TILE), tl.float32))
        y += tl.load(mean + head * D + column, mask=inside, other=0.0)[None, :] * (packed * decay * share)[:, None]
        places = at[:, None] * D + column[None, :]
        exact = tl.load(parts + places, mask=kept[:, None] & inside[None, :], other=0.0)
        y += exact * (weight * share)[:, None]
        places = (pair * rows + row)[:, None] * D + column[None, :]
        tl.store(out + places, y, mask=here[:, None] & inside[None, :])
