"""The kernels in plain torch: what any faster one must compute."""

from __future__ import annotations

import torch

from rotatekv.packing import pack_codes, unpack_codes
from rotatekv.quantize import dequantize_groups, quantize_groups

Packed = dict[str, torch.Tensor]


def quantize_and_pack(x: torch.Tensor, bits: int, group_size: int, clip_ratio: float) -> Packed:
    """(B, T, C) → ``codes`` (B, T, C·bits/8) uint8, ``scale`` (B, T, C/g) float16, ``zero`` (B, T, C/g) int8."""
    codes, scale, zero = quantize_groups(x, bits, group_size, clip_ratio)
    return {"codes": pack_codes(codes, bits), "scale": scale, "zero": zero}


def unpack_and_dequantize(packed: Packed, bits: int) -> torch.Tensor:
    """The inverse of ``quantize_and_pack`` up to rounding → (B, T, C) float32."""
    return dequantize_groups(unpack_codes(packed["codes"], bits), packed["scale"], packed["zero"])
