"""Packed blocks written and read in plain torch, with the fused kernels' arguments: what these must compute."""

from __future__ import annotations

import torch

from rotatekv.kernels.hadamard import channels_to_heads, heads_to_channels, rotate_channels
from rotatekv.kernels.layout import Packed, unpack_blocks, write_blocks
from rotatekv.kernels.quantize import dequantize, quantize
from rotatekv.kernels.rope_tables import turn_halves


def quantize_into_blocks_reference(
    heads: torch.Tensor,
    packed: Packed,
    start: int,
    bits: int,
    group_size: int,
    clip_ratio: float = 1.0,
    order: torch.Tensor | None = None,
    rotation_width: int = 0,
    unrope: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """Quantize (B, H_kv, T, D) heads and write them in place into blocks, from token ``start`` on.

    In this order, each where it is there:

    1. ``unrope``: cos and sin (B, T, rotary_dim / 2) float32 that undo RoPE: channel i and i + rotary_dim / 2 of a head
       become ``low·cos + high·sin`` and ``high·cos − low·sin`` (YaRN's factor is divided out of them already).
    2. ``rotation_width`` W: each W consecutive channels of a token times the Hadamard matrix of order W.
    3. ``order`` (C,) int32, the channels group after group: each ``group_size`` of them share a scale and a zero point;
       every channel is stored where it is. None: consecutive channels do.
    """
    heads = heads.float()
    if unrope is not None:
        cos, sin = (table.unsqueeze(1) for table in unrope)  # (B, 1, T, rotary_dim / 2)
        heads = turn_halves(heads, cos, -sin)
    x = heads_to_channels(heads)  # (B, T, C)
    if rotation_width:
        x = rotate_channels(x, rotation_width)
    group_of_channel = torch.arange(x.shape[-1], dtype=torch.int64, device=x.device) // group_size
    if order is not None:
        group_of_channel = group_of_channel[torch.argsort(order)]
    write_blocks(packed, start, **quantize(x, bits, group_size, group_of_channel, clip_ratio), bits=bits)


def dequantize_blocks_reference(
    packed: Packed,
    tokens: int,
    bits: int,
    group_of_channel: torch.Tensor,
    head_dim: int,
    rotation_width: int = 0,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The first ``tokens`` tokens as heads of plain numbers, un-rotated: (B, H_kv, T, D), computed in ``dtype``."""
    x = dequantize(*unpack_blocks(packed, tokens, bits), group_of_channel, dtype)  # (B, T, C)
    x = rotate_channels(x, rotation_width, inverse=True) if rotation_width else x
    return channels_to_heads(x, head_dim)
