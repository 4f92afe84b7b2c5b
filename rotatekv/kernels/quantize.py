"""Asymmetric group quantization along the last dimension, in plain torch: what any faster one must compute."""

from __future__ import annotations

import torch

# PAPER: its 2.25 average bits suggest a 16-bit scale and zero point; here the scale is a float16 and the zero an int8.
# The stored zero point is an int8, so a group whose values all lie far from zero needs a scale of at least
# |value| / 127: a constant group keeps a relative error below 0.4 % down to 1e-4, where float16 scales end.
_ZERO_POINT_LIMIT = 127
_SMALLEST_SCALE = 2.0**-24  # smallest positive float16
_LARGEST_SCALE = 65504.0  # largest float16


def quantize_groups(
    x: torch.Tensor, bits: int, group_size: int, clip_ratio: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Round each group of ``group_size`` consecutive numbers to 2^bits levels.

    ``scale = c·(max − min) / (2^bits − 1)``, ``zero = round(−c·min / scale)``,
    ``code = clamp(round(x / scale) + zero)``; the codes are computed with the scale as it is stored.

    Args:
        x: (..., C) with ``group_size`` dividing C; finite.
        clip_ratio: c, the factor on max and min.

    Returns:
        codes (..., C) uint8 in [0, 2^bits − 1], scale (..., C / group_size) float16, zero (..., C / group_size) int8.
    """
    groups = x.float().unflatten(-1, (-1, group_size))  # (..., C / g, g)
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


def dequantize_groups(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """``x̂ = (code − zero)·scale``.

    Args:
        codes: (..., C) uint8; scale, zero: (..., C / group_size).

    Returns:
        (..., C) float32.
    """
    groups = codes.float().unflatten(-1, (scale.shape[-1], -1))  # (..., C / g, g)
    groups = groups.sub_(zero.float().unsqueeze(-1))
    return groups.mul_(scale.float().unsqueeze(-1)).flatten(-2)


def quantize(
    x: torch.Tensor, bits: int, group_size: int, group_of_channel: torch.Tensor, clip_ratio: float = 1.0
) -> dict[str, torch.Tensor]:
    """Round channels that lie anywhere: those of one group share a scale and a zero point; see ``quantize_groups``.

    Args:
        x: (..., C).
        group_of_channel: (C,) integers 0 … C / group_size − 1, each of them ``group_size`` times.

    Returns:
        ``codes`` (..., C) uint8, each where its number was, ``scale`` and ``zero`` (..., groups).
    """
    by_group = torch.argsort(group_of_channel, stable=True)  # (C,) channels, group after group
    codes, scale, zero = quantize_groups(x[..., by_group], bits, group_size, clip_ratio)
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
    channels = codes.to(dtype).sub_(zero.float()[..., group])
    return channels.mul_(scale.float()[..., group])
