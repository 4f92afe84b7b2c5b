"""Dequantize for prefill: one block of 16 tokens × one rotation group per program, un-rotated, with or without RoPE.

Equals ``layout.unpack_blocks``, ``(code − zero)·scale``, ``rotate_channels(inverse=True)`` and RoPE.

Roofline, from public specifications (not run on a GPU). Per token and channel at 2 bits: 0.3 bytes read, 2 (float16)
or 4 written; 4·(a + b) tensor-core operations in float16, 192 at W = 512 and 171 at W = 192 with its padding, twice
that with RoPE; 25 to 35 other instructions. In 10¹² channels a second, float16 with RoPE at W = 512: an A100 (2.04
TB/s, 312 TFLOP/s float16, 9.7·10¹² instructions/s) at most 0.9 by its memory, 0.8 by the dots, 0.3 by the instructions;
an H100 SXM (3.35, 989, 33·10¹²) 1.5, 2.6 and 0.9. So bound by the instructions, within a factor of three of memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from rotatekv.kernels.affine import Affine
from rotatekv.kernels.layout import HIGH_PLANE
from rotatekv.kernels.reference import Packed
from rotatekv.kernels.rope_tables import RopeTables
from rotatekv.kernels.triton.plan import factor, matrices, partner_matrix
from rotatekv.kernels.triton.start import start
from rotatekv.kernels.triton.tiles import (
    LANES,
    RUN_TIME,
    block_angles,
    head_channels,
    load_affine,
    load_matrices,
    read_packed,
    tile_channels,
    unrotate,
)


@triton.jit(do_not_specialize=RUN_TIME)
def dequantize_kernel(out, low, high, scale, zero, group_of_channel, key_factor, key_offset, first, left, right,
                      partner, coarse_cos, coarse_sin, fine_cos, fine_sin, tokens, blocks, norm, attention_scaling,
                      C: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr, HALF: tl.constexpr,
                      G: tl.constexpr, D: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
                      A_PAD: tl.constexpr, B_PAD: tl.constexpr, G_PAD: tl.constexpr,
                      ROWS: tl.constexpr, ROWS_PAD: tl.constexpr, ROTATED: tl.constexpr,
                      AFFINE: tl.constexpr):  # fmt: skip
    """Program (block, batch, rotation group) → out (B, T, C); HALF 0: no RoPE, just then there may be AFFINE."""
    block, batch, group = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    inside, keep = tile_channels(A, B, A_PAD, B_PAD)
    channel = group * (G * D) + inside
    side = tl.load(group_of_channel + channel, mask=keep, other=0)
    x = read_packed(low, high, scale, zero, batch * blocks + block, channel, side, keep, C, GROUPS, BITS)
    a, b = load_matrices(left, right, A_PAD, B_PAD, G_PAD * ROWS_PAD)
    y = unrotate(x, a, b, A_PAD, B_PAD, G_PAD, ROWS_PAD, ROTATED) * norm  # (G_PAD, D', 16)
    place, here = head_channels(B, B_PAD, ROWS, ROWS_PAD)  # (D',)
    if AFFINE:
        by, plus = load_affine(key_factor, key_offset, group, 1.0, G, D, B, B_PAD, G_PAD, ROWS, ROWS_PAD)
        y = y * by + plus
    if HALF:
        turned, _ = load_matrices(partner, right, A_PAD, B_PAD, G_PAD * ROWS_PAD)
        z = unrotate(x, turned, b, A_PAD, B_PAD, G_PAD, ROWS_PAD, ROTATED) * norm
        position = block * LANES - tl.load(first + batch)
        cos, sin = block_angles(coarse_cos, coarse_sin, fine_cos, fine_sin, position, place, HALF)  # (D', 16)
        factor = tl.where(place < 2 * HALF, attention_scaling, 1.0)[:, None]
        y = y * (cos * factor)[None, :, :] + z * (sin * factor)[None, :, :]
    head = tl.arange(0, G_PAD)[:, None, None]
    token = block * LANES + tl.arange(0, LANES)[None, None, :]
    at = (batch * tokens + token) * C + group * (G * D) + head * D + place[None, :, None]
    tl.store(out + at, y.to(out.dtype.element_ty), mask=(head < G) & here[None, :, None] & (token < tokens))


def launch_dequantize(
    packed: Packed, tokens: int, bits: int, group_of_channel: torch.Tensor, head_dim: int, width: int,
    rope: RopeTables | None, first: torch.Tensor, dtype: torch.dtype, affine: Affine | None = None,
) -> torch.Tensor:  # fmt: skip
    """Checked arguments of ``rotatekv.kernels.triton.dequantize_blocks``."""
    low = packed["low"]
    batch, blocks, channels = low.shape
    out = torch.empty(batch, tokens, channels, dtype=dtype, device=low.device)
    half = rope.rotary_dim // 2 if rope else 0
    factors = factor(width, head_dim, half)
    if half and not width:  # the partner is found by a dot, so channels go through identities
        factors = factors.with_dots()
    left, right = matrices(factors, low.device)
    partner = partner_matrix(factors, half, low.device) if half else left
    tables = (rope.coarse_cos, rope.coarse_sin, rope.fine_cos, rope.fine_sin) if rope else (left,) * 4
    grid = (-(-tokens // LANES.value), batch, channels // factors.width)
    by_channel = (affine.factor, affine.offset) if affine else (left, left)
    start(
        dequantize_kernel, grid, out, low, packed["high"] if bits in HIGH_PLANE else low, packed["scale"],
        packed["zero"], group_of_channel, *by_channel, first, left, right, partner, *tables, tokens, blocks,
        factors.norm, rope.attention_scaling if rope else 1.0, C=channels, GROUPS=packed["scale"].shape[2], BITS=bits,
        HALF=half, **factors.constants(), AFFINE=affine is not None, num_warps=factors.warps,
    )  # fmt: skip
    return out
