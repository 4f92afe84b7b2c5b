"""Checks of tensors before a kernel reads them: shapes, dtypes, strides and devices; contents stay unread (no sync)."""

from __future__ import annotations

import torch

from rotatekv.kernels.checks import check_maps, packed_planes, rope_planes, shape_of
from rotatekv.kernels.decode_attention import DecodeOptions, ExactTokens
from rotatekv.kernels.hadamard import has_hadamard
from rotatekv.kernels.layout import BLOCK, Packed
from rotatekv.kernels.rope_tables import RopeTables
from rotatekv.kernels.transform_coding import Transform

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def check(x: torch.Tensor, dtypes: torch.dtype | tuple, shape: tuple, device: torch.device, name: str) -> None:
    """A contiguous tensor of this dtype (or one of them), shape and device.

    Raises:
        ValueError: it is another; one line says what is wrong.
    """
    dtypes = dtypes if isinstance(dtypes, tuple) else (dtypes,)
    if not isinstance(x, torch.Tensor):
        raise ValueError(f"{name}: a tensor is needed, not {type(x).__name__}")
    if x.dtype not in dtypes or tuple(x.shape) != shape:
        raise ValueError(f"{name}: {_names(dtypes)} {shape} is needed, not {x.dtype} {tuple(x.shape)}")
    if x.device != device or not x.is_contiguous():
        raise ValueError(f"{name}: it must be contiguous and on {device}, not on {x.device}")


def _names(dtypes: tuple) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def refuse_token_groups(tokens_per_scale: int) -> None:
    """Scales per channel over groups of tokens are for the CPU's kernels (ValueError for any but 0)."""
    if tokens_per_scale:
        raise ValueError(f"tokens_per_scale {tokens_per_scale}: scales per channel are read by the CPU's kernels only")


def check_packed(packed: Packed, bits: int, batch: int, channels: int, tokens: int, device, name: str) -> int:
    """Blocks with room for ``tokens`` tokens; returns the number of quantization groups."""
    blocks, groups, shapes = packed_planes(packed, bits, batch, channels, name)
    for plane, (dtype, shape) in shapes.items():
        check(packed[plane], dtype, shape, device, f"{name}[{plane!r}]")
    if not 0 <= tokens <= blocks * BLOCK:
        raise ValueError(f"{name}: {tokens} packed tokens do not lie in {blocks} blocks of {BLOCK}")
    return groups


def check_heads(heads: torch.Tensor) -> tuple[int, ...]:
    """(B, H_kv, T, D) plain numbers, each head of a token in one piece; returns the shape."""
    shape = shape_of(heads, 4, "heads")
    if heads.dtype not in FLOATS or heads.stride(3) != 1 or not shape[1] or not shape[3]:
        raise ValueError(f"heads: {_names(FLOATS)} with a last stride of 1 is needed, not {heads.dtype} {shape}")
    return shape


def check_width(width: int, channels: int, head_dim: int) -> None:
    """Channels of whole heads, cut into whole rotation groups that have a Hadamard matrix."""
    if head_dim < 1 or channels % head_dim:
        raise ValueError(f"{channels} channels are not whole heads of {head_dim}")
    if width and (width < 0 or channels % width or width % head_dim or not has_hadamard(width)):
        raise ValueError(f"rotation_width {width}: whole heads of {head_dim} with a Hadamard matrix are needed")


def check_unrope(unrope: tuple | None, batch: int, tokens: int, head_dim: int, device: torch.device) -> None:
    """cos and sin of one shape and stride, which turn no more than a head."""
    if unrope is None:
        return
    cos, sin = unrope
    shape = batch, tokens, shape_of(cos, 3, "cos")[2]
    if not 0 < 2 * shape[2] <= head_dim:
        raise ValueError(f"cos and sin turn {2 * shape[2]} channels of a head of {head_dim}")
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dtype != torch.float32 or tuple(table.shape) != shape or table.device != device:
            raise ValueError(f"{name}: float32 {shape} on {device} is needed, not {table.dtype} {tuple(table.shape)}")
        if table.stride() != cos.stride() or table.stride(2) != 1:
            raise ValueError(f"{name}: the last stride must be 1, and cos and sin lie alike")


def check_rope(rope: RopeTables | None, head_dim: int, device: torch.device) -> None:
    """Tables that turn no more than a head."""
    if rope is None:
        return
    rows, half, shapes = rope_planes(rope)
    if not rows or not 0 < 2 * half <= head_dim:
        raise ValueError(f"rope tables of {rows * BLOCK} positions turn {2 * half} channels of a head of {head_dim}")
    for name, shape in shapes.items():
        check(getattr(rope, name), torch.float32, shape, device, name)


def check_exact(exact: ExactTokens | None, heads: int, head_dim: int, device: torch.device) -> None:
    """Indices int32, keys and values of one 16-bit dtype."""
    if exact is None:
        return
    count, dtype = shape_of(exact.batch_index, 1, "exact batch_index")[0], getattr(exact.keys, "dtype", None)
    if dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"exact keys: float16 or bfloat16 is needed, not {dtype}")
    for name in ("batch_index", "token_index"):
        check(getattr(exact, name), torch.int32, (count,), device, f"exact {name}")
    for name in ("keys", "values"):
        check(getattr(exact, name), dtype, (count, heads, head_dim), device, f"exact {name}")


