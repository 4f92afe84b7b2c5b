"""Random packed caches, decode steps and writes for the tests of the kernels."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from rotatekv.kernels.attention_parts import Attended, Bands
from rotatekv.kernels.decode_attention import DecodeOptions, ExactTokens
from rotatekv.kernels.layout import (
    BLOCK,
    Packed,
    allocate_blocks,
    allocate_planes,
    unpack_blocks,
    write_blocks,
    write_codes,
)
from rotatekv.kernels.quantize import dequantize_groups
from rotatekv.kernels.rope_tables import RopeTables


@dataclass(frozen=True)
class Shape:
    """A decode step; ``heads_per_group`` G of 0 means keys that are not rotated."""

    batch: int = 1
    repeat: int = 3  # H / H_kv
    kv_heads: int = 3
    head_dim: int = 64
    heads_per_group: int = 3
    query_tokens: int = 1
    tokens: int = 100
    window: int = 0
    sinks: int = 0
    key_bits: int = 2
    value_bits: int = 2
    key_group: int = 0  # channels in a row; 0: three groups of any channels
    value_group: int = 0  # channels; 0: head_dim
    tokens_per_scale: int = 0  # of keys, per channel; 0: per token and group of channels
    rotary_dim: int = 0  # 0: keys are stored after RoPE
    unrotate_values: bool = False
    padding: tuple[int, ...] = ()
    dropped: tuple[int, ...] = ()  # tokens of each sequence that are gone before column 0
    sliding_window: int = 0
    exact_dtype: torch.dtype = torch.float16
    seed: int = 0


def random_step(shape: Shape) -> dict:
    """The arguments of ``decode_attention`` and of its reference."""
    generator = torch.Generator().manual_seed(shape.seed)
    channels, packed_tokens = shape.kv_heads * shape.head_dim, shape.tokens - shape.window
    rope = None
    if shape.rotary_dim:
        frequencies = 10000.0 ** (-torch.arange(0, shape.rotary_dim, 2) / shape.rotary_dim)
        rope = RopeTables.build(frequencies, shape.tokens + max(shape.dropped, default=0), attention_scaling=1.2)
    options = DecodeOptions(
        shape.head_dim,
        shape.key_bits,
        shape.value_bits,
        shape.head_dim**-0.5,
        shape.heads_per_group * shape.head_dim,
        rope,
        shape.unrotate_values,
        shape.tokens_per_scale,
        shape.sliding_window,
    )
    heads = shape.repeat * shape.kv_heads
    first_seen, dropped = (
        torch.tensor([*given, *[0] * shape.batch][: shape.batch], dtype=torch.int32)
        for given in (shape.padding, shape.dropped)
    )
    value_groups = channels // (shape.value_group or shape.head_dim)
    if shape.tokens_per_scale:
        keys = random_planes(shape.batch, packed_tokens, channels, shape.key_bits, shape.tokens_per_scale, generator)
        group_of_channel = None
    else:
        key_groups = channels // shape.key_group if shape.key_group else 3
        keys = _random_blocks(shape.batch, packed_tokens, channels, key_groups, shape.key_bits, generator)
        group_of_channel = torch.randint(0, 3, (channels,), generator=generator, dtype=torch.int32)
        if shape.key_group:
            group_of_channel = torch.arange(channels, dtype=torch.int32) // shape.key_group
    values = _random_blocks(shape.batch, packed_tokens, channels, value_groups, shape.value_bits, generator)
    return {
        "queries": torch.randn(shape.batch, heads, shape.query_tokens, shape.head_dim, generator=generator),
        "keys": keys,
        "values": values,
        "group_of_channel": group_of_channel,
        "first_seen": first_seen,
        "origin": dropped - first_seen,
        "packed_tokens": packed_tokens,
        "total_tokens": shape.tokens,
        "options": options,
        "exact": _random_exact(shape, generator),
    }


def with_options(step: dict, **changes) -> dict:
    return {**step, "options": replace(step["options"], **changes)}


def pack_blocks(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int) -> Packed:
    """Codes (B, T, C) uint8, scale and zero (B, T, groups) → the layout, N = ceil(T / 16)."""
    batch, tokens, channels = codes.shape
    blocks = -(-tokens // BLOCK)
    packed = allocate_blocks(batch, blocks, channels, scale.shape[-1], bits, codes.device)
    write_blocks(packed, 0, codes, scale, zero, bits)
    return packed


def _random_blocks(batch, tokens, channels, groups, bits, generator) -> dict[str, torch.Tensor]:
    codes = torch.randint(0, 2**bits, (batch, tokens, channels), generator=generator, dtype=torch.uint8)
    scale = torch.rand(batch, tokens, groups, generator=generator).add(0.2).half()
    zero = torch.randint(-2, 2**bits + 2, (batch, tokens, groups), generator=generator, dtype=torch.int8)
    return pack_blocks(codes, scale, zero, bits)


def random_planes(batch, tokens, channels, bits, tokens_per_scale, generator) -> dict[str, torch.Tensor]:
    """Codes with a scale and zero per channel and ``tokens_per_scale`` tokens, in just as many rows as are needed."""
    planes, rows = allocate_planes(batch, -(-tokens // BLOCK), channels, bits), -(-tokens // tokens_per_scale)
    write_codes(planes, 0, torch.randint(0, 2**bits, (batch, tokens, channels), generator=generator).byte(), bits)
    scale = torch.rand(batch, rows, channels, generator=generator).add(0.2).half()
    zero = torch.randint(-2, 2**bits + 2, (batch, rows, channels), generator=generator, dtype=torch.int8)
    return {**planes, "scale": scale, "zero": zero}


def _random_exact(shape: Shape, generator: torch.Generator) -> ExactTokens | None:
    """Sinks at random packed places, unsorted within a sequence, and the window after the packed tokens."""
    packed_tokens = shape.tokens - shape.window
    rows, columns = [], []
    for row in range(shape.batch):
        chosen = torch.randperm(packed_tokens, generator=generator)[: shape.sinks].tolist()
        chosen += range(packed_tokens, shape.tokens)
        rows += [row] * len(chosen)
        columns += chosen
    if not rows:
        return None
    size = (len(rows), shape.kv_heads, shape.head_dim)
    keys, values = (torch.randn(size, generator=generator).to(shape.exact_dtype) for _ in range(2))
    places = [torch.tensor(x, dtype=torch.int32) for x in (rows, columns)]
    return ExactTokens(places[0], places[1], keys, values)


@dataclass(frozen=True)
class Write:
    """A call of ``quantize_into_blocks``; ``heads_per_group`` 0: not rotated, ``rotary_dim`` 0: RoPE stays."""

    batch: int = 1
    kv_heads: int = 3
    head_dim: int = 64
    tokens: int = 1
    start: int = 0
    bits: int = 2
    group_size: int = 64
    clip_ratio: float = 1.0
    reorder: bool = False
    heads_per_group: int = 0
    rotary_dim: int = 0
    dtype: torch.dtype = torch.float32
    layout: str = "heads"  # as they lie in memory; "tokens": (B, T, H_kv, D), "slice": a part of wider tokens
    magnitude: float = 1.0
    seed: int = 0


def random_write(write: Write) -> dict:
    """The arguments of ``quantize_into_blocks`` and of its reference; the blocks hold other numbers before."""
    generator = torch.Generator().manual_seed(write.seed)
    channels, rows = write.kv_heads * write.head_dim, (write.batch, write.tokens)
    heads = torch.randn(*rows, write.kv_heads, write.head_dim, generator=generator).mul(write.magnitude)
    heads = heads.clamp(-6e4, 6e4).to(write.dtype)  # what float16 can hold
    if write.layout == "slice":
        heads = torch.nn.functional.pad(heads, (0, 0, 1, 2))[:, :, 1:-2]
    heads = heads.transpose(1, 2)
    packed = allocate_blocks(
        write.batch, -(-(write.start + write.tokens) // BLOCK) + 1, channels, channels // write.group_size, write.bits
    )
    for plane in packed.values():
        plane.copy_(torch.randint(-100, 100, plane.shape, generator=generator))
    unrope = None
    if write.rotary_dim:
        angles = torch.rand(*rows, write.rotary_dim // 2, generator=generator) * 100
        unrope = angles.cos() / 1.2, angles.sin() / 1.2
    return {
        "heads": heads.contiguous() if write.layout == "heads" else heads,
        "packed": packed,
        "start": write.start,
        "bits": write.bits,
        "group_size": write.group_size,
        "clip_ratio": write.clip_ratio,
        "order": torch.randperm(channels, generator=generator).int() if write.reorder else None,
        "rotation_width": write.heads_per_group * write.head_dim,
        "unrope": unrope,
    }


def assert_written(made, expected, arguments: dict, exactly: bool) -> None:
    """The blocks that a kernel ``made`` of a call's arguments against those of the reference.

    Unless ``exactly``: a number that lies within float32's rounding of the middle between two steps may fall to either
    one, and so may a scale or a zero point. 999 codes of 1000 are the same, the others differ by one, and no number
    that is read back is off by more than a step.
    """
    if exactly:
        assert all(torch.equal(made[name], expected[name]) for name in expected)
        return
    tokens = expected["low"].shape[1] * BLOCK
    new = torch.zeros(tokens, dtype=torch.bool)
    new[arguments["start"] :][: arguments["heads"].shape[2]] = True
    mine, truth = (unpack_blocks(x, tokens, arguments["bits"]) for x in (made, expected))
    assert all(torch.equal(x[:, ~new], y[:, ~new]) for x, y in zip(mine, truth, strict=True))
    codes, scale, zero = (x[:, new] for x in mine)
    true_codes, true_scale, true_zero = (x[:, new] for x in truth)
    off = (codes.int() - true_codes.int()).abs()
    assert off.count_nonzero() <= 2 + off.numel() / 1000 and (off <= 1).all()
    assert ((zero.int() - true_zero.int()).abs() <= 1).all()
    step = true_scale.float()  # (B, T, groups)
    torch.testing.assert_close(scale.float(), step, rtol=1e-3, atol=6e-8)
    difference = dequantize_groups(codes, scale, zero) - dequantize_groups(true_codes, true_scale, true_zero)
    assert (difference.abs().unflatten(-1, (step.shape[-1], -1)) <= 1.02 * step.unsqueeze(-1)).all()


def error(out: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative error of all numbers together."""
    return ((out.double() - exact).norm() / exact.norm().clamp(min=1e-30)).item()


def random_bands(generator: torch.Generator, heads: int, dim: int, queries: int, dtype: torch.dtype) -> dict:
    """The arguments of ``attend_to_bands`` but for its output: two sequences, three blocks of queries of 7 tokens each,
    the last 5 queries with older tokens."""
    shapes = {"query": (2, heads, 3 * queries, dim), "heads": (2, 2, 20, dim), "flushed": (2, 2, 9, dim)}
    query, key, old = (torch.randn(shape, generator=generator) for shape in shapes.values())
    is_seen = torch.rand(3, 7, queries, generator=generator) < 0.5
    is_seen[:, 3] = True
    older = torch.randn(2, 5, heads, dim, generator=generator), torch.randn(2, 5, heads, generator=generator) * 3
    return {
        "query": query.to(dtype),
        "heads": (key.to(dtype), -key.to(dtype)),
        "flushed": (old.half(), old.half() + 1),
        "bands": Bands.of(torch.randint(0, 29, (3, 7), generator=generator), is_seen),
        "scaling": 0.3,
        "older": Attended(older[0].to(dtype), older[1]),
    }
