"""Starting the attention kernel of keys that meet the query as codes, where their form allows it."""

from __future__ import annotations

import math

import torch
from torch.utils.weak import WeakIdKeyDictionary

from rotatekv.kernels.decode_attention import DecodeOptions, ExactTokens
from rotatekv.kernels.layout import BLOCK, Packed
from rotatekv.kernels.transform_coding import GROUP
from rotatekv.kernels.triton.coded_launch import STAGES, WARPS, tile_tokens
from rotatekv.kernels.triton.coded_queries import launch_queries
from rotatekv.kernels.triton.grouped_attention import grouped_split_kernel
from rotatekv.kernels.triton.launch import (
    MOST_SPLITS,
    block_planes,
    choose_splits,
    empty_parts,
    exact_lanes,
    launch_exact,
    merge_parts,
)
from rotatekv.kernels.triton.plan import SMALLEST_DOT, power_of_two, terms_of
from rotatekv.kernels.triton.query_tables import SUMS, rotated_table
from rotatekv.kernels.triton.start import start

_IN_TURN: WeakIdKeyDictionary = WeakIdKeyDictionary()  # group_of_channel → whether its groups are runs of channels


def meets_codes(keys: Packed, values: Packed, group_of_channel: torch.Tensor, options: DecodeOptions) -> bool:
    """Whether each head's keys have one scale a token, come after RoPE and are rotated head by head at most, and its
    values have one scale."""
    dim, channels = options.head_dim, keys["low"].shape[2]
    whole = all(channels // dim % x["scale"].shape[2] == 0 for x in (keys, values))
    if options.rope is not None or options.rotation_width not in (0, dim) or dim % GROUP or not whole:
        return False
    if group_of_channel not in _IN_TURN:  # read once: the host waits for the GPU
        runs = torch.arange(channels, dtype=torch.int32, device=group_of_channel.device)
        runs //= channels // keys["scale"].shape[2]
        _IN_TURN[group_of_channel] = torch.equal(runs, group_of_channel)
    return _IN_TURN[group_of_channel]


def launch_grouped_decode(
    queries: torch.Tensor,
    keys: Packed,
    values: Packed,
    first_seen: torch.Tensor,
    packed_tokens: int,
    total_tokens: int,
    options: DecodeOptions,
    exact: ExactTokens | None,
    splits: int | None,
) -> torch.Tensor:
    """Checked arguments of ``rotatekv.kernels.triton.decode_attention``, of which ``meets_codes`` is true."""
    batch, heads, query_tokens, dim = queries.shape
    device, kv_heads = queries.device, keys["low"].shape[2] // dim
    rows = heads // kv_heads * query_tokens  # of a KV head
    row_tiles, tokens, blocks = -(-rows // SMALLEST_DOT), tile_tokens(dim), -(-packed_tokens // BLOCK)
    tiles = -(-packed_tokens // tokens)
    wanted = splits or choose_splits(blocks, batch * kv_heads * row_tiles, device)
    splits = min(wanted, max(tiles, 1), MOST_SPLITS)
    has_exact = exact is not None
    parts, tops, totals = empty_parts(queries, splits + has_exact)
    window, factor = options.sliding_window or total_tokens, options.softmax_scale * math.log2(math.e)
    table = rotated_table(options.rotation_width, dim, kv_heads, device)
    start(
        grouped_split_kernel,
        (batch * kv_heads, splits, row_tiles),
        *launch_queries(queries, first_seen, 1, 0, factor, table, None),
        *_planes(keys, options.key_bits),
        *_planes(values, options.value_bits),
        first_seen if exact is None else exact_lanes(exact, batch, blocks),
        first_seen,
        parts,
        tops,
        totals,
        batch,
        packed_tokens,
        total_tokens,
        query_tokens,
        rows,
        window,
        keys["low"].shape[1],
        values["low"].shape[1],
        blocks,
        -(-tiles // splits),
        HEADS=kv_heads,
        D=dim,
        D_PAD=power_of_two(dim),
        SUMS=SUMS,
        KEY_GROUPS=keys["scale"].shape[2],
        VALUE_GROUPS=values["scale"].shape[2],
        KEY_BITS=options.key_bits,
        VALUE_BITS=options.value_bits,
        TOKENS=tokens,
        Q_PAD=SMALLEST_DOT,
        TERMS=terms_of(queries),
        SEVERAL=query_tokens > 1,
        EXACT=has_exact,
        num_warps=WARPS,
        num_stages=STAGES,
    )
    if exact is not None:
        launch_exact(queries, exact, first_seen, (parts, tops, totals), splits, total_tokens, window, factor)
    return merge_parts(parts, tops, totals, splits, options, queries.dtype)


def _planes(packed: Packed, bits: int) -> tuple[torch.Tensor, ...]:
    """As ``block_planes``, but zeros four in a word (``coded_launch.py`` says why)."""
    *planes, zero = block_planes(packed, bits)
    return *planes, zero.view(torch.int32)
