"""Compact scales and zero points against numpy, byte by byte."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rotatekv.kernels.quantize import dequantize_groups, quantize_groups, scale_to_float32


def numpy_scales() -> np.ndarray:
    """All scales a byte can mean, from the definition: 5 bits of exponent, 3 of fraction, bias 15."""
    byte = np.arange(256)
    exponent, fraction = byte >> 3, byte & 7
    return np.where(exponent == 0, fraction / 8 * 2.0**-14, (1 + fraction / 8) * 2.0 ** (exponent - 15.0))


def test_a_byte_is_a_small_float():
    decoded = scale_to_float32(torch.arange(0xF8).byte())
    np.testing.assert_array_equal(decoded.numpy(), numpy_scales()[:0xF8].astype(np.float32))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("clip_ratio", [1.0, 0.8])
@pytest.mark.parametrize("shift", [0.0, 2.0, -7.0])
@pytest.mark.parametrize("spread", [1e-3, 1.0, 300.0])
def test_quantizer_equals_the_numpy_version(bits, clip_ratio, shift, spread):
    x = (torch.randn(40, 64, generator=torch.Generator().manual_seed(bits)) + shift) * spread
    codes, scale, zero = quantize_groups(x, bits, 32, clip_ratio, compact=True)
    assert scale.dtype == codes.dtype == torch.uint8 and zero.dtype == torch.int8
    groups = x.double().numpy().reshape(40, 2, 32)
    middle, reach = (groups.max(-1) + groups.min(-1)) / 2, (groups.max(-1) - groups.min(-1)) / 2 * clip_ratio
    least = np.abs(middle - reach) * 8 / 127  # or the zero point would not fit
    wanted = np.maximum(2 * reach / (2**bits - 1), least)
    steps = numpy_scales()
    allowed = np.where(steps[:0xF8] * 1.0005 >= least[..., None], steps[:0xF8], np.inf)
    nearest = np.abs(allowed - wanted[..., None]).min(-1)
    # Rounded twice, to float16 first; and what is least is a matter of float32's last digit.
    assert (np.abs(steps[scale.numpy()] - wanted) <= nearest + wanted * 1e-3).mean() > 0.98
    wide = steps[scale.numpy()]
    eighths = np.rint(-(middle - reach) * 8 / wide)
    assert (np.abs(zero.numpy() - eighths) <= 1).all() and (zero.numpy() == eighths).mean() > 0.99
    expected = np.clip(np.rint(groups / wide[..., None] + zero.numpy()[..., None] / 8), 0, 2**bits - 1)
    assert (codes.numpy().reshape(expected.shape) == expected).mean() > 0.999  # but for ties
    restored = dequantize_groups(codes, scale, zero).double().numpy().reshape(groups.shape)
    given = codes.numpy().reshape(groups.shape)
    np.testing.assert_allclose(restored, (given - zero.numpy()[..., None] / 8) * wide[..., None], rtol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_range_that_is_not_clipped_comes_back_within_half_a_step(bits):
    x = torch.rand(50, 64, generator=torch.Generator().manual_seed(0)) * 3 - 1
    codes, scale, zero = quantize_groups(x, bits, 64, 1.0, compact=True)
    wide = scale_to_float32(scale)
    error = (dequantize_groups(codes, scale, zero) - x).abs()
    # A scale rounded down by 1/16 at most loses as much of the range, and the zero point a sixteenth of a step.
    assert (error <= wide * (0.5 + 1 / 16 + (2**bits - 1) / 2 / 15)).all()
    assert (error <= wide * 0.5001).float().mean() > 0.95


@pytest.mark.parametrize("value", [0.0, 1.0, -250.0, 1e-30, 6e4, -1e38, *np.linspace(-2, -1, 23)])
def test_constant_and_extreme_rows_stay_finite(value):
    restored = dequantize_groups(*quantize_groups(torch.full((1, 16), value), 2, 16, 0.8, compact=True))
    assert restored.isfinite().all()
    if 1e-3 < abs(value) < 1e5:
        torch.testing.assert_close(restored, torch.full((1, 16), value), rtol=0.01, atol=0)
    assert value or not restored.any()
