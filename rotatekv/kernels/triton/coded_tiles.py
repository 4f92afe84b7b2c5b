"""What the kernels of transform-coded keys and values share: planes read into a tile, products with a float32 table.

A group's bits and planes are read from a table (``coded_tables.py``), so one compiled kernel serves all splits of bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rotatekv.kernels.triton.tiles import LANES, dot_halves, halves, peak


@triton.jit
def single_shift(number):
    """The bit of number 4a + b in a word of singles: 4·(0, 2, 1, 3)[a] + b."""
    run = number // 4
    return number + tl.where(run == 1, 4, tl.where(run == 2, -4, 0))


@triton.jit
def stored_scale(scales, at, here):
    """Scales of tokens, float32; 1 where not ``here``."""
    stored = tl.load(scales + at, mask=here, other=128).to(tl.int32)
    return tl.exp2((stored - 128).to(tl.float32) * 0.125)


@triton.jit
def read_components(pairs, singles, bits, pair, single, word, number, here, pair_planes, single_planes, block):
    """``code + ½ − 2^(bits − 1)`` as float16, which holds it exactly; 0 for no bits.

    Args:
        bits, pair, single: the group's, see ``CodedTables.form``.
        word, number: of a plane, and of a word. block: counted over all sequences, int64.
        All are of shapes that broadcast to the result's.
    """
    at = (block * pair_planes + pair) * LANES + word
    low = tl.load(pairs + at, mask=here & (bits >= 2), other=0)
    middle = tl.load(pairs + at + LANES, mask=here & (bits >= 4), other=0)
    at = (block * single_planes + single) * LANES + word
    top = tl.load(singles + at, mask=here & ((bits & 1) == 1), other=0).to(tl.int32)
    code = ((low >> (2 * number)) & 3) | (((middle >> (2 * number)) & 3) << 2)
    code |= ((top >> single_shift(number)) & 1) << tl.maximum(bits - 1, 0)
    x = code.to(tl.float32) + (0.5 - (1 << bits).to(tl.float32) * 0.5)
    return tl.where(bits > 0, x, 0.0).to(tl.float16)


@triton.jit
def keys_tile(
    pairs, singles, form, head, block, lane, here, pair_planes, single_planes, G: tl.constexpr, G_PAD: tl.constexpr
):
    """Components of words of a token; block, lane and here: (TOKENS,) → (16·G_PAD, TOKENS)."""
    group = tl.arange(0, G_PAD)
    at = form + head * (3 * G) + group
    bits = tl.load(at, mask=group < G, other=0)[:, None, None]
    pair, single = tl.load(at + G, mask=group < G, other=0), tl.load(at + 2 * G, mask=group < G, other=0)
    number = tl.arange(0, LANES)[None, :, None]
    x = read_components(
        pairs,
        singles,
        bits,
        pair[:, None, None],
        single[:, None, None],
        lane[None, None, :],
        number,
        here[None, None, :],
        pair_planes,
        single_planes,
        block[None, None, :],
    )
    return tl.reshape(x, (G_PAD * LANES, lane.shape[0]))


@triton.jit
def values_tile(
    pairs, singles, form, head, block, here, pair_planes, single_planes, G: tl.constexpr, D_PAD: tl.constexpr
):
    """Components of words of 16 tokens; block and here: (BLOCKS,) → (16·BLOCKS, D_PAD)."""
    d = tl.arange(0, D_PAD)
    at, inside = form + head * (3 * G) + d // LANES, d < G * LANES
    bits = tl.load(at, mask=inside, other=0)[None, None, :]
    pair, single = tl.load(at + G, mask=inside, other=0), tl.load(at + 2 * G, mask=inside, other=0)
    x = read_components(
        pairs,
        singles,
        bits,
        pair[None, None, :],
        single[None, None, :],
        (d % LANES)[None, None, :],
        tl.arange(0, LANES)[None, :, None],
        here[:, None, None],
        pair_planes,
        single_planes,
        block[:, None, None],
    )
    return tl.reshape(x, (block.shape[0] * LANES, D_PAD))


@triton.jit
def dot_table(x, table, y):
    """y + x @ table, both of any float32 numbers, good to about 2^-21."""
    of_x, of_table = peak(x), peak(table)
    high, low = halves(table * (1 / of_table))
    product = dot_halves(x * (1 / of_x), high, low, tl.zeros_like(y), 2)
    return y + product * (of_x * of_table)
