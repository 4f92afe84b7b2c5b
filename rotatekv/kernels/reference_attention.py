"""Decode attention over a packed cache in plain torch: what a fused kernel must compute."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from rotatekv.kernels.affine import Affine
from rotatekv.kernels.layout import unpack_blocks, unpack_planes
from rotatekv.kernels.reference import Packed
from rotatekv.kernels.rope_tables import RopeTables
from rotatekv.quantize import wide_scale, wide_zero
from rotatekv.transforms import channels_to_heads, rotate_channels


@dataclass(frozen=True)
class ExactTokens:
    """Tokens kept in 16 bits, attention sinks and the recent window, in the rotated space of the packed ones.

    Attributes:
        rows, columns: (S,) int32, the sequence (ascending) and the token of each.
        keys, values: (S, C) float16 or bfloat16. They replace a packed token of the same place.
    """

    rows: torch.Tensor
    columns: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor


@dataclass(frozen=True)
class DecodeOptions:
    """What stays the same from call to call.

    Attributes:
        head_dim: D.
        key_bits, value_bits: 2, 3 or 4.
        softmax_scale: factor on the scores, usually D^-0.5.
        rotation_width: W = G·D of the keys' Hadamard matrix; 0: keys are not rotated.
        rope: turn queries, and keys on read; None: both come after RoPE.
        unrotate_values: multiply each head of the output by the inverse Hadamard matrix of order D; False where
            ``o_proj`` does it, or where values are not rotated.
        key_tokens_per_scale: g, a multiple of 16: keys have a scale and zero per channel and g tokens, see
            ``layout.py``; 0: per token and quantization group of channels.
        key_affine: what keys still lack after the inverse Hadamard, before RoPE; None: nothing.
    """

    head_dim: int
    key_bits: int
    value_bits: int
    softmax_scale: float
    rotation_width: int = 0
    rope: RopeTables | None = None
    unrotate_values: bool = False
    key_tokens_per_scale: int = 0
    key_affine: Affine | None = None


def decode_attention_reference(
    queries: torch.Tensor,
    keys: Packed,
    values: Packed,
    group_of_channel: torch.Tensor | None,
    first: torch.Tensor,
    packed_tokens: int,
    total_tokens: int,
    options: DecodeOptions,
    exact: ExactTokens | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The arguments of ``rotatekv.kernels.cpu.decode_attention``, computed in ``dtype`` → (B, H, T_q, D)."""
    query_tokens, dim = queries.shape[2:]
    channels, device = keys["low"].shape[-1], queries.device
    value_group = torch.arange(channels, dtype=torch.int64, device=device) // (channels // values["scale"].shape[2])
    if options.key_tokens_per_scale:
        k = unpack_planes(keys, packed_tokens, options.key_bits, options.key_tokens_per_scale)
    else:
        k = _per_channel(unpack_blocks(keys, packed_tokens, options.key_bits), group_of_channel.long())
    v = _per_channel(unpack_blocks(values, packed_tokens, options.value_bits), value_group)
    k, v = (_restore(x, total_tokens, exact, name, dtype) for x, name in ((k, "keys"), (v, "values")))
    if options.rotation_width:
        k = rotate_channels(k, options.rotation_width, inverse=True)
    if options.key_affine is not None:
        k = options.key_affine(k).to(dtype)
    k, v = channels_to_heads(k, dim), channels_to_heads(v, dim)  # (B, H_kv, T, D)
    columns = torch.arange(total_tokens, dtype=torch.int64, device=device)
    queries = queries.to(dtype)
    if options.rope is not None:
        positions = (columns - first.long()[:, None]).clamp(min=0)  # (B, T)
        queries = options.rope.turn(queries, positions[:, -query_tokens:])
        k = options.rope.turn(k, positions)
    rows = queries.reshape(len(queries), k.shape[1], -1, dim)  # (B, H_kv, repeat·T_q, D): no copies of keys or values
    scores = (rows @ k.transpose(2, 3)).view(*queries.shape[:3], -1) * options.softmax_scale  # (B, H, T_q, T)
    last_seen = torch.arange(total_tokens - query_tokens, total_tokens, dtype=torch.int64, device=device)
    seen = (columns <= last_seen[:, None]) & (columns >= first[:, None, None])  # (B, T_q, T)
    weights = torch.softmax(scores.masked_fill(~seen[:, None], -math.inf), -1).nan_to_num(0.0)  # a row may see nothing
    out = (weights.view(*rows.shape[:3], -1) @ v).view(queries.shape)
    return rotate_channels(out, dim, inverse=True) if options.unrotate_values else out


def _per_channel(stored: tuple[torch.Tensor, ...], group_of_channel: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Codes, scale and zero of ``unpack_blocks`` → (B, T, C) each."""
    codes, scale, zero = stored
    return codes, scale[..., group_of_channel], zero[..., group_of_channel]


def _restore(stored: tuple[torch.Tensor, ...], total_tokens, exact, name, dtype) -> torch.Tensor:
    """(B, T, C): codes, scale and zero (B, T_packed, C) dequantized, with the exact tokens in their places."""
    codes, scale, zero = stored
    x = (codes.to(dtype) - wide_zero(scale, zero).to(dtype)) * wide_scale(scale).to(dtype)
    x = torch.nn.functional.pad(x, (0, 0, 0, total_tokens - x.shape[1]))
    if exact is not None:
        x[exact.rows.long(), exact.columns.long()] = getattr(exact, name).to(dtype)
    return x
