"""What keys and values go through before they are rounded: un-RoPE and the Hadamard matrix.

A program takes 16 tokens of one rotation group, from heads of any strides to channels (B, T, C) float32. Equals the
first two steps of ``blocks.quantize_into_blocks_reference``: bit for bit without a rotation, and with one
to about 2^-21 of a token's largest number, as its dots take halves (``attention.py``).

Roofline, from public specifications (not run on a GPU). Per token and channel: 2 bytes read (float16), those
again for RoPE's partner, 4 written; 4·(a + b) tensor-core operations, 192 at W = 512; about 30 other instructions. As
``dequantize.py``, bound by the instructions, within a factor of three of memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from rotatekv.kernels.triton.plan import factor, matrices
from rotatekv.kernels.triton.start import start
from rotatekv.kernels.triton.tiles import LANES, RUN_TIME, head_channels, load_matrices, rotate, tile_channels


@triton.jit(do_not_specialize=RUN_TIME)
def transform_kernel(
    heads,
    stride_b,
    stride_h,
    stride_t,
    cos,
    sin,
    table_b,
    table_t,
    left,
    right,
    out,
    tokens,
    norm,
    C: tl.constexpr,
    HALF: tl.constexpr,
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
    """Program (run of 16 tokens, batch, rotation group)."""
    run, batch, group = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    inside, keep = tile_channels(A, B, A_PAD, B_PAD)  # (A_PAD, B_PAD, 1)
    head, d = group * G + inside // D, inside % D
    token = run.to(tl.int64) * LANES + tl.arange(0, LANES)[None, None, :]
    keep = keep & (token < tokens)
    at = heads + batch * stride_b + token * stride_t + head.to(tl.int64) * stride_h
    x = tl.load(at + d, mask=keep, other=0.0).to(tl.float32)
    if HALF:
        turns = keep & (d < 2 * HALF)
        partner = tl.load(at + tl.where(d < HALF, d + HALF, d - HALF), mask=turns, other=0.0).to(tl.float32)
        angle = batch * table_b + token * table_t + d % HALF
        x = x * tl.load(cos + angle, mask=turns, other=1.0) + (
            tl.where(d < HALF, partner, -partner) * tl.load(sin + angle, mask=turns, other=0.0)
        )
    a, b = load_matrices(left, right, A_PAD, B_PAD, G_PAD * ROWS_PAD)
    y = rotate(x, a, b, A_PAD, B_PAD, G_PAD, ROWS_PAD, ROTATED, 2) * norm  # (G_PAD, D', 16)
    place, real = head_channels(B, B_PAD, ROWS, ROWS_PAD)
    head = tl.arange(0, G_PAD)[:, None, None]
    channel = (group * G + head) * D + place[None, :, None]
    tl.store(out + (batch * tokens + token) * C + channel, y, mask=(head < G) & real[None, :, None] & (token < tokens))


def transformed(heads: torch.Tensor, width: int, unrope: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
    """(B, H_kv, T, D) → (B, T, C) float32; checked arguments of ``rotatekv.kernels.triton.quantize_into_blocks``."""
    batch, count, tokens, dim = heads.shape
    out = torch.empty(batch, tokens, count * dim, dtype=torch.float32, device=heads.device)
    factors = factor(width, dim)
    left, right = matrices(factors, heads.device, inverse=False)
    cos, sin = unrope or (left, left)
    start(
        transform_kernel,
        (-(-tokens // LANES.value), batch, count * dim // factors.width),
        heads,
        *heads.stride()[:3],
        cos,
        sin,
        *cos.stride()[:2],
        left,
        right,
        out,
        tokens,
        factors.norm,
        C=count * dim,
        HALF=cos.shape[2] if unrope else 0,
        **factors.constants(),
        num_warps=factors.warps,
        enable_fp_fusion=False,
    )
    return out
