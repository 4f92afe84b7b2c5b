"""What the kernels share: reading packed blocks into a tile, rotating it, and RoPE's cos and sin.

A tile holds 16 tokens in its last dimension: one word gives all 16, and so does one run of scales.
"""

from __future__ import annotations

import triton
import triton.language as tl

LANES = tl.constexpr(16)  # tokens of a block
_MAGIC = tl.constexpr(12582912.0)  # 1.5·2^23: adding it rounds a float32 below 2^22 to even
RUN_TIME = [  # the kernels' numbers that are no constants: not compiled anew where one is 1 or a multiple of 16
    "batches",
    "blocks",
    "blocks_per_split",
    "exact_blocks",
    "frame_start",
    "frames",
    "key_blocks",
    "key_pair_planes",
    "key_single_planes",
    "packed_tokens",
    "pair_planes",
    "part",
    "query_planes",
    "query_tokens",
    "room",
    "rows",
    "rows_of_all",
    "single_planes",
    "single_start",
    "splits",
    "start",
    "table_b",
    "table_rows",
    "table_t",
    "tiles_per_split",
    "tokens",
    "total_tokens",
    "value_blocks",
    "value_pair_planes",
    "value_single_planes",
    "window",
]


@triton.jit
def round_to_even(x):
    """To the nearest integer, of two the even one; x below 2^22."""
    return (x + _MAGIC) - _MAGIC


@triton.jit
def read_packed(
    low, high, scale, zero, block, channel, group, keep, C: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr
):
    """Dequantized numbers of one block: (code − zero)·scale.

    Args:
        block: its number counted over all sequences, int64.
        channel, group, keep: (..., 1), channels of the sequence, their quantization groups, which of them exist.

    Returns:
        (..., 16) float32, zeros where not ``keep``.
    """
    lane = tl.arange(0, LANES)[None, None, :]
    word = block * C + channel
    code = (tl.load(low + word, mask=keep, other=0) >> (2 * lane)) & 3
    if BITS == 3:
        code |= ((tl.load(high + word, mask=keep, other=0).to(tl.int32) >> lane) & 1) << 2
    if BITS == 4:
        code |= ((tl.load(high + word, mask=keep, other=0) >> (2 * lane)) & 3) << 2
    at = (block * GROUPS + group) * LANES + lane
    factor = tl.load(scale + at, mask=keep, other=0.0).to(tl.float32)
    offset = tl.load(zero + at, mask=keep, other=0).to(tl.float32)
    return (code.to(tl.float32) - offset) * factor


@triton.jit
def tile_channels(A: tl.constexpr, B: tl.constexpr, A_PAD: tl.constexpr, B_PAD: tl.constexpr):
    """Channel i·b + j of the group at (i, j, 1), and whether it is there."""
    i, j = tl.arange(0, A_PAD)[:, None, None], tl.arange(0, B_PAD)[None, :, None]
    return i * B + j, (i < A) & (j < B)  # (A_PAD, B_PAD, 1)


@triton.jit
def head_channels(B: tl.constexpr, B_PAD: tl.constexpr, ROWS: tl.constexpr, ROWS_PAD: tl.constexpr):
    """Channel of the head at each place of a rotated one, and whether it is there: (ROWS_PAD·B_PAD,) each."""
    place = tl.arange(0, ROWS_PAD * B_PAD)
    row, column = place // B_PAD, place % B_PAD
    return row * B + column, (row < ROWS) & (column < B)


@triton.jit
def peak(x):
    """A power of two that a tile is divided by to fill float16: its largest number then lies between 2^14 and 2^15."""
    return power_below(tl.max(tl.abs(x)))


@triton.jit
def power_below(x):
    """The power of two that leaves a float32 number x > 0 between 2^14 and 2^15."""
    x = tl.maximum(x, 1e-30)
    return (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True) * 2.0**-14


@triton.jit
def halves(x):
    """x as the sum of two float16 numbers, to 2^-22 of itself and 2^-38 of a peak of 2^14."""
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16)


