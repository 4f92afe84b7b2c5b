"""The kernels in plain torch: what any faster one must compute."""

from __future__ import annotations

import torch

from rotatekv.quantize import dequantize_groups, quantize_groups

Packed = dict[str, torch.Tensor]


def quantize(x: torch.Tensor, bits: int, group_size: int, clip_ratio: float, fine: bool = False) -> Packed:
    """(B, T, C) → ``codes`` (B, T, C) uint8, ``scale`` (B, T, C/g) float16 or uint8, ``zero`` (B, T, C/g) int8."""
    codes, scale, zero = quantize_groups(x, bits, group_size, clip_ratio, fine)
    return {"codes": codes, "scale": scale, "zero": zero}


def dequantize(tokens: Packed) -> torch.Tensor:
    """The inverse of ``quantize`` up to rounding → (B, T, C) float32."""
    return dequantize_groups(tokens["codes"], tokens["scale"], tokens["zero"])
