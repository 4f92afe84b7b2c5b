"""Checks of shapes that the CPU and the CUDA kernels share."""

from __future__ import annotations

import torch

from rotatekv.kernels.layout import BLOCK, HIGH_PLANE, Packed
from rotatekv.kernels.rope_tables import FINE_POSITIONS, RopeTables
from rotatekv.kernels.transform_coding import GROUP, Transform


def shape_of(x: torch.Tensor | None, dimensions: int, name: str) -> tuple[int, ...]:
    """The shape of a tensor of so many dimensions (ValueError for anything else)."""
    if not isinstance(x, torch.Tensor) or x.dim() != dimensions:
        raise ValueError(f"{name}: a tensor of {dimensions} dimensions is needed")
    return tuple(x.shape)


def rope_planes(rope: RopeTables) -> tuple[int, int, dict[str, tuple[int, int]]]:
    """Rows of the coarse tables, rotary_dim / 2, and the shape that each table must have."""
    rows, half = shape_of(rope.coarse_cos, 2, "coarse_cos")
    coarse, fine = (rows, half), (half, FINE_POSITIONS)
    return rows, half, {"coarse_cos": coarse, "coarse_sin": coarse, "fine_cos": fine, "fine_sin": fine}


def packed_planes(
    packed: Packed, bits: int, batch: int, channels: int, name: str, tokens_per_scale: int = 0
) -> tuple[int, int, dict[str, tuple[torch.dtype, tuple[int, ...]]]]:
    """Blocks, quantization groups, and the dtype and shape that each plane of one cache tensor must have.

    Args:
        tokens_per_scale: 0: scales are per token and group of channels; else per channel, (B, R, C), and groups are 0.

    Raises:
        ValueError: other bits than 2, 3 or 4, or other planes than these bits need.
    """
    if bits not in (2, 3, 4):
        raise ValueError(f"{name}: 2, 3 or 4 bits, not {bits}")
    planes = {"low", "scale", "zero"} | ({"high"} if bits in HIGH_PLANE else set())
    if set(packed) != planes:
        raise ValueError(f"{name}: {bits} bits need {sorted(planes)}, not {sorted(packed)}")
    blocks = shape_of(packed["low"], 3, f"{name}['low']")[1]
    words: tuple[int, ...] = (batch, blocks, channels)
    scales: tuple[int, ...]
    groups = 0
    if tokens_per_scale:
        scales = (batch, shape_of(packed["scale"], 3, f"{name}['scale']")[1], channels)
    else:
        groups = shape_of(packed["scale"], 4, f"{name}['scale']")[2]
        scales = (batch, blocks, groups, BLOCK)
    shapes = {"low": (torch.int32, words), "scale": (torch.float16, scales), "zero": (torch.int8, scales)}
    if bits in HIGH_PLANE:
        shapes["high"] = (HIGH_PLANE[bits][0], words)
    return blocks, groups, shapes


def check_maps(transform: Transform, kv_heads: int, head_dim: int, name: str) -> None:
    """A map of whole groups for each head."""
    if transform.maps.shape != (kv_heads, head_dim, head_dim) or head_dim % GROUP:
        maps = tuple(transform.maps.shape)
        raise ValueError(f"{name}: {kv_heads} heads of {head_dim} channels do not fit maps of {maps}")
