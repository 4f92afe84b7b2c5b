"""Random transform-coded caches, decode steps and writes for the tests of the kernels."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from kernel_cases import Shape, error, random_step

from rotatekv.kernels.decode_attention import attend, keys_of_components, unpack_values, values_of_components
from rotatekv.kernels.layout import BLOCK, Packed
from rotatekv.kernels.transform_coding import (
    GROUP,
    STEPS,
    Transform,
    allocate_planes,
    dequantize_components,
    pack_components,
    quantize_components,
    scale_of,
    unpack_components,
)


@dataclass(frozen=True)
class FrameShape:
    """A decode step over transform-coded keys, and values too.

    Attributes:
        bits: of a head's groups; those of all heads follow each other, over and over.
        step: all the rest; what it says of the keys' form is not used. ``padding`` are tokens before each sequence.
        value_bits: as ``bits``; None: values are not transform-coded.
        dropped: tokens that are gone before token 0, a multiple of 16.
    """

    bits: tuple[int, ...]
    step: Shape
    value_bits: tuple[int, ...] | None = (2,)
    dropped: int = 0


def random_transform(
    kv_heads: int, head_dim: int, bits: tuple[int, ...], generator: torch.Generator, of_values: bool = False
) -> Transform:
    """A map whose components vary from 3 to 0.3, each group balanced, and a mean that has large channels."""
    groups = kv_heads * head_dim // GROUP
    of_group = torch.tensor(bits * -(-groups // len(bits)))[:groups].view(kv_heads, -1)
    rotation = torch.linalg.qr(torch.randn(kv_heads, head_dim, head_dim, generator=generator))[0]
    deviation = torch.logspace(0.5, -0.5, head_dim) * torch.tensor(STEPS)[of_group].repeat_interleave(GROUP, 1)
    mean = torch.randn(kv_heads, head_dim, generator=generator)
    mean[:, :: max(head_dim // 6, 1)] *= 5
    weights = torch.rand(of_group.shape, generator=generator) + 0.5
    back, words = (1.0, False) if of_values else (0.375, True)
    return Transform(rotation / deviation.unsqueeze(-1), mean, of_group, weights, back, words)


def random_frames_step(shape: FrameShape) -> dict:
    """The arguments of ``decode_attention``."""
    s = shape.step
    plain = replace(s, heads_per_group=0, tokens_per_scale=0, padding=(), dropped=(shape.dropped,) * s.batch)
    step = random_step(plain)
    generator = torch.Generator().manual_seed(s.seed)
    transform = random_transform(s.kv_heads, s.head_dim, shape.bits, generator)
    options = replace(step["options"], key_bits=0, rotation_width=0, key_transform=transform)
    values = step["values"]
    if shape.value_bits is not None:
        of_values = random_transform(s.kv_heads, s.head_dim, shape.value_bits, generator, of_values=True)
        options = replace(options, value_bits=0, unrotate_values=False, value_transform=of_values)
        values = _random_planes(of_values, s.batch, step["packed_tokens"], generator)
    leftpad = torch.tensor([*s.padding, *[0] * s.batch][: s.batch], dtype=torch.int32)
    return {
        **step,
        "queries": step["queries"] * s.head_dim**0.25 / 6,
        "keys": _random_planes(transform, s.batch, step["packed_tokens"], generator),
        "values": values,
        "group_of_channel": None,
        "first_seen": (leftpad - shape.dropped).clamp(min=0),
        "origin": shape.dropped - leftpad,
        "dropped": shape.dropped,
        "options": options,
    }


def _random_planes(transform: Transform, batch: int, tokens: int, generator: torch.Generator) -> Packed:
    sizes = (batch, -(-tokens // BLOCK) * BLOCK, len(transform.bits))
    codes = torch.rand(*sizes, transform.maps.shape[-1], generator=generator) * 2.0**transform.component_bits
    scale = torch.randint(120, 137, sizes, generator=generator, dtype=torch.uint8)  # 0.5 … 2
    return pack_components(codes.floor().byte(), scale, transform)


def rounding_error(step: dict, truth: torch.Tensor, draws: int = 1) -> float:
    """What rounding costs of the attention ``truth``: the relative error, over some draws of what was rounded."""
    return max(error(unrounded_attention(step, seed), truth) for seed in range(draws))


def value_rounding_error(step: dict, truth: torch.Tensor) -> float:
    """What rounding values alone costs."""
    return error(unrounded_attention(step, with_keys=False), truth)


def unrounded_attention(step: dict, seed: int = 1, with_keys: bool = True) -> torch.Tensor:
    """The step's attention in float64 over keys and values that may have been rounded to the step's."""
    options, packed_tokens = step["options"], step["packed_tokens"]
    generator = torch.Generator().manual_seed(seed)
    x = _unrounded(step["keys"], packed_tokens, options.key_transform, generator, with_keys)
    k = keys_of_components(x, step["origin"], step["dropped"], options)
    if options.value_transform is None:
        v = unpack_values(step["values"], packed_tokens, options, torch.float64)
    else:
        v = values_of_components(_unrounded(step["values"], packed_tokens, options.value_transform, generator), options)
    return attend(step["queries"], k, v, step["first_seen"], step["total_tokens"], options, step["exact"])


def _unrounded(
    packed: Packed, tokens: int, transform: Transform, generator: torch.Generator, changed: bool = True
) -> torch.Tensor:
    """Components (B, T, H_kv, D) float64 that lie anywhere in the steps of those that are stored."""
    codes, scale = unpack_components(packed, tokens, transform)
    x = dequantize_components(codes, scale, transform).double()
    if not changed:
        return x
    within, whole = (f(x.shape, generator=generator, dtype=torch.float64) for f in (torch.rand, torch.randn))
    return x + torch.where(transform.component_bits > 0, within - 0.5, whole) * scale_of(scale).unsqueeze(-1)


@dataclass(frozen=True)
class FrameWrite:
    """A call of ``quantize_into_frames``; ``rotary_dim`` 0: without turns."""

    bits: tuple[int, ...]
    batch: int = 1
    kv_heads: int = 3
    head_dim: int = 64
    tokens: int = 20
    start: int = 0
    rotary_dim: int = 0
    of_values: bool = False
    dtype: torch.dtype = torch.float32
    tokens_first: bool = False  # in memory
    seed: int = 0


def random_frame_write(write: FrameWrite) -> dict:
    """The arguments of ``quantize_into_frames``; the planes hold other numbers before."""
    generator = torch.Generator().manual_seed(write.seed)
    transform = random_transform(write.kv_heads, write.head_dim, write.bits, generator, write.of_values)
    sizes = (write.batch, write.kv_heads, write.tokens)
    spread = torch.randn(*sizes, 1, generator=generator).mul(0.3).exp()
    components = torch.randn(*sizes, write.head_dim, generator=generator) * spread
    components /= torch.tensor(STEPS)[transform.component_bits].unsqueeze(1)  # of variance 1, in steps
    heads = (components @ torch.linalg.inv(transform.maps).mT + transform.mean.unsqueeze(1)).to(write.dtype)
    if write.tokens_first:
        heads = heads.transpose(1, 2).contiguous().transpose(1, 2)
    turns = None
    if write.rotary_dim:
        angles = torch.rand(2, write.batch, write.tokens, write.rotary_dim // 2, generator=generator) * 100
        turns = tuple(f(of) for of in angles for f in (torch.cos, torch.sin))
    packed = allocate_planes(transform, write.batch, -(-(write.start + write.tokens) // BLOCK) + 1, heads.device)
    for plane in packed.values():
        plane.copy_(torch.randint(0, 100, plane.shape, generator=generator))
    return {"heads": heads, "packed": packed, "start": write.start, "transform": transform, "turns": turns}


def written_by_torch(write: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes (B, T, H_kv, D) and stored scales (B, T, H_kv) of a write's tokens."""
    heads, transform = write["heads"].float(), write["transform"]
    mean = transform.mean[None, :, None].expand_as(heads)
    if write["turns"] is not None:
        cos, sin, place_cos, place_sin = (x.unsqueeze(1) for x in write["turns"])  # (B, 1, T, rotary_dim / 2)
        heads, mean = _turned(heads, cos, -sin), _turned(mean, place_cos, place_sin)
    return quantize_components(((heads - mean) @ transform.maps.mT).transpose(1, 2), transform)


def read_by_torch(write: dict, tokens: int) -> torch.Tensor:
    """The planes' first tokens as attention sees them, (B, H_kv, T, D)."""
    transform = write["transform"]
    components = dequantize_components(*unpack_components(write["packed"], tokens, transform), transform)
    heads = components.transpose(1, 2) @ transform.inverse.mT
    mean = transform.mean[None, :, None].expand_as(heads)
    if write["turns"] is None:
        return heads + mean
    cos, sin, place_cos, place_sin = (x.unsqueeze(1) for x in write["turns"])
    return _turned(heads + _turned(mean, place_cos, place_sin), cos, sin)


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    low, high, rest = x.tensor_split((cos.shape[-1], 2 * cos.shape[-1]), dim=-1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin, rest], dim=-1)