def check_planes(
    packed: Packed, transform: Transform, batch: int, tokens: int, device: torch.device, name: str
) -> None:
    """Planes of transform-coded tokens with room for ``tokens`` tokens."""
    if set(packed) != {"pairs", "singles", "scale"}:
        raise ValueError(f"{name}: transform-coded tokens need pairs, singles and scale, not {sorted(packed)}")
    pairs, singles = transform.planes
    widths = {"pairs": len(pairs), "singles": len(singles), "scale": len(transform.bits)}
    dtypes = {"pairs": torch.int32, "singles": torch.int16, "scale": torch.uint8}
    blocks = shape_of(packed["scale"], 4, f"{name}['scale']")[1]
    for plane, dtype in dtypes.items():
        check(packed[plane], dtype, (batch, blocks, widths[plane], BLOCK), device, f"{name}[{plane!r}]")
    if not 0 <= tokens <= blocks * BLOCK:
        raise ValueError(f"{name}: {tokens} packed tokens do not lie in {blocks} blocks of {BLOCK}")


def check_transform(transform: Transform, kv_heads: int, head_dim: int, words_of_tokens: bool, name: str) -> None:
    """A map for each head, and words as the kernel reads them."""
    check_maps(transform, kv_heads, head_dim, name)
    if transform.words_of_tokens != words_of_tokens:
        raise ValueError(f"{name}: keys have words of tokens, values have words of components")


def check_turns(turns: tuple | None, batch: int, tokens: int, head_dim: int, device: torch.device) -> None:
    """cos and sin of a frame's position and of a place in it, of one shape and stride."""
    if turns is None:
        return
    shape = batch, tokens, shape_of(turns[0], 3, "cos")[2]
    if len(turns) != 4 or not 0 < 2 * shape[2] <= head_dim:
        raise ValueError(f"{len(turns)} turns of rotary_dim {2 * shape[2]} do not fit a head of {head_dim}")
    for name, x in zip(("origin cos", "origin sin", "place cos", "place sin"), turns, strict=True):
        if x.dtype != torch.float32 or tuple(x.shape) != shape or x.device != device:
            raise ValueError(f"{name}: float32 {shape} on {device} is needed, not {x.dtype} {tuple(x.shape)}")
        if x.stride() != turns[0].stride() or x.stride(2) != 1:
            raise ValueError(f"{name}: the last stride must be 1, and the others' strides are needed")


def check_decode(
    queries: torch.Tensor,
    keys: Packed,
    values: Packed,
    group_of_channel: torch.Tensor | None,
    first_seen: torch.Tensor,
    origin: torch.Tensor,
    packed_tokens: int,
    total_tokens: int,
    options: DecodeOptions,
    exact: ExactTokens | None,
    dropped: int,
) -> None:
    """The arguments of ``decode_attention``."""
    refuse_token_groups(options.key_tokens_per_scale)
    batch, heads, query_tokens, dim = shape_of(queries, 4, "queries")
    device = queries.device
    check(queries, FLOATS, (batch, heads, query_tokens, dim), device, "queries")
    if dim != options.head_dim or not dim:
        raise ValueError(f"queries of {dim} channels do not fit head_dim {options.head_dim}")
    if not 0 <= packed_tokens <= total_tokens < 2**31 or not 1 <= query_tokens <= min(16, total_tokens):
        raise ValueError(
            f"packed_tokens {packed_tokens}, total_tokens {total_tokens}, query_tokens {query_tokens}: need "
            "0 ≤ packed ≤ total < 2^31 and 1 ≤ queries ≤ min(16, total)"
        )
    if options.sliding_window < 0:
        raise ValueError(f"sliding_window {options.sliding_window}: 0 or the tokens that a query sees")
    if options.key_transform is None and options.value_transform is None:
        kv_heads = _check_blocks(keys, values, group_of_channel, batch, packed_tokens, options, device)
    else:
        kv_heads = _check_coded(keys, values, batch, packed_tokens, options, dropped, device)
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads are no multiple of {kv_heads} kv_heads")
    check(first_seen, torch.int32, (batch,), device, "first_seen")
    check(origin, torch.int32, (batch,), device, "origin")
    check_rope(options.rope, dim, device)
    check_exact(exact, kv_heads, dim, device)


def _check_blocks(
    keys: Packed,
    values: Packed,
    group_of_channel: torch.Tensor | None,
    batch: int,
    packed_tokens: int,
    options: DecodeOptions,
    device: torch.device,
) -> int:
    """Keys and values in blocks; returns the number of KV heads."""
    channels, dim = shape_of(keys.get("low"), 3, "keys' plane of low bits")[2], options.head_dim
    if channels % dim or not channels:
        raise ValueError(f"keys of {channels} channels do not fit head_dim {dim}")
    check_width(options.rotation_width, channels, dim)
    check_packed(keys, options.key_bits, batch, channels, packed_tokens, device, "keys")
    groups = check_packed(values, options.value_bits, batch, channels, packed_tokens, device, "values")
    if not groups or channels % groups:
        raise ValueError(f"values: {channels} channels cannot be cut into {groups} groups")
    check(group_of_channel, torch.int32, (channels,), device, "group_of_channel")
    return channels // dim


def _check_coded(
    keys: Packed,
    values: Packed,
    batch: int,
    packed_tokens: int,
    options: DecodeOptions,
    dropped: int,
    device: torch.device,
) -> int:
    """Transform-coded keys and values; returns the number of KV heads."""
    if options.key_transform is None or options.value_transform is None:
        raise ValueError("key_transform and value_transform: both are needed, or none")
    if dropped < 0 or dropped % BLOCK:
        raise ValueError(f"dropped {dropped}: a multiple of {BLOCK} tokens is needed")
    kv_heads = len(options.key_transform.bits)
    for packed, transform, name in ((keys, options.key_transform, "keys"), (values, options.value_transform, "values")):
        check_transform(transform, kv_heads, options.head_dim, name == "keys", name)
        check_planes(packed, transform, batch, packed_tokens, device, name)
    return kv_heads
