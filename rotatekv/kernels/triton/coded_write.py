"""Transform-coded keys and values written: turned, centred and mapped; then a scale a token, rounded and packed.

``coded_map_kernel`` equals ``A·(R(−o)·k − R(p − o)·μ)`` of ``kernels/transform_coding.py`` to about 2^-21 of the
largest number in its tile, as its products take halves of float16 (``attention.py``). ``coded_quantize_kernel`` equals
``quantize_components`` and ``pack_components`` but for ties that a sum's order decides.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from rotatekv.kernels.frames import Turns
from rotatekv.kernels.layout import BLOCK, Packed
from rotatekv.kernels.transform_coding import Transform
from rotatekv.kernels.triton.coded_tables import tables_of
from rotatekv.kernels.triton.coded_tiles import dot_table, single_shift
from rotatekv.kernels.triton.plan import power_of_two
from rotatekv.kernels.triton.start import start as start_kernel
from rotatekv.kernels.triton.tiles import LANES, RUN_TIME, round_to_even

TOKENS_TILE, COLUMNS_TILE, INNER = 32, 64, 32  # of the product with a map
_CANDIDATES = tl.constexpr(8)  # stored scales tried, every second from 4 below the root mean square's; then 2 more
_WARPS = 4


@triton.jit(do_not_specialize=RUN_TIME)
def coded_map_kernel(
    heads,
    stride_b,
    stride_h,
    stride_t,
    origin_cos,
    origin_sin,
    place_cos,
    place_sin,
    table_b,
    table_t,
    mean,
    map,
    out,
    tokens,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    TOKENS_TILE: tl.constexpr,
    COLUMNS_TILE: tl.constexpr,
    INNER: tl.constexpr,
):
    """Program (run of tokens, batch, head × tile of columns) → out (B, T, H_kv, D) float32."""
    COLUMNS: tl.constexpr = (D + COLUMNS_TILE - 1) // COLUMNS_TILE
    run, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    head, tile = tl.program_id(2) // COLUMNS, tl.program_id(2) % COLUMNS
    token = run * TOKENS_TILE + tl.arange(0, TOKENS_TILE)
    column = tile * COLUMNS_TILE + tl.arange(0, COLUMNS_TILE)
    real = (token < tokens)[:, None]
    acc = tl.zeros((TOKENS_TILE, COLUMNS_TILE), tl.float32)
    at = heads + (batch * stride_b + token * stride_t + head.to(tl.int64) * stride_h)[:, None]
    for start in range(0, D, INNER):
        d = start + tl.arange(0, INNER)
        keep = real & (d < D)[None, :]
        x = tl.load(at + d[None, :], mask=keep, other=0.0).to(tl.float32)
        middle = tl.load(mean + head * D + d, mask=d < D, other=0.0)[None, :]
        if HALF:
            turns, low = keep & (d < 2 * HALF)[None, :], (d < HALF)[None, :]
            beside = tl.where(d < HALF, d + HALF, d - HALF)
            partner = tl.load(at + beside[None, :], mask=turns, other=0.0).to(tl.float32)
            opposite = tl.load(mean + head * D + beside, mask=d < 2 * HALF, other=0.0)[None, :]
            angle = (batch * table_b + token * table_t)[:, None] + (d % HALF)[None, :]
            cos = tl.load(origin_cos + angle, mask=turns, other=1.0)
            sin = tl.load(origin_sin + angle, mask=turns, other=0.0)
            x = x * cos + tl.where(low, partner, -partner) * sin
            cos = tl.load(place_cos + angle, mask=turns, other=1.0)
            sin = tl.load(place_sin + angle, mask=turns, other=0.0)
            x -= middle * cos + tl.where(low, -opposite, opposite) * sin
        else:
            x -= middle
        table = tl.load(
            map + (head * D + d)[:, None] * D + column[None, :],
            mask=(d < D)[:, None] & (column < D)[None, :],
            other=0.0,
        )
        acc = dot_table(tl.where(keep, x, 0.0), table, acc)
    at = out + ((batch * tokens + token) * HEADS + head)[:, None] * D + column[None, :]
    tl.store(at, acc, mask=real & (column < D)[None, :])


@triton.jit
def _codes(x, scale, levels):
    """The nearest level of each component, counted from the lowest; scale and levels: what broadcasts to x."""
    code = tl.floor(tl.div_rn(x, tl.broadcast_to(scale, x.shape)) + levels)
    return tl.minimum(tl.maximum(code, 0.0), tl.maximum(2.0 * levels - 1.0, 0.0))


@triton.jit
def _scale_of(stored):
    return tl.exp2((stored - 128.0) * 0.125)[:, None, None]


@triton.jit
def _store_words(plane, at, numbers, shift, old_mask, new, here, OF_TOKENS: tl.constexpr):
    """Words of the numbers (16 tokens, G_PAD, 16 components) at their shifts. The bits of tokens that are not new stay:
    of words of tokens those are whole words.

    Args:
        at: of the words, (16, G_PAD). old_mask: the bits of one number. new: (16,). here: (G_PAD,).
    """
    if OF_TOKENS:
        word = tl.sum(numbers << shift, 2).to(tl.int32)  # (16, G_PAD)
        tl.store(plane + at, word.to(plane.dtype.element_ty), mask=new[:, None] & here[None, :])
    else:
        fresh = new[:, None, None]
        word = tl.sum(tl.where(fresh, numbers << shift, 0), 0).to(tl.int32)  # (G_PAD, 16)
        taken = tl.sum(tl.where(fresh, old_mask << shift, 0), 0).to(tl.int32)  # (1, 1)
        old = tl.load(plane + at, mask=here[:, None], other=0).to(tl.int32)
        tl.store(plane + at, ((old & ~taken) | word).to(plane.dtype.element_ty), mask=here[:, None])


@triton.jit(do_not_specialize=RUN_TIME)
def coded_quantize_kernel(
    components,
    pairs,
    singles,
    scales,
    form,
    costs,
    start,
    tokens,
    blocks,
    pair_planes,
    single_planes,
    HEADS: tl.constexpr,
    G: tl.constexpr,
    G_PAD: tl.constexpr,
    OF_TOKENS: tl.constexpr,
):
    """Program (block counted from the first one written, batch, head); components: (B, T, H_kv, D)."""
    block, batch = start // LANES + tl.program_id(0), tl.program_id(1).to(tl.int64)
    head = tl.program_id(2)
    lane, group = tl.arange(0, LANES), tl.arange(0, G_PAD)
    token = block * LANES + lane - start
    new, inside = (token >= 0) & (token < tokens), group < G
    at = ((batch * tokens + token) * HEADS + head)[:, None, None] * (G * LANES)
    at += (group * LANES)[None, :, None] + tl.arange(0, LANES)[None, None, :]
    x = tl.load(components + at, mask=new[:, None, None] & inside[None, :, None], other=0.0)  # (16, G_PAD, 16)
    of_head = form + head * (3 * G) + group
    bits, pair = tl.load(of_head, mask=inside, other=0), tl.load(of_head + G, mask=inside, other=0)
    single = tl.load(of_head + 2 * G, mask=inside, other=0)
    of_head = costs + head * (2 * G) + group
    weights = tl.load(of_head, mask=inside, other=0.0)[None, :, None]
    steps = tl.load(of_head + G, mask=inside, other=0.0)[None, :, None]
    levels = tl.where(bits > 0, (1 << bits).to(tl.float32) * 0.5, 0.0)[None, :, None]
    stored = tl.maximum(tl.sum((bits > 0).to(tl.int32), 0) * LANES, 1).to(tl.float32)
    squares = x * steps
    mean_square = tl.sum(tl.sum(squares * squares, 2), 1) / stored  # (16,)
    middle = round_to_even(tl.log2(tl.maximum(mean_square, 2.0**-40)) * 4.0) + 128.0
    best, least = middle, tl.full((LANES,), float("inf"), tl.float32)
    for candidate in range(_CANDIDATES + 2):
        if candidate == _CANDIDATES:
            middle = best
        offset = 2 * candidate - tl.where(candidate < _CANDIDATES, 4, 2 * _CANDIDATES + 1)  # −1 and 1 at last
        tried = tl.minimum(tl.maximum(middle + offset, 0.0), 255.0)
        scale = _scale_of(tried)
        off = (_codes(x, scale, levels) + 0.5 - levels) * scale - x
        error = tl.sum(tl.sum(off * off * weights, 2), 1)
        best, least = tl.where(error < least, tried, best), tl.minimum(error, least)
    code = _codes(x, _scale_of(best), levels).to(tl.int32)
    if OF_TOKENS:
        word, number = lane[:, None], tl.arange(0, LANES)[None, None, :]
        first_pair, first_single = pair[None, :], single[None, :]
    else:
        word, number = lane[None, :], lane[:, None, None]
        first_pair, first_single = pair[:, None], single[:, None]
    block_of_all = batch * blocks + block
    at = (block_of_all * pair_planes + first_pair) * LANES + word
    _store_words(pairs, at, code & 3, 2 * number, 3, new, bits >= 2, OF_TOKENS)
    _store_words(pairs, at + LANES, (code >> 2) & 3, 2 * number, 3, new, bits >= 4, OF_TOKENS)
    at = (block_of_all * single_planes + first_single) * LANES + word
    top = (code >> tl.maximum(bits - 1, 0)[None, :, None]) & 1
    _store_words(singles, at, top, single_shift(number), 1, new, (bits & 1) == 1, OF_TOKENS)
    tl.store(scales + (block_of_all * HEADS + head) * LANES + lane, best.to(tl.uint8), mask=new)


def launch_coded_write(
    heads: torch.Tensor, packed: Packed, start: int, transform: Transform, turns: Turns | None
) -> None:
    """Checked arguments of ``rotatekv.kernels.triton.quantize_into_frames``."""
    batch, kv_heads, tokens, dim = heads.shape
    if not tokens:
        return
    tables = tables_of(transform, heads.device)
    components = torch.empty(batch, tokens, kv_heads, dim, dtype=torch.float32, device=heads.device)
    angles = turns or (tables.mean.unsqueeze(0),) * 4
    start_kernel(
        coded_map_kernel,
        (-(-tokens // TOKENS_TILE), batch, kv_heads * -(-dim // COLUMNS_TILE)),
        heads,
        *heads.stride()[:3],
        *angles,
        *angles[0].stride()[:2],
        tables.mean,
        tables.map,
        components,
        tokens,
        HEADS=kv_heads,
        D=dim,
        HALF=0 if turns is None else turns[0].shape[2],
        TOKENS_TILE=TOKENS_TILE,
        COLUMNS_TILE=COLUMNS_TILE,
        INNER=INNER,
        num_warps=_WARPS,
    )
    start_kernel(
        coded_quantize_kernel,
        (-(-(start + tokens) // BLOCK) - start // BLOCK, batch, kv_heads),
        components,
        packed["pairs"],
        packed["singles"],
        packed["scale"],
        tables.form,
        tables.costs,
        start,
        tokens,
        packed["scale"].shape[1],
        tables.pairs,
        tables.singles,
        HEADS=kv_heads,
        G=dim // BLOCK,
        G_PAD=power_of_two(dim // BLOCK),
        OF_TOKENS=transform.words_of_tokens,
        num_warps=_WARPS,
        enable_fp_fusion=False,
    )
