"""Quantize-and-pack: 16 tokens × one quantization group per program, written into the blocks in place.

What comes before rounding is a kernel of its own, ``transform.py``: a quantization group may gather its channels from
all rotation groups. Where nothing comes before it, heads are read as they lie, in any of three dtypes.

Equals ``kernels.quantize.quantize_groups`` and ``kernels.layout.write_blocks`` bit for bit: divisions are rounded to
nearest, roundings go to even, and the launch forbids fused multiply-add.

Roofline, from public specifications (not run on a GPU). Per token and channel at 2 bits: 4 bytes read, 0.3 written;
about 25 instructions, ten of them the division. That is 6 a byte against the 4.8 an A100 can do (9.7·10¹² a second over
2.04 TB/s) and the 10 of an H100 SXM (33·10¹² over 3.35): instructions and memory about even on the first, memory on
the second. One decoded token moves a few KB: bound by the launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from rotatekv.kernels.layout import BLOCK, HIGH_PLANE, Packed
from rotatekv.kernels.triton.plan import power_of_two
from rotatekv.kernels.triton.start import start as start_kernel
from rotatekv.kernels.triton.tiles import LANES, RUN_TIME, round_to_even
from rotatekv.kernels.triton.transform import transformed


@triton.jit
def _merge_word(plane, at, codes, lane, new, here, WIDTH: tl.constexpr):
    """Write the tokens ``new`` (16, 1) of a plane's words, WIDTH bits each; the other tokens keep theirs."""
    ones = (1 << WIDTH) - 1
    fresh = tl.sum(tl.where(new, codes << (WIDTH * lane), 0), 0).to(tl.int32)  # (GROUP_PAD,)
    taken = tl.sum(tl.where(new, ones << (WIDTH * lane), 0), 0).to(tl.int32)  # (1,)
    old = tl.load(plane + at, mask=here, other=0).to(tl.int32)
    tl.store(plane + at, ((old & ~taken) | fresh).to(plane.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=RUN_TIME)
def quantize_kernel(
    heads,
    stride_b,
    stride_h,
    stride_t,
    low,
    high,
    scales,
    zeros,
    order,
    start,
    tokens,
    blocks,
    clip,
    C: tl.constexpr,
    D: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    BITS: tl.constexpr,
    ORDERED: tl.constexpr,
):
    """Program (block counted from the first one written, batch, group). ORDERED: channel j is channel order[j]."""
    batch, block, group = tl.program_id(1).to(tl.int64), start // LANES + tl.program_id(0), tl.program_id(2)
    LEVELS: tl.constexpr = (1 << BITS) - 1
    lane = tl.arange(0, LANES)[:, None]
    place = tl.arange(0, GROUP_PAD)
    token = block * LANES + lane - start  # (16, 1) of heads
    new, here = (token >= 0) & (token < tokens), place < GROUP
    channel = group * GROUP + place  # (GROUP_PAD,)
    if ORDERED:
        channel = tl.load(order + channel, mask=here, other=0)
    at = (channel // D).to(tl.int64) * stride_h + channel % D
    numbers = tl.load(
        heads + batch * stride_b + token.to(tl.int64) * stride_t + at[None, :], mask=new & here[None, :], other=0.0
    ).to(tl.float32)
    top = tl.max(tl.where(here[None, :], numbers, float("-inf")), 1)  # (16,)
    bottom = tl.min(tl.where(here[None, :], numbers, float("inf")), 1)
    levels = tl.full((LANES,), LEVELS, tl.float32)
    top, bottom = top * clip, bottom * clip
    limit = tl.full((LANES,), 127.0, tl.float32)
    scale = tl.maximum(tl.div_rn(top - bottom, levels), tl.div_rn(tl.abs(bottom), limit))
    scale = tl.minimum(tl.maximum(scale, 2.0**-24), 65504.0).to(tl.float16)
    step = scale.to(tl.float32)
    zero = tl.minimum(tl.maximum(round_to_even(tl.div_rn(-bottom, step)), -127.0), 127.0)
    divisor = tl.broadcast_to(step[:, None], (LANES, GROUP_PAD))
    codes = round_to_even(tl.div_rn(numbers, divisor)) + zero[:, None]
    codes = tl.minimum(tl.maximum(codes, 0.0), LEVELS).to(tl.int32)  # (16, GROUP_PAD)
    word = (batch * blocks + block) * C + channel
    _merge_word(low, word, codes & 3, lane, new, here, 2)
    if BITS > 2:
        _merge_word(high, word, codes >> 2, lane, new, here, BITS - 2)
    at = ((batch * blocks + block) * (C // GROUP) + group) * LANES + tl.arange(0, LANES)
    written = (block * LANES + tl.arange(0, LANES) >= start) & (block * LANES + tl.arange(0, LANES) < start + tokens)
    tl.store(scales + at, scale, mask=written)
    tl.store(zeros + at, zero.to(tl.int8), mask=written)


def launch_quantize(
    heads: torch.Tensor,
    packed: Packed,
    start: int,
    bits: int,
    group_size: int,
    clip_ratio: float,
    order: torch.Tensor | None,
    width: int,
    unrope: tuple[torch.Tensor, torch.Tensor] | None,
) -> None:
    """Checked arguments of ``rotatekv.kernels.triton.quantize_into_blocks``."""
    tokens, low = heads.shape[2], packed["low"]
    if not tokens:
        return
    if width or unrope is not None:
        heads = transformed(heads, width, unrope).unsqueeze(1)  # one head of C channels
    batch, blocks, channels = low.shape
    touched = -(-(start + tokens) // BLOCK) - start // BLOCK
    start_kernel(
        quantize_kernel,
        (touched, batch, channels // group_size),
        heads,
        *heads.stride()[:3],
        low,
        packed["high"] if bits in HIGH_PLANE else low,
        packed["scale"],
        packed["zero"],
        low if order is None else order,
        start,
        tokens,
        blocks,
        clip_ratio,
        C=channels,
        D=heads.shape[3],
        GROUP=group_size,
        GROUP_PAD=power_of_two(group_size),
        BITS=bits,
        ORDERED=order is not None,
        num_warps=4,
        enable_fp_fusion=False,
    )
