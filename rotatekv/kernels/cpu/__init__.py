"""Fused CPU kernels in C++: decode attention over the packed cache, quantize-and-pack into it, and reading it back.

``decode_attention`` equals ``rotatekv.kernels.decode_attention``; ``quantize_into_blocks`` equals
``rotatekv.kernels.blocks``, bit for bit where nothing is rotated; ``quantize_into_frames`` equals
``rotatekv.kernels.transform_coding`` but for ties; ``attend_to_bands`` equals ``rotatekv.kernels.attention_parts``;
``dequantize_blocks`` equals
``rotatekv.kernels.layout.unpack_blocks``, ``x̂ = (code − zero)·scale`` and
``rotatekv.kernels.hadamard.rotate_channels`` with ``inverse``.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from rotatekv.kernels.checks import check_maps, shape_of
from rotatekv.kernels.cpu.arguments import DecodeArguments, DequantizeArguments, QuantizeArguments
from rotatekv.kernels.cpu.bands import attend_to_bands
from rotatekv.kernels.cpu.build import available_instruction_sets, chosen_instruction_set, load_library
from rotatekv.kernels.cpu.calls import NUMBERS, call_library
from rotatekv.kernels.cpu.checks import (
    coded_pointers,
    frame_pointers,
    hadamard_base_pointer,
    packed_pointers,
    pointer,
    remembered,
    rope_pointers,
    strided_pointer,
)
from rotatekv.kernels.cpu.coded_tables import FrameTables, ValueTables, frame_tables_of, value_tables_of
from rotatekv.kernels.cpu.frames import quantize_into_frames, read_components, read_heads
from rotatekv.kernels.decode_attention import DecodeOptions, ExactTokens
from rotatekv.kernels.layout import Blocks, Packed

__all__ = [
    "ATTENDS_TO_BANDS",
    "READS_HEADS",
    "READS_TOKEN_GROUPS",
    "attend_to_bands",
    "available",
    "available_instruction_sets",
    "decode_attention",
    "dequantize_blocks",
    "quantize_into_blocks",
    "quantize_into_frames",
    "read_components",
    "read_heads",
]

ATTENDS_TO_BANDS = READS_HEADS = READS_TOKEN_GROUPS = True
_LIBRARIES = ("attention", "quantize", "dequantize", "frames", "components", "bands")


def available(instruction_set: str | None = None) -> bool:
    """Whether the kernels are built and can run here; builds them at the first call (seconds)."""
    instruction_set = instruction_set or chosen_instruction_set()
    return all(load_library(name, instruction_set) is not None for name in _LIBRARIES)


def decode_attention(
    queries: torch.Tensor,
    keys: Packed,
    values: Packed,
    group_of_channel: torch.Tensor | None,
    first_seen: torch.Tensor,
    origin: torch.Tensor,
    packed_tokens: int,
    total_tokens: int,
    options: DecodeOptions,
    exact: ExactTokens | None = None,
    dropped: int = 0,
    threads: int | None = None,
    instruction_set: str | None = None,
) -> torch.Tensor:
    """Attention of the last T_q ≤ 16 tokens over a packed cache of ``total_tokens`` tokens, these included.

    Letters: B batch, H query heads, H_kv key/value heads, D head_dim, C = H_kv·D, N blocks of 16 tokens (at least
    ceil(packed_tokens / 16)). All tensors are contiguous, on the CPU.

    Args:
        queries: (B, H, T_q, D) float32, after RoPE. Query i sees the tokens up to total_tokens − T_q + i.
        keys, values: blocks (B, N, C) in the layout of ``rotatekv.kernels.layout``. Keys in Hadamard order; values
            rotated per head, quantization groups of consecutive channels, a multiple of 16 of them. With
            ``options.key_transform``, ``options.value_transform``: planes (B, N, …, 16) in the layout of
            ``rotatekv.kernels.transform_coding``.
        group_of_channel: (C,) int32, the quantization group of each key channel; None where keys have scales per
            channel, ``options.key_tokens_per_scale``, or are transform-coded.
        first_seen: (B,) int32, the first token of each sequence that any query sees.
        origin: (B,) int32, the position of token 0 for RoPE; below 0, tokens at positions below 0 must not be seen.
        packed_tokens: tokens read from the blocks; later ones must be among ``exact``.
        dropped: tokens before token 0 that are not kept any more, a multiple of 16: token c of transform-coded keys has
            the place c + dropped, which decides its frame.
        threads: default ``torch.get_num_threads()``.

    Returns:
        (B, H, T_q, D) float32; zeros for a query that sees no token.

    Raises:
        ValueError: a shape, dtype, stride or index is wrong.
        RuntimeError: the kernel is not available, see ``available``.
    """
    shape = shape_of(queries, 4, "queries")
    arguments = _prepared_decode(shape, keys, values, group_of_channel, options)
    batch, kv_heads = shape[0], arguments.kv_heads
    arguments.packed_tokens, arguments.total_tokens, arguments.dropped = packed_tokens, total_tokens, dropped
    arguments.threads = threads or torch.get_num_threads()
    arguments.queries = pointer(queries, torch.float32, shape, "queries")
    arguments.first_seen = pointer(first_seen, torch.int32, (batch,), "first_seen")
    arguments.origin = pointer(origin, torch.int32, (batch,), "origin")
    if exact is not None:
        _set_exact(arguments, exact, (kv_heads, shape[3]))
    output = torch.empty(shape, dtype=torch.float32, device="cpu")
    arguments.output = output.data_ptr()
    call_library("attention", arguments, instruction_set)
    return output


def quantize_into_blocks(
    heads: torch.Tensor,
    packed: Packed,
    start: int,
    bits: int,
    group_size: int,
    clip_ratio: float = 1.0,
    order: torch.Tensor | None = None,
    rotation_width: int = 0,
    unrope: tuple[torch.Tensor, torch.Tensor] | None = None,
    threads: int | None = None,
    instruction_set: str | None = None,
) -> None:
    """Quantize T tokens and write them in place into blocks, from token ``start`` on.

    Args:
        heads: (B, H_kv, T, D) float32, float16 or bfloat16; a view whose last dimension is dense.
        packed: blocks (B, N, C) in the layout of ``rotatekv.kernels.layout``; start + T ≤ 16·N. C = H_kv·D.
        group_size: channels that share a scale: consecutive ones once they are in ``order``.
        unrope: cos and sin (B, T, rotary_dim / 2) float32 that undo RoPE; views alike, whose last dimension is dense.
        rotation_width: order of the Hadamard matrix that each run of so many channels, whole heads, is multiplied by;
            0: none.
        order: (C,) int32, a permutation: channel ``order[j]`` is quantized as the j-th. None: the j-th.

    Raises:
        ValueError: a shape, dtype, stride or index is wrong.
        RuntimeError: the kernel is not available, see ``available``.
    """
    shape = shape_of(heads, 4, "heads")
    strides, address = strided_pointer(heads, tuple(NUMBERS), "heads")
    arguments = _prepared_write(shape, packed, bits, group_size, clip_ratio, order, rotation_width)
    arguments.batch_stride, arguments.head_stride, arguments.token_stride, _ = strides
    arguments.heads, arguments.number, arguments.start = address, NUMBERS[heads.dtype], start
    arguments.threads = threads or torch.get_num_threads()
    if unrope is not None:
        _set_unrope(arguments, *unrope)
    call_library("quantize", arguments, instruction_set)


def dequantize_blocks(
    packed: Packed,
    tokens: int,
    bits: int,
    group_of_channel: torch.Tensor | None,
    head_dim: int,
    rotation_width: int = 0,
    threads: int | None = None,
    instruction_set: str | None = None,
    out: torch.Tensor | None = None,
    tokens_per_scale: int = 0,
) -> torch.Tensor:
    """The first ``tokens`` tokens of blocks as heads: unpacked, dequantized, and back from the Hadamard space.

    Args:
        packed: blocks (B, N, C) in the layout of ``rotatekv.kernels.layout``; tokens ≤ 16·N. C = H_kv·head_dim.
        group_of_channel: (C,) int32, the quantization group of each channel; None with ``tokens_per_scale``.
        rotation_width: order of the orthonormal Hadamard matrix whose inverse each run of so many channels is
            multiplied by: whole heads. 0: none.
        out: (B, H_kv, T, D) float32, contiguous, with room for T ≥ ``tokens`` tokens; later ones stay as they are.
            None: a new one of just ``tokens``.
        tokens_per_scale: a multiple of 16: scales are per channel over so many tokens. 0: per token.

    Returns:
        (B, H_kv, T, D) float32, ``out`` where that is given.

    Raises:
        ValueError: a shape, dtype, stride or index is wrong.
        RuntimeError: the kernel is not available, see ``available``.
    """
    batch, _, channels = shape_of(packed.get("low"), 3, "packed's plane of low bits")
    if head_dim < 1 or channels % head_dim:
        raise ValueError(f"{channels} channels are not whole heads of {head_dim}")
    blocks = packed_pointers(packed, bits, batch, channels, "packed", tokens_per_scale)
    heads = channels // head_dim
    if out is None:
        out = torch.empty(batch, heads, max(tokens, 0), head_dim, dtype=torch.float32, device="cpu")
    room = shape_of(out, 4, "out")[2]
    arguments = DequantizeArguments(
        structure_bytes=ctypes.sizeof(DequantizeArguments),
        batch=batch,
        kv_heads=heads,
        head_dim=head_dim,
        tokens=tokens,
        output_tokens=room,
        rotation_width=rotation_width,
        threads=threads or torch.get_num_threads(),
        blocks=blocks,
        base=hadamard_base_pointer(rotation_width),
        group_of_channel=_optional_indices(group_of_channel, channels, "group_of_channel"),
        output=pointer(out, torch.float32, (batch, heads, room, head_dim), "out"),
    )
    call_library("dequantize", arguments, instruction_set)
    return out


def _optional_indices(indices: torch.Tensor | None, count: int, name: str) -> int | None:
    return None if indices is None else pointer(indices, torch.int32, (count,), name)


def _prepared_decode(
    shape: tuple[int, ...], keys: Packed, values: Packed, group_of_channel: torch.Tensor | None, options: DecodeOptions
) -> DecodeArguments:
    """Arguments with all that stays the same from one decode step to the next; ``shape`` of the queries."""
    o, rope = options, options.rope
    frames = None if o.key_transform is None else frame_tables_of(o.key_transform, rope)
    mapped = None if o.value_transform is None else value_tables_of(o.value_transform)

    def make() -> DecodeArguments:
        batch, heads, query_tokens, dim = shape
        kv_heads = _kv_heads(values, o)
        if dim != o.head_dim:
            raise ValueError(f"queries of {dim} channels do not fit head_dim {o.head_dim}")
        return DecodeArguments(
            structure_bytes=ctypes.sizeof(DecodeArguments),
            batch=batch,
            query_heads=heads,
            kv_heads=kv_heads,
            head_dim=dim,
            query_tokens=query_tokens,
            rotation_width=o.rotation_width,
            unrotate_values=o.unrotate_values and mapped is None,
            sliding_window=o.sliding_window,
            softmax_scale=o.softmax_scale,
            attention_scaling=1.0 if rope is None or frames else rope.attention_scaling,
            **_key_fields(keys, kv_heads, batch, o, frames),
            **_value_fields(values, kv_heads, batch, o, mapped),
            key_base=hadamard_base_pointer(o.rotation_width),
            value_base=hadamard_base_pointer(dim if o.unrotate_values else 0),
            group_of_channel=_optional_indices(group_of_channel, kv_heads * dim, "group_of_channel"),
            **({} if rope is None else rope_pointers(rope)),
        )

    numbers = (
        *shape,
        o.head_dim,
        o.key_bits,
        o.value_bits,
        o.softmax_scale,
        o.rotation_width,
        o.unrotate_values,
        o.key_tokens_per_scale,
        o.sliding_window,
        rope is None or rope.attention_scaling,
    )
    tables = () if rope is None else (rope.coarse_cos, rope.coarse_sin, rope.fine_cos, rope.fine_sin)
    made = tuple(x for of in (frames, mapped) if of is not None for x in vars(of).values())
    tensors = (*keys.values(), *values.values(), group_of_channel, *tables, *made)
    blocks = keys if isinstance(keys, Blocks) else values  # keys with scales per channel are a plain dict
    sizes = len(keys), len(values), len(tables), len(made), frames is None
    return remembered(blocks, "decode", tensors, (*sizes, *numbers), make)


def _kv_heads(values: Packed, options: DecodeOptions) -> int:
    if options.value_transform is not None:
        return shape_of(values.get("scale"), 4, "values' scale")[2]
    channels = shape_of(values.get("low"), 3, "values' plane of low bits")[2]
    if channels % options.head_dim:
        raise ValueError(f"values of {channels} channels do not fit head_dim {options.head_dim}")
    return channels // options.head_dim


def _key_fields(
    keys: Packed, kv_heads: int, batch: int, options: DecodeOptions, frames: FrameTables | None
) -> dict[str, Any]:
    transform = options.key_transform
    if transform is None or frames is None:
        bits, channels = options.key_bits, kv_heads * options.head_dim
        return {"keys": packed_pointers(keys, bits, batch, channels, "keys", options.key_tokens_per_scale)}
    check_maps(transform, kv_heads, options.head_dim, "keys")
    return {"coded_keys": coded_pointers(keys, transform, batch, "keys"), "frames": frame_pointers(frames)}


def _value_fields(
    values: Packed, kv_heads: int, batch: int, options: DecodeOptions, mapped: ValueTables | None
) -> dict:
    transform = options.value_transform
    if transform is None or mapped is None:
        channels = kv_heads * options.head_dim
        return {"values": packed_pointers(values, options.value_bits, batch, channels, "values")}
    check_maps(transform, kv_heads, options.head_dim, "values")
    return {
        "coded_values": coded_pointers(values, transform, batch, "values"),
        "value_map": mapped.map.data_ptr(),
        "value_mean": mapped.mean.data_ptr(),
    }


def _prepared_write(
    shape: tuple[int, ...],
    packed: Packed,
    bits: int,
    group_size: int,
    clip_ratio: float,
    order: torch.Tensor | None,
    rotation_width: int,
) -> QuantizeArguments:
    """Arguments with all that stays the same from one write to the next; ``shape`` of the heads."""

    def make() -> QuantizeArguments:
        batch, kv_heads, tokens, dim = shape
        channels = kv_heads * dim
        blocks = packed_pointers(packed, bits, batch, channels, "packed")
        if group_size * blocks.groups != channels:
            raise ValueError(f"groups of {group_size} do not cut {channels} channels into {blocks.groups}")
        return QuantizeArguments(
            structure_bytes=ctypes.sizeof(QuantizeArguments),
            batch=batch,
            kv_heads=kv_heads,
            tokens=tokens,
            head_dim=dim,
            rotation_width=rotation_width,
            clip_ratio=clip_ratio,
            blocks=blocks,
            base=hadamard_base_pointer(rotation_width),
            order=_optional_indices(order, channels, "order"),
        )

    numbers = len(packed), shape, bits, group_size, clip_ratio, rotation_width
    return remembered(packed, "write", (*packed.values(), order), numbers, make)


def _set_unrope(arguments: QuantizeArguments, cos: torch.Tensor, sin: torch.Tensor) -> None:
    strides, arguments.cos = strided_pointer(cos, (torch.float32,), "cos")
    sin_strides, arguments.sin = strided_pointer(sin, (torch.float32,), "sin")
    shape = shape_of(cos, 3, "cos")
    if shape[:2] != (arguments.batch, arguments.tokens) or sin.shape != shape or sin_strides != strides:
        raise ValueError("cos and sin: (B, T, rotary_dim / 2) as the heads have it, and the same strides, are needed")
    arguments.rotary_dim = 2 * shape[2]
    arguments.unrope_batch_stride, arguments.unrope_token_stride, _ = strides


def _set_exact(arguments: DecodeArguments, exact: ExactTokens, heads: tuple[int, int]) -> None:
    count, dtype = shape_of(exact.batch_index, 1, "exact batch_index")[0], getattr(exact.keys, "dtype", None)
    if dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"exact keys: float16 or bfloat16 is needed, not {dtype}")
    arguments.exact_tokens, arguments.exact_is_bfloat16 = count, dtype == torch.bfloat16
    arguments.exact_batch_index = pointer(exact.batch_index, torch.int32, (count,), "exact batch_index")
    arguments.exact_token_index = pointer(exact.token_index, torch.int32, (count,), "exact token_index")
    arguments.exact_keys = pointer(exact.keys, dtype, (count, *heads), "exact keys")
    arguments.exact_values = pointer(exact.values, dtype, (count, *heads), "exact values")
