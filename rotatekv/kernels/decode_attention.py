"""Decode attention over a packed cache in plain torch: what a fused kernel must compute."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from rotatekv.kernels.affine import Affine
from rotatekv.kernels.hadamard import channels_to_heads, rotate_channels
from rotatekv.kernels.layout import Packed, unpack_blocks, unpack_planes
from rotatekv.kernels.quantize import dequantize
from rotatekv.kernels.rope_tables import RopeTables


@dataclass(frozen=True)
class ExactTokens:
    """Tokens kept in 16 bits, attention sinks and the recent window, as attention sees them.

    Attributes:
        batch_index, token_index: (S,) int32, the sequence (ascending) and the token of each, no pair twice.
        keys, values: (S, H_kv, D) float16 or bfloat16, keys after RoPE. They replace a packed token of the same place.
    """

    batch_index: torch.Tensor
    token_index: torch.Tensor
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
        rope: turn packed keys on read; None: they are after RoPE, as queries and exact keys always are.
        unrotate_values: packed values are rotated: their part of each output head is multiplied by the inverse
            Hadamard matrix of order D.
        key_tokens_per_scale: g, a multiple of 16: keys have a scale and zero per channel and g tokens, see
            ``layout.py``; 0: per token and quantization group of channels.
        key_affine: what packed keys still lack after the inverse Hadamard, before RoPE; None: nothing.
        sliding_window: a query of token c sees the tokens after c − sliding_window; 0: all.
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
    sliding_window: int = 0


def decode_attention_reference(
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
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The arguments of ``rotatekv.kernels.cpu.decode_attention``, computed in ``dtype`` → (B, H, T_q, D)."""
    query_tokens, dim = queries.shape[2:]
    channels, device = keys["low"].shape[-1], queries.device
    counted = torch.arange(channels, dtype=torch.int64, device=device)
    if options.key_tokens_per_scale:  # every channel has its own
        k = unpack_planes(keys, packed_tokens, options.key_bits, options.key_tokens_per_scale)
        k = dequantize(*k, counted, dtype)
    else:
        k = dequantize(*unpack_blocks(keys, packed_tokens, options.key_bits), group_of_channel, dtype)
    value_group = counted // (channels // values["scale"].shape[2])
    v = dequantize(*unpack_blocks(values, packed_tokens, options.value_bits), value_group, dtype)
    k, v = (torch.nn.functional.pad(x, (0, 0, 0, total_tokens - packed_tokens)) for x in (k, v))  # (B, T, C)
    if options.rotation_width:
        k = rotate_channels(k, options.rotation_width, inverse=True)
    if options.key_affine is not None:
        k = options.key_affine(k).to(dtype)
    if options.unrotate_values:
        v = rotate_channels(v, dim, inverse=True)
    k, v = channels_to_heads(k, dim), channels_to_heads(v, dim)  # (B, H_kv, T, D)
    columns = torch.arange(total_tokens, dtype=torch.int64, device=device)
    if options.rope is not None:
        k = options.rope.turn(k, (columns + origin.long()[:, None]).clamp(min=0))  # positions (B, T)
    if exact is not None:
        where = exact.batch_index.long(), slice(None), exact.token_index.long()
        k[where], v[where] = exact.keys.to(dtype), exact.values.to(dtype)
    rows = queries.to(dtype).reshape(len(queries), k.shape[1], -1, dim)  # (B, H_kv, repeat·T_q, D): no copies of heads
    scores = (rows @ k.transpose(2, 3)).view(*queries.shape[:3], -1) * options.softmax_scale  # (B, H, T_q, T)
    own = torch.arange(total_tokens - query_tokens, total_tokens, dtype=torch.int64, device=device)[:, None]
    seen = (columns <= own) & (columns >= first_seen[:, None, None])  # (B, T_q, T)
    if options.sliding_window:
        seen &= columns > own - options.sliding_window
    weights = torch.softmax(scores.masked_fill(~seen[:, None], -math.inf), -1).nan_to_num(0.0)  # a row may see nothing
    return (weights.view(*rows.shape[:3], -1) @ v).view(queries.shape)
