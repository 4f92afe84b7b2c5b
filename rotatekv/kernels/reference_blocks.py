"""Packed blocks written and read in plain torch, with the fused kernels' arguments: what these must compute."""

from __future__ import annotations

import torch

from rotatekv.kernels.affine import Affine
from rotatekv.kernels.layout import unpack_blocks, write_blocks
from rotatekv.kernels.reference import Packed
from rotatekv.kernels.rope_tables import RopeTables
from rotatekv.quantize import FINE_SCALE, quantize_groups, wide_scale, wide_zero
from rotatekv.transforms import channels_to_heads, rotate_channels


def quantize_into_blocks_reference(
    x: torch.Tensor, packed: Packed, start: int, bits: int, group_size: int, clip_ratio: float = 1.0,
    order: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """``rotatekv.kernels.triton.quantize_into_blocks``, bit for bit."""
    codes, scale, zero = quantize_groups(x, bits, group_size, clip_ratio, packed["scale"].dtype == FINE_SCALE)
    write_blocks(packed, start, codes if order is None else codes[..., torch.argsort(order)], scale, zero, bits)


def dequantize_blocks_reference(
    packed: Packed, tokens: int, bits: int, group_of_channel: torch.Tensor, head_dim: int, rotation_width: int = 0,
    rope: RopeTables | None = None, first: torch.Tensor | None = None, dtype: torch.dtype = torch.float32,
    out: torch.Tensor | None = None, affine: Affine | None = None,
) -> torch.Tensor:  # fmt: skip
    """``rotatekv.kernels.triton.dequantize_blocks``: (B, H_kv, T, D)."""
    codes, scale, zero = unpack_blocks(packed, tokens, bits)
    zero, scale = (side[..., group_of_channel.long()] for side in (wide_zero(scale, zero), wide_scale(scale)))
    x = (codes - zero) * scale  # (B, T, C)
    x = rotate_channels(x, rotation_width, inverse=True) if rotation_width else x
    heads = channels_to_heads(x if affine is None else affine(x), head_dim)
    if rope is not None:
        columns = torch.arange(tokens, dtype=torch.int64, device=x.device)
        start = 0 if first is None else first.long()[:, None]
        heads = rope.turn(heads, (columns - start).clamp(min=0).expand(x.shape[0], tokens))
    if out is None:
        return heads.to(dtype)
    out[:, :, :tokens] = heads
    return out
