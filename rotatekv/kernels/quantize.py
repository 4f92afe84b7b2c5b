"""Asymmetric group quantization along the last dimension, in plain torch: what any faster one must compute."""

from __future__ import annotations

import torch

# PAPER: its 2.25 average bits suggest a 16-bit scale and zero point; here the scale is a float16 and the zero an int8.
# The stored zero point is an int8, so a group whose values all lie far from zero needs a scale of at least
# |value| / 127: a constant group keeps a relative error below 0.4 % down to 1e-4, where float16 scales end.
_ZERO_POINT_LIMIT = 127
_SMALLEST_SCALE = 2.0**-24  # smallest positive float16
_LARGEST_SCALE = 65504.0  # largest float16

# Compact scales. A scale is the upper half of a float16 without its sign, 5 bits of exponent and 3 of fraction: its
# 6 % at most are the clip's, not an error's, since codes are computed with the scale as it is stored.
COMPACT_SCALE = torch.uint8
ZERO_STEPS = 8  # of a code's step: rounding the zero point to them adds 1/64 to the noise of rounding the codes
_SMALLEST_COMPACT_SCALE = 1  # 2^-17
_LARGEST_COMPACT_SCALE = 0xF7  # 61440; 0xF8 is infinity
_COMPACT_SHIFT = 7


def quantize_groups(
    x: torch.Tensor, bits: int, group_size: int, clip_ratio: float = 1.0, compact: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Round each group of ``group_size`` consecutive numbers to 2^bits levels.

    ``scale = c·(max − min) / (2^bits − 1)``, ``zero = round(−c·min / scale)``,
    ``code = clamp(round(x / scale) + zero)``; the codes are computed with the scale as it is stored.

    Args:
        x: (..., C) with ``group_size`` dividing C; finite.
        clip_ratio: c, the factor on max and min; compact: on the range, about its middle.
        compact: the zero point is rounded to eighths, ``code = clamp(round(x / scale + zero))``, and both take 8 bits.

    Returns:
        codes (..., C) uint8 in [0, 2^bits − 1], scale (..., C / group_size) float16, zero (..., C / group_size) int8;
        compact: scale uint8, zero int8 in eighths.
    """
    groups = x.float().unflatten(-1, (-1, group_size))  # (..., C / g, g)
    if compact:
        return _quantize_compact(groups, bits, clip_ratio)
    top = groups.amax(-1) * clip_ratio
    bottom = groups.amin(-1) * clip_ratio
    # AUTHORS: divide by 2^bits − 1; their 3-bit scale divides by bits² − 1 = 8. They also leave a zero range unguarded.
    levels = 2**bits - 1
    scale = torch.maximum((top - bottom) / levels, bottom.abs() / _ZERO_POINT_LIMIT)
    scale = scale.clamp(_SMALLEST_SCALE, _LARGEST_SCALE).half()
    step = scale.float()
    zero = torch.round(-bottom / step).clamp(-_ZERO_POINT_LIMIT, _ZERO_POINT_LIMIT)
    codes = torch.round(groups / step.unsqueeze(-1)).add_(zero.unsqueeze(-1)).clamp_(0, levels)
    return codes.to(torch.uint8).flatten(-2), scale, zero.to(torch.int8)


def _quantize_compact(
    groups: torch.Tensor, bits: int, clip_ratio: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    top, bottom, levels = groups.amax(-1), groups.amin(-1), 2**bits - 1
    middle, reach = (top + bottom) * 0.5, (top - bottom) * (0.5 * clip_ratio)
    bottom = middle - reach
    scale = torch.maximum(reach * 2 / levels, bottom.abs() * (ZERO_STEPS / _ZERO_POINT_LIMIT))
    half = scale.clamp(_SMALLEST_SCALE, _LARGEST_SCALE).half().view(torch.int16).int()
    scale = (half + (1 << (_COMPACT_SHIFT - 1))) >> _COMPACT_SHIFT
    scale = scale.clamp(_SMALLEST_COMPACT_SCALE, _LARGEST_COMPACT_SCALE)
    # A scale that was rounded down may leave the zero point out of reach: the next one does not.
    beyond = scale_to_float32(scale.to(COMPACT_SCALE)) * (_ZERO_POINT_LIMIT / ZERO_STEPS) < bottom.abs()
    scale = (scale + beyond).clamp_max(_LARGEST_COMPACT_SCALE).to(COMPACT_SCALE)
    step = scale_to_float32(scale)
    zero = torch.round(-bottom * ZERO_STEPS / step).clamp(-_ZERO_POINT_LIMIT, _ZERO_POINT_LIMIT)
    codes = torch.round(groups / step.unsqueeze(-1) + zero.unsqueeze(-1) / ZERO_STEPS).clamp_(0, levels)
    return codes.to(torch.uint8).flatten(-2), scale, zero.to(torch.int8)


def scale_to_float32(scale: torch.Tensor) -> torch.Tensor:
    """A stored scale, float16 or uint8 (compact), as float32."""
    if scale.dtype == COMPACT_SCALE:
        scale = (scale.to(torch.int16) << _COMPACT_SHIFT).view(torch.float16)
    return scale.float()


def zero_to_float32(scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """The stored zero points beside ``scale``, in codes, as float32."""
    return zero.float() / ZERO_STEPS if scale.dtype == COMPACT_SCALE else zero.float()


def dequantize_groups(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """``x̂ = (code − zero)·scale``.

    Args:
        codes: (..., C) uint8; scale, zero: (..., C / group_size), of either format: the scale's dtype says which.

    Returns:
        (..., C) float32.
    """
    groups = codes.float().unflatten(-1, (scale.shape[-1], -1))  # (..., C / g, g)
    groups = groups.sub_(zero_to_float32(scale, zero).unsqueeze(-1))
    return groups.mul_(scale_to_float32(scale).unsqueeze(-1)).flatten(-2)


def quantize(
    x: torch.Tensor,
    bits: int,
    group_size: int,
    group_of_channel: torch.Tensor,
    clip_ratio: float = 1.0,
    compact: bool = False,
) -> dict[str, torch.Tensor]:
    """Round channels that lie anywhere: those of one group share a scale and a zero point; see ``quantize_groups``.

    Args:
        x: (..., C).
        group_of_channel: (C,) integers 0 … C / group_size − 1, each of them ``group_size`` times.

    Returns:
        ``codes`` (..., C) uint8, each where its number was, ``scale`` and ``zero`` (..., groups).
    """
    by_group = torch.argsort(group_of_channel, stable=True)  # (C,) channels, group after group
    codes, scale, zero = quantize_groups(x[..., by_group], bits, group_size, clip_ratio, compact)
    return {"codes": codes[..., torch.argsort(by_group)], "scale": scale, "zero": zero}


def dequantize(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    group_of_channel: torch.Tensor,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """``x̂ = (code − zero)·scale`` of each channel's group: the inverse of ``quantize`` up to rounding.

    Args:
        codes: (..., C). scale, zero: (..., groups), as they are stored. group_of_channel: (C,).

    Returns:
        (..., C), computed in ``dtype``.
    """
    group = group_of_channel.long()
    channels = codes.to(dtype).sub_(zero_to_float32(scale, zero)[..., group])
    return channels.mul_(scale_to_float32(scale)[..., group])
