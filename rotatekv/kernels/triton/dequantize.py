"""Dequantize for prefill: one block of 16 tokens × one rotation group per program, un-rotated, written as heads.

Equals ``layout.unpack_blocks``, ``(code − zero)·scale`` and ``rotate_channels(inverse=True)``.

Roofline, from public specifications (not run on a GPU). Per token and channel at 2 bits: 0.3 bytes read, 2 (float16)
or 4 written; 4·(a + b) tensor-core operations in float16, 192 at W = 512 and 171 at W = 192 with its padding; 25 to 35
other instructions. In 10¹² channels a second, float16 at W = 512: an A100 (2.04 TB/s, 312 TFLOP/s float16, 9.7·10¹²
instructions/s) at most 0.9 by its memory, 1.6 by the dots, 0.3 by the instructions; an H100 SXM (3.35, 989, 33·10¹²)
1.5, 5.2 and 1.1. So bound by the instructions, within a factor of three of memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from rotatekv.kernels.layout import HIGH_PLANE, Packed
from rotatekv.kernels.triton.plan import factor, matrices
from rotatekv.kernels.triton.start import start
from rotatekv.kernels.triton.tiles import (
    LANES,
    RUN_TIME,
    head_channels,
    load_matrices,
    read_packed,
    rotate,
    tile_channels,
)


@triton.jit(do_not_specialize=RUN_TIME)
def dequantize_kernel(
    out,
    low,
    high,
    scale,
    zero,
    group_of_channel,
    left,
    right,
    tokens,
    room,
    blocks,
    norm,
    C: tl.constexpr,
    GROUPS: tl.constexpr,
    BITS: tl.constexpr,
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
    """Program (block, batch, rotation group) → out (B, H_kv, room, D)."""
    block, batch, group = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    inside, keep = tile_channels(A, B, A_PAD, B_PAD)
    channel = group * (G * D) + inside
    side = tl.load(group_of_channel + channel, mask=keep, other=0)
    x = read_packed(low, high, scale, zero, batch * blocks + block, channel, side, keep, C, GROUPS, BITS)
    a, b = load_matrices(left, right, A_PAD, B_PAD, G_PAD * ROWS_PAD)
    y = rotate(x, a, b, A_PAD, B_PAD, G_PAD, ROWS_PAD, ROTATED, 2) * norm  # (G_PAD, D', 16)
    place, here = head_channels(B, B_PAD, ROWS, ROWS_PAD)  # (D',)
    head = tl.arange(0, G_PAD)[:, None, None]
    token = block * LANES + tl.arange(0, LANES)[None, None, :]
    at = ((batch * (C // D) + group * G + head) * room + token) * D + place[None, :, None]
    tl.store(out + at, y.to(out.dtype.element_ty), mask=(head < G) & here[None, :, None] & (token < tokens))


def launch_dequantize(
    packed: Packed, tokens: int, bits: int, group_of_channel: torch.Tensor, width: int, out: torch.Tensor
) -> None:
    """Checked arguments of ``rotatekv.kernels.triton.dequantize_blocks``."""
    low = packed["low"]
    batch, blocks, channels = low.shape
    factors = factor(width, out.shape[3])
    left, right = matrices(factors, low.device)
    start(
        dequantize_kernel,
        (-(-tokens // LANES.value), batch, channels // factors.width),
        out,
        low,
        packed["high"] if bits in HIGH_PLANE else low,
        packed["scale"],
        packed["zero"],
        group_of_channel,
        left,
        right,
        tokens,
        out.shape[2],
        blocks,
        factors.norm,
        C=channels,
        GROUPS=packed["scale"].shape[2],
        BITS=bits,
        **factors.constants(),
        num_warps=factors.warps,
    )
