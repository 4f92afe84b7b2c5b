"""The parts of an attention joined: the packed ones added and un-rotated where asked, then the exact one added."""

from __future__ import annotations

import triton
import triton.language as tl

from rotatekv.kernels.triton.tiles import LANES, RUN_TIME, head_channels, load_matrices, rotate, tile_channels


@triton.jit
def join(top, total, other_top, other_total):
    """Two parts of a softmax: the larger top, the sum of both, and the factors on what each has added up."""
    new_top = tl.maximum(top, other_top)
    safe = tl.where(new_top == float("-inf"), 0.0, new_top)
    decay, weight = tl.exp2(top - safe), tl.exp2(other_top - safe)
    return new_top, total * decay + other_total * weight, decay, weight


@triton.jit(do_not_specialize=RUN_TIME)
def merge_kernel(
    parts,
    tops,
    totals,
    left,
    right,
    out,
    splits,
    rows,
    rows_of_all,
    norm,
    D: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    A_PAD: tl.constexpr,
    B_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    ROWS_PAD: tl.constexpr,
    ROTATED: tl.constexpr,
):
    """16 rows (of batch, query head, query) per program: packed parts joined and un-rotated, an exact one added.

    Bound by memory: 4·(D + 2) bytes read per part and row, about 2·D + 4 operations.
    """
    row = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    here = row < rows
    inside, keep = tile_channels(A, B, A_PAD, B_PAD)  # (A_PAD, B_PAD, 1)
    top = tl.full((LANES,), float("-inf"), tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    acc = tl.zeros((A_PAD, B_PAD, LANES), tl.float32)
    at = row
    for _ in range(splits):
        top, total, decay, weight = join(
            top, total, tl.load(tops + at, mask=here, other=float("-inf")), tl.load(totals + at, mask=here, other=0.0)
        )
        part = tl.load(parts + at[None, None, :] * D + inside, mask=keep & here[None, None, :], other=0.0)
        acc = acc * decay[None, None, :] + part * weight[None, None, :]
        at += rows
    kept = here & (at < rows_of_all)  # there is one more part
    top, total, decay, weight = join(
        top, total, tl.load(tops + at, mask=kept, other=float("-inf")), tl.load(totals + at, mask=kept, other=0.0)
    )
    share = tl.where(total > 0, 1 / total, 0.0)
    a, b = load_matrices(left, right, A_PAD, B_PAD, ROWS_PAD)
    result = rotate(acc * (decay * share * norm)[None, None, :], a, b, A_PAD, B_PAD, 1, ROWS_PAD, ROTATED, 2)
    channel, real = head_channels(B, B_PAD, ROWS, ROWS_PAD)
    channel, real = channel[None, :, None], real[None, :, None]
    exact = tl.load(parts + at[None, None, :] * D + channel, mask=kept[None, None, :] & real, other=0.0)  # (1, D', 16)
    tl.store(
        out + row[None, None, :] * D + channel,
        result + exact * (weight * share)[None, None, :],
        mask=here[None, None, :] & real,
    )
