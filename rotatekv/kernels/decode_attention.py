"""Decode attention over a packed cache in plain torch: what a fused kernel must compute."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from rotatekv.kernels.hadamard import channels_to_heads, rotate_channels
from rotatekv.kernels.layout import Packed, unpack_blocks, unpack_planes
from rotatekv.kernels.quantize import dequantize
from rotatekv.kernels.rope_tables import RopeTables
from rotatekv.kernels.transform_coding import FRAME, Transform, dequantize_components, unpack_components


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
        key_bits, value_bits: 2, 3 or 4; 0 with a transform.
        softmax_scale: factor on the scores, usually D^-0.5.
        rotation_width: W = G·D of the keys' Hadamard matrix; 0: keys are not rotated.
        rope: turn packed keys on read; None: they are after RoPE, as queries and exact keys always are.
        unrotate_values: packed values are rotated: their part of each output head is multiplied by the inverse
            Hadamard matrix of order D.
        key_tokens_per_scale: g, a multiple of 16: keys have a scale and zero per channel and g tokens, see
            ``layout.py``; 0: per token and quantization group of channels.
        key_transform: of transform-coded keys; None: keys are not. With it, nothing that is said of keys above is used
            but ``rope``, without its factor.
        value_transform: of transform-coded values; None: values are not. With it, value_bits and unrotate_values are
            not used.
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
    sliding_window: int = 0
    key_transform: Transform | None = None
    value_transform: Transform | None = None


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
    dropped: int = 0,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The arguments of ``rotatekv.kernels.cpu.decode_attention``, computed in ``dtype`` → (B, H, T_q, D)."""
    if options.key_transform is None:
        k = unpack_keys(keys, group_of_channel, origin, packed_tokens, options, dtype)
    else:
        components = unpack_transformed(keys, packed_tokens, options.key_transform, dtype)
        k = keys_of_components(components, origin, dropped, options)
    if options.value_transform is None:
        v = unpack_values(values, packed_tokens, options, dtype)
    else:
        v = values_of_components(unpack_transformed(values, packed_tokens, options.value_transform, dtype), options)
    return attend(queries, k, v, first_seen, total_tokens, options, exact)


def unpack_keys(
    keys: Packed,
    group_of_channel: torch.Tensor | None,
    origin: torch.Tensor,
    packed_tokens: int,
    options: DecodeOptions,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The packed tokens' keys as attention sees them, (B, H_kv, T, D)."""
    channels, device = keys["low"].shape[-1], keys["low"].device
    if options.key_tokens_per_scale:  # every channel has its own
        k = unpack_planes(keys, packed_tokens, options.key_bits, options.key_tokens_per_scale)
        k = dequantize(*k, torch.arange(channels, dtype=torch.int64, device=device), dtype)
    else:
        k = dequantize(*unpack_blocks(keys, packed_tokens, options.key_bits), group_of_channel, dtype)
    if options.rotation_width:
        k = rotate_channels(k, options.rotation_width, inverse=True)
    k = channels_to_heads(k, options.head_dim)
    if options.rope is None:
        return k
    tokens = torch.arange(packed_tokens, dtype=torch.int64, device=device)
    return options.rope.turn(k, (tokens + origin.long()[:, None]).clamp(min=0))  # positions (B, T)


def unpack_values(values: Packed, packed_tokens: int, options: DecodeOptions, dtype: torch.dtype) -> torch.Tensor:
    """The packed tokens' values, (B, H_kv, T, D)."""
    channels = values["low"].shape[-1]
    group = torch.arange(channels, dtype=torch.int64, device=values["low"].device)
    group //= channels // values["scale"].shape[2]
    v = dequantize(*unpack_blocks(values, packed_tokens, options.value_bits), group, dtype)
    if options.unrotate_values:
        v = rotate_channels(v, options.head_dim, inverse=True)
    return channels_to_heads(v, options.head_dim)


def unpack_transformed(packed: Packed, tokens: int, transform: Transform, dtype: torch.dtype) -> torch.Tensor:
    """The first ``tokens`` tokens' components, (B, T, H_kv, D)."""
    return dequantize_components(*unpack_components(packed, tokens, transform), transform).to(dtype)


def keys_of_components(
    components: torch.Tensor, origin: torch.Tensor, dropped: int, options: DecodeOptions
) -> torch.Tensor:
    """Components (B, T, H_kv, D) of the first tokens → keys as attention sees them, (B, H_kv, T, D).

    ``R(o)·(A⁻¹·γ·x̂ + R(j)·μ)``: token c has the place c + ``dropped`` and the position c + ``origin``; j is its place
    in its frame, o the position of the frame's first token.
    """
    transform = options.key_transform
    assert transform is not None
    k = components.transpose(1, 2) @ transform.inverse.to(components.dtype).mT  # (B, H_kv, T, D)
    token = torch.arange(k.shape[2], dtype=torch.int64, device=k.device).expand(len(k), -1)  # (B, T)
    in_frame = (token + dropped) % FRAME
    mean = transform.mean.to(k.dtype)[None, :, None].expand_as(k)
    first = token - in_frame + origin.long()[:, None]  # below −FRAME all of a frame is padding, which nobody sees
    return _turn(k + _turn(mean, options.rope, in_frame), options.rope, first.clamp(min=-FRAME))


def _turn(x: torch.Tensor, rope: RopeTables | None, positions: torch.Tensor) -> torch.Tensor:
    """Without RoPE's factor, which is in the keys."""
    return x if rope is None else replace(rope, attention_scaling=1.0).turn(x, positions)


def values_of_components(components: torch.Tensor, options: DecodeOptions) -> torch.Tensor:
    """Components (B, T, H_kv, D) → values ``A⁻¹·γ·x̂ + μ``, (B, H_kv, T, D)."""
    transform = options.value_transform
    assert transform is not None
    v = components.transpose(1, 2) @ transform.inverse.to(components.dtype).mT
    return v + transform.mean.to(v.dtype).unsqueeze(1)


def attend(
    queries: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    first_seen: torch.Tensor,
    total_tokens: int,
    options: DecodeOptions,
    exact: ExactTokens | None,
) -> torch.Tensor:
    """Attention over packed keys and values as they are read, (B, H_kv, T, D) each, and the exact tokens."""
    query_tokens, dim = queries.shape[2:]
    dtype, device = k.dtype, k.device
    k, v = (torch.nn.functional.pad(x, (0, 0, 0, total_tokens - x.shape[2])) for x in (k, v))
    columns = torch.arange(total_tokens, dtype=torch.int64, device=device)
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
