"""Starting the attention kernels of transform-coded keys and values."""

from __future__ import annotations

import math

import torch

from rotatekv.kernels.decode_attention import DecodeOptions, ExactTokens
from rotatekv.kernels.layout import BLOCK, Packed
from rotatekv.kernels.transform_coding import FRAME
from rotatekv.kernels.triton.coded_attention import coded_split_kernel
from rotatekv.kernels.triton.coded_merge import coded_merge_kernel
from rotatekv.kernels.triton.coded_queries import launch_queries
from rotatekv.kernels.triton.coded_tables import CodedTables, tables_of
from rotatekv.kernels.triton.launch import MOST_SPLITS, choose_splits, empty_parts, exact_lanes, launch_exact
from rotatekv.kernels.triton.plan import SMALLEST_DOT, power_of_two, terms_of
from rotatekv.kernels.triton.query_tables import MEANS, frame_table
from rotatekv.kernels.triton.start import start

WARPS, STAGES = 4, 1
_MERGE_COLUMNS = 32  # of a tile
_NUMBERS = 128 * 128  # of a tile of codes


def launch_coded_decode(
    queries: torch.Tensor,
    keys: Packed,
    values: Packed,
    first_seen: torch.Tensor,
    origin: torch.Tensor,
    packed_tokens: int,
    total_tokens: int,
    options: DecodeOptions,
    exact: ExactTokens | None,
    dropped: int,
    splits: int | None,
) -> torch.Tensor:
    """Checked arguments of ``rotatekv.kernels.triton.decode_attention``."""
    batch, heads, query_tokens, dim = queries.shape
    assert options.key_transform is not None and options.value_transform is not None
    device, kv_heads = queries.device, len(options.key_transform.bits)
    rows = heads // kv_heads * query_tokens  # of a KV head
    tiles = -(-rows // SMALLEST_DOT)
    frame_start = -(dropped % FRAME)
    frames = -(-(packed_tokens - frame_start) // FRAME) if packed_tokens else 0
    tokens = tile_tokens(dim)
    wanted = splits or choose_splits(frames * FRAME // BLOCK, batch * kv_heads * tiles, device)
    splits = min(wanted, max(frames, 1), MOST_SPLITS)
    has_exact = exact is not None
    parts, tops, totals = empty_parts(queries, splits + has_exact)
    window = options.sliding_window or total_tokens
    factor = options.softmax_scale * math.log2(math.e)
    table = frame_table(options.key_transform, options.rope, device)
    of_values = tables_of(options.value_transform, device)
    start(
        coded_split_kernel,
        (batch * kv_heads, splits, tiles),
        *launch_queries(queries, origin, frames, frame_start, factor, table.columns, options.rope),
        *_planes(keys),
        table.first,
        *_planes(values),
        of_values.form,
        first_seen if exact is None else exact_lanes(exact, batch, -(-packed_tokens // BLOCK)),
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
        keys["scale"].shape[1],
        values["scale"].shape[1],
        -(-packed_tokens // BLOCK),
        keys["pairs"].shape[2],
        keys["singles"].shape[2],
        values["pairs"].shape[2],
        values["singles"].shape[2],
        table.columns.planes,
        table.single_start,
        frames,
        -(-frames // splits) * (FRAME // tokens),
        frame_start,
        HEADS=kv_heads,
        D=dim,
        D_PAD=power_of_two(dim),
        FRAME=FRAME,
        MEANS=MEANS,
        TOKENS=tokens,
        Q_PAD=SMALLEST_DOT,
        CHUNK=table.chunk,
        TERMS=terms_of(queries),
        SEVERAL=query_tokens > 1,
        EXACT=has_exact,
        num_warps=WARPS,
        num_stages=STAGES,
    )
    if exact is not None:
        launch_exact(queries, exact, first_seen, (parts, tops, totals), splits, total_tokens, window, factor)
    return _merge(parts, tops, totals, splits, rows, kv_heads, of_values, queries.dtype)


def tile_tokens(head_dim: int) -> int:
    return min(FRAME, max(_NUMBERS // power_of_two(head_dim), BLOCK))


def _merge(
    parts: torch.Tensor,
    tops: torch.Tensor,
    totals: torch.Tensor,
    splits: int,
    rows: int,
    kv_heads: int,
    of_values: CodedTables,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Parts (splits, or one more with exact tokens, B, H, T_q, D) → (B, H, T_q, D)."""
    out = torch.empty(parts.shape[1:], dtype=dtype, device=parts.device)
    batch, dim = out.shape[0], out.shape[3]
    start(
        coded_merge_kernel,
        (batch * kv_heads, -(-rows // SMALLEST_DOT)),
        parts,
        tops,
        totals,
        of_values.inverse,
        of_values.mean,
        out,
        splits,
        rows,
        tops.numel(),
        batch,
        HEADS=kv_heads,
        D=dim,
        D_PAD=power_of_two(dim),
        Q_PAD=SMALLEST_DOT,
        COLUMNS_TILE=min(power_of_two(dim), _MERGE_COLUMNS),
        num_warps=WARPS,
        num_stages=STAGES,
    )
    return out


def _planes(packed: Packed) -> tuple[torch.Tensor, ...]:
    """Pairs, singles, and scales, four in a word: narrower loads would make the dots' tiles ones of bytes."""
    return packed["pairs"], packed["singles"], packed["scale"].view(torch.int32)