@triton.jit
def dot_halves(x, high, low, y, TERMS: tl.constexpr):
    """y + x @ (high + low) for x of ``peak`` 1, but for the product of two low halves; one TERMS: high ones alone."""
    x_high = x.to(tl.float16)
    y = tl.dot(x_high, high, y)
    if TERMS == 2:
        y = tl.dot(x_high, low, y)
        y = tl.dot((x - x_high.to(tl.float32)).to(tl.float16), high, y)  # made last: one half at a time takes memory
    return y


@triton.jit
def dot_signs(signs, x, TERMS: tl.constexpr):
    """signs (±1 or 0, float16) @ x for x of ``peak`` 1, or its high half alone of one TERMS."""
    high = x.to(tl.float16)
    y = tl.dot(signs, high)
    if TERMS == 2:
        y = tl.dot(signs, (x - high.to(tl.float32)).to(tl.float16), y)
    return y


@triton.jit
def rotate(
    x,
    left,
    right,
    A_PAD: tl.constexpr,
    B_PAD: tl.constexpr,
    G_PAD: tl.constexpr,
    ROWS_PAD: tl.constexpr,
    ROTATED: tl.constexpr,
    TERMS: tl.constexpr,
):
    """Aᵀ·X·B or A·X·Bᵀ as two dots; x (A_PAD, B_PAD, 16) → (G_PAD, ROWS_PAD·B_PAD, 16), not yet times W^-0.5."""
    OUT: tl.constexpr = G_PAD * ROWS_PAD
    if ROTATED:
        scale = peak(x)
        y = x * (1 / scale)
        if A_PAD > 1:
            y = dot_signs(left, tl.reshape(y, (A_PAD, B_PAD * LANES)), TERMS) * (1 / A_PAD)  # (OUT, B_PAD·16)
        y = tl.permute(tl.reshape(y, (OUT, B_PAD, LANES)), (1, 0, 2))  # (B_PAD, OUT, 16)
        z = dot_signs(right, tl.reshape(y, (B_PAD, OUT * LANES)), TERMS)  # (B_PAD, OUT·16)
        x = tl.permute(tl.reshape(z * (scale * A_PAD), (B_PAD, OUT, LANES)), (1, 0, 2))  # (OUT, B_PAD, 16)
    return tl.reshape(x, (G_PAD, ROWS_PAD * B_PAD, LANES))


@triton.jit
def load_matrices(left, right, A_PAD: tl.constexpr, B_PAD: tl.constexpr, OUT: tl.constexpr):
    """The ±1 factors: (OUT, A_PAD) and (B_PAD, B_PAD)."""
    a, b = tl.arange(0, A_PAD), tl.arange(0, B_PAD)
    return (
        tl.load(left + tl.arange(0, OUT)[:, None] * A_PAD + a[None, :]).to(tl.float16),
        tl.load(right + b[:, None] * B_PAD + b[None, :]).to(tl.float16),
    )


@triton.jit
def block_angles(coarse_cos, coarse_sin, fine_cos, fine_sin, rows, position, channel, HALF: tl.constexpr):
    """cos and sin of 16 consecutive positions, (D', 16) each; 1 and 0 for channels that RoPE leaves.

    By angle addition: both table entries are float32 roundings of float64 numbers, so the result is good to about 2e-7
    at any position.

    Args:
        rows: of the coarse tables; positions past them read the last one.
        position: the first of the 16; negative ones count as 0.
        channel: (D',) of the head.
    """
    row = tl.minimum(tl.maximum(position, 0) // 16, rows - 1)
    column = tl.minimum(tl.maximum(position - 16 * row + tl.arange(0, LANES), 0), 31)[None, :]
    channel = channel[:, None]
    turns, frequency = channel < 2 * HALF, channel % HALF
    a, b = row * HALF + frequency, frequency * 32 + column
    cos_a, sin_a = tl.load(coarse_cos + a, mask=turns, other=1.0), tl.load(coarse_sin + a, mask=turns, other=0.0)
    cos_b, sin_b = tl.load(fine_cos + b, mask=turns, other=1.0), tl.load(fine_sin + b, mask=turns, other=0.0)
    return cos_a * cos_b - sin_a * sin_b, sin_a * cos_b + cos_a * sin_b
