"""Starting the attention kernels: splits, tiles of queries, and the exact tokens' places."""

from __future__ import annotations

import math

import torch

from rotatekv.kernels.decode_attention import DecodeOptions, ExactTokens
from rotatekv.kernels.layout import BLOCK, HIGH_PLANE, Packed
from rotatekv.kernels.triton.attention import exact_kernel, split_kernel
from rotatekv.kernels.triton.merge import merge_kernel
from rotatekv.kernels.triton.plan import SMALLEST_DOT, factor, matrices, power_of_two, terms_of
from rotatekv.kernels.triton.start import start

STAGES = 1  # two would hold a second tile in shared memory
MOST_SPLITS = 65535  # of a grid's second side
_FEWEST_BLOCKS = 8  # of a split
_PROGRAMS_WITHOUT_GPU = 8
_EXACT_WARPS = 4


def launch_decode(
    queries: torch.Tensor,
    keys: Packed,
    values: Packed,
    group_of_channel: torch.Tensor,
    first_seen: torch.Tensor,
    origin: torch.Tensor,
    packed_tokens: int,
    total_tokens: int,
    options: DecodeOptions,
    exact: ExactTokens | None,
    splits: int | None,
) -> torch.Tensor:
    """Checked arguments of ``rotatekv.kernels.triton.decode_attention``."""
    batch, heads, query_tokens, dim = queries.shape
    device, channels = queries.device, keys["low"].shape[2]
    rope = options.rope
    factors = factor(options.rotation_width, dim)
    constants = query_constants(dim, heads * dim // channels)
    groups, tiles = channels // factors.width, -(-query_tokens // constants["TILE"])
    blocks = -(-packed_tokens // BLOCK)
    splits = min(splits or choose_splits(blocks, batch * groups * tiles, device), max(blocks, 1), MOST_SPLITS)
    has_exact = exact is not None
    parts, tops, totals = empty_parts(queries, splits + has_exact)
    left, right = matrices(factors, device)
    tables = (rope.coarse_cos, rope.coarse_sin, rope.fine_cos, rope.fine_sin) if rope else (left,) * 4
    factor_on_scores = options.softmax_scale * math.log2(math.e)
    lanes = exact_lanes(exact, batch, blocks) if exact is not None else first_seen
    window = options.sliding_window or total_tokens
    start(
        split_kernel,
        (batch * groups, splits, tiles),
        queries,
        *block_planes(keys, options.key_bits),
        *block_planes(values, options.value_bits),
        group_of_channel,
        lanes,
        first_seen,
        origin,
        left,
        right,
        *tables,
        tables[0].shape[0],
        parts,
        tops,
        totals,
        batch,
        packed_tokens,
        total_tokens,
        query_tokens,
        window,
        keys["low"].shape[1],
        values["low"].shape[1],
        blocks,
        -(-blocks // splits),
        factor_on_scores * factors.norm,
        rope.attention_scaling if rope else 1.0,
        C=channels,
        KEY_GROUPS=keys["scale"].shape[2],
        VALUE_GROUPS=values["scale"].shape[2],
        KEY_BITS=options.key_bits,
        VALUE_BITS=options.value_bits,
        HALF=rope.rotary_dim // 2 if rope else 0,
        TERMS=terms_of(queries),
        EXACT=has_exact,
        **constants,
        **factors.constants(),
        num_warps=max(factors.warps * terms_of(queries) // 2, 4),
        num_stages=STAGES,
    )
    if exact is not None:
        launch_exact(queries, exact, first_seen, (parts, tops, totals), splits, total_tokens, window, factor_on_scores)
    return merge_parts(parts, tops, totals, splits, options, queries.dtype)


def empty_parts(queries: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Room for so many parts: outputs (count, B, H, T_q, D), tops and totals (count, B, H, T_q), float32."""
    parts = torch.empty(count, *queries.shape, dtype=torch.float32, device=queries.device)
    tops, totals = (torch.empty(parts.shape[:-1], dtype=torch.float32, device=queries.device) for _ in range(2))
    return parts, tops, totals


def launch_exact(
    queries: torch.Tensor,
    exact: ExactTokens,
    first_seen: torch.Tensor,
    results: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    part: int,
    total_tokens: int,
    window: int,
    factor: float,
) -> None:
    """The tokens kept in 16 bits, into that part of parts, tops and totals."""
    batch, heads, query_tokens, dim = queries.shape
    kv_heads = exact.keys.shape[1]
    constants = query_constants(dim, heads // kv_heads)
    counted = torch.arange(batch + 1, dtype=torch.int32, device=queries.device)
    start(
        exact_kernel,
        (batch * kv_heads, -(-query_tokens // constants["TILE"])),
        queries,
        exact.keys,
        exact.values,
        exact.token_index,
        torch.searchsorted(exact.batch_index, counted),
        first_seen,
        *results,
        batch,
        part,
        total_tokens,
        query_tokens,
        window,
        factor,
        C=kv_heads * dim,
        D=dim,
        TERMS=terms_of(queries),
        **constants,
        num_warps=_EXACT_WARPS,
        num_stages=STAGES,
    )


def query_constants(head_dim: int, repeat: int) -> dict[str, int]:
    """The constexpr arguments that the split and the exact kernel share."""
    tile = max(1, SMALLEST_DOT // repeat)  # queries
    return {
        "REPEAT": repeat,
        "TILE": tile,
        "Q_PAD": max(SMALLEST_DOT, power_of_two(repeat * tile)),
        "DV_PAD": power_of_two(head_dim),
    }


def choose_splits(blocks: int, programs: int, device: torch.device) -> int:
    """Two programs per multiprocessor, not more: a few in a second wave cost as much as a full one. No split has fewer
    than 8 blocks (128 tokens)."""
    wanted = _PROGRAMS_WITHOUT_GPU
    if device.type == "cuda":
        wanted = 2 * torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(wanted // programs, blocks // _FEWEST_BLOCKS))


def exact_lanes(exact: ExactTokens, batch: int, blocks: int) -> torch.Tensor:
    """(B, blocks) int32, bit t set where token t of the block is kept exactly; each place is named once."""
    lanes = torch.zeros(batch, blocks + 1, dtype=torch.int32, device=exact.keys.device)  # the last one: not packed
    block = (exact.token_index // BLOCK).clamp(max=blocks)
    bit = torch.ones_like(exact.token_index) << (exact.token_index % BLOCK)
    places = exact.batch_index.long() * (blocks + 1) + block
    lanes.view(-1).scatter_add_(0, places, torch.where(block < blocks, bit, 0))
    return lanes[:, :blocks].contiguous()


def merge_parts(
    parts: torch.Tensor,
    tops: torch.Tensor,
    totals: torch.Tensor,
    splits: int,
    options: DecodeOptions,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Parts (splits, or one more with exact tokens, B, H, T_q, D) → (B, H, T_q, D)."""
    factors = factor(options.head_dim if options.unrotate_values else 0, options.head_dim)
    out = torch.empty(parts.shape[1:], dtype=dtype, device=parts.device)
    rows = out[..., 0].numel()
    left, right = matrices(factors, parts.device)
    names = ("D", "A", "B", "A_PAD", "B_PAD", "ROWS", "ROWS_PAD", "ROTATED")
    start(
        merge_kernel,
        (-(-rows // BLOCK),),
        parts,
        tops,
        totals,
        left,
        right,
        out,
        splits,
        rows,
        len(parts) * rows,
        factors.norm,
        **{name: factors.constants()[name] for name in names},
        num_warps=4,
    )
    return out


def block_planes(packed: Packed, bits: int) -> tuple[torch.Tensor, ...]:
    """low, high (low where there is none), scale, zero."""
    return packed["low"], packed["high"] if bits in HIGH_PLANE else packed["low"], packed["scale"], packed["zero"]
