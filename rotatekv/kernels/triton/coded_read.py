"""Transform-coded tokens read as components, for the general path: ``dequantize_components`` of what is unpacked."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from rotatekv.kernels.layout import Packed
from rotatekv.kernels.transform_coding import Transform
from rotatekv.kernels.triton.coded_tables import tables_of
from rotatekv.kernels.triton.coded_tiles import keys_tile, stored_scale, values_tile
from rotatekv.kernels.triton.plan import power_of_two
from rotatekv.kernels.triton.start import start
from rotatekv.kernels.triton.tiles import LANES, RUN_TIME

_TOKENS = 32  # of a tile
_WARPS = 4


@triton.jit(do_not_specialize=RUN_TIME)
def coded_read_kernel(
    pairs,
    singles,
    scales,
    form,
    out,
    tokens,
    room,
    blocks,
    pair_planes,
    single_planes,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    TOKENS: tl.constexpr,
    OF_TOKENS: tl.constexpr,
):
    """Program (run of tokens, batch, head) → out (B, H_kv, room, D) float32."""
    G: tl.constexpr = D // LANES
    run, batch, head = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    counted, d, first = tl.arange(0, TOKENS), tl.arange(0, D_PAD), batch * blocks + run * (TOKENS // LANES)
    token, lane = run * TOKENS + counted, counted % LANES
    block, here = first + counted // LANES, token < tokens
    if OF_TOKENS:
        x = keys_tile(pairs, singles, form, head, block, lane, here, pair_planes, single_planes, G, D_PAD // LANES)
        x = tl.permute(x, (1, 0))
    else:
        within = tl.arange(0, TOKENS // LANES)
        started = run * TOKENS + within * LANES < tokens
        x = values_tile(pairs, singles, form, head, first + within, started, pair_planes, single_planes, G, D_PAD)
    scale = stored_scale(scales, (block * HEADS + head) * LANES + lane, here)
    at = out + ((batch * HEADS + head) * room + token)[:, None] * D + d[None, :]
    tl.store(at, x.to(tl.float32) * scale[:, None], mask=here[:, None] & (d < D)[None, :])


def launch_coded_read(packed: Packed, tokens: int, transform: Transform, out: torch.Tensor) -> None:
    """Checked arguments of ``rotatekv.kernels.triton.read_components``."""
    batch, kv_heads, room, dim = out.shape
    tables = tables_of(transform, out.device)
    start(
        coded_read_kernel,
        (-(-tokens // _TOKENS), batch, kv_heads),
        packed["pairs"],
        packed["singles"],
        packed["scale"],
        tables.form,
        out,
        tokens,
        room,
        packed["scale"].shape[1],
        tables.pairs,
        tables.singles,
        HEADS=kv_heads,
        D=dim,
        D_PAD=power_of_two(dim),
        TOKENS=_TOKENS,
        OF_TOKENS=transform.words_of_tokens,
        num_warps=_WARPS,
    )
