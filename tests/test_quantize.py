"""The group quantizer and the packing against independent numpy versions and words written by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import pack_blocks

from rotatekv.kernels.quantize import dequantize, dequantize_groups, quantize, quantize_groups
from rotatekv.methods.formats import ChannelGroups
from rotatekv.methods.stores import BlockStore

BITS = [2, 3, 4]


def numpy_quantize(x: np.ndarray, bits: int, group_size: int, clip_ratio: float):
    """Design section 1, step 4; the scale is rounded to the float16 it is stored in."""
    groups = x.astype(np.float32).reshape(*x.shape[:-1], -1, group_size)
    top, bottom = groups.max(-1) * np.float32(clip_ratio), groups.min(-1) * np.float32(clip_ratio)
    scale = ((top - bottom) / np.float32(2**bits - 1)).astype(np.float16).astype(np.float32)
    zero = np.rint(-bottom / scale)
    codes = np.clip(np.rint(groups / scale[..., None]) + zero[..., None], 0, 2**bits - 1)
    return codes.reshape(x.shape), scale, zero


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("clip_ratio", [1.0, 0.8, 0.5])
@pytest.mark.parametrize("group_size", [8, 16, 48])
def test_quantizer_equals_the_numpy_version(bits, clip_ratio, group_size):
    x = random(2, 7, 48)
    codes, scale, zero = quantize_groups(x, bits, group_size, clip_ratio)
    expected_codes, expected_scale, expected_zero = numpy_quantize(x.numpy(), bits, group_size, clip_ratio)
    assert codes.dtype == torch.uint8 and scale.dtype == torch.float16 and zero.dtype == torch.int8
    assert codes.shape == x.shape and scale.shape == zero.shape == (2, 7, 48 // group_size)
    np.testing.assert_array_equal(scale.float().numpy(), expected_scale)
    np.testing.assert_array_equal(zero.numpy(), expected_zero)
    np.testing.assert_array_equal(codes.numpy(), expected_codes)
    expected = (expected_codes.reshape(2, 7, -1, group_size) - expected_zero[..., None]) * expected_scale[..., None]
    np.testing.assert_allclose(dequantize_groups(codes, scale, zero).numpy(), expected.reshape(x.shape), rtol=1e-6)


def test_each_token_and_each_run_of_channels_has_its_own_scale():
    x = random(1, 3, 32)
    x[0, 1, 16:] *= 100
    _, scale, _ = quantize_groups(x, 2, 16)
    _, unchanged, _ = quantize_groups(random(1, 3, 32), 2, 16)
    changed = (scale != unchanged).squeeze(0)
    assert changed.tolist() == [[False, False], [False, True], [False, False]]


@pytest.mark.parametrize("bits", BITS)
def test_all_levels_from_0_to_2_to_the_bits_minus_1_are_used(bits):
    levels = 2**bits
    x = torch.linspace(-1, 1, 8 * levels).unsqueeze(0)
    codes, scale, _ = quantize_groups(x, bits, x.shape[1])
    assert sorted(set(codes.flatten().tolist())) == list(range(levels))
    assert scale.item() == pytest.approx(2 / (levels - 1), rel=1e-3)


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from(BITS),
    clip_ratio=st.sampled_from([1.0, 0.8]),
    shift=st.sampled_from([0.0, 3.0, -40.0, 1000.0]),
    spread=st.sampled_from([1e-6, 1e-2, 1.0, 500.0]),
    seed=st.integers(0, 10_000),
)
def test_error_is_at_most_half_a_scale_inside_the_representable_range(bits, clip_ratio, shift, spread, seed):
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(seed)) * spread + shift
    codes, scale, zero = quantize_groups(x, bits, 16, clip_ratio)
    wide, offset = scale.double(), zero.double()
    error = (dequantize_groups(codes, scale, zero).double() - x.double()).abs()
    inside = (x >= -offset * wide) & (x <= (2**bits - 1 - offset) * wide)
    slack = 1 + 1e-4  # float32 division of the codes
    assert bool((error <= wide / 2 * slack).masked_select(inside).all())
    if clip_ratio == 1.0:  # the integer zero point moves the range by at most half a step
        assert bool((error <= wide * 1.01 + 142 * 2.0**-25).all())  # near zero: (127 + 15) half steps of float16


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, 3.7, -250.0, 1e-5, 6e4, -6e4])
def test_constant_rows_come_back_almost_exactly(bits, value):
    x = torch.full((2, 3, 16), value)
    restored = dequantize_groups(*quantize_groups(x, bits, 8))
    assert torch.isfinite(restored).all()
    # float16 scales are steps of 2^-24 near zero, and the zero point multiplies half a step by up to 127
    torch.testing.assert_close(restored, x, rtol=0.004, atol=127 * 2.0**-25)


@pytest.mark.parametrize("bits", BITS)
def test_zeros_stay_exactly_zero(bits):
    assert torch.equal(dequantize_groups(*quantize_groups(torch.zeros(1, 4, 16), bits, 16)), torch.zeros(1, 4, 16))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("low, high", [(0.0, 1.0), (5.0, 6.0), (99.0, 100.0), (-6.0, -5.0), (-100.0, -99.0)])
def test_groups_on_one_side_of_zero(bits, low, high):
    x = torch.linspace(low, high, 16).reshape(1, 1, 16)
    codes, scale, zero = quantize_groups(x, bits, 16)
    error = (dequantize_groups(codes, scale, zero) - x).abs().max()
    largest = max(abs(low), abs(high))
    assert error <= max((high - low) / (2**bits - 1), largest / 127) * 1.01


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("clip_ratio", [1.0, 0.8])
@pytest.mark.parametrize("magnitude", [1e-38, 1e-30, 1e-10, 2.0**-24, 1e5, 1e20, 3e38])
def test_huge_and_tiny_values_give_no_nan_or_inf(bits, clip_ratio, magnitude):
    signs = torch.tensor([1.0, -1.0, 0.5, 0.0, 1.0, 1.0, -0.25, 1.0])
    for row in (signs, signs.abs(), -signs.abs()):
        codes, scale, zero = quantize_groups((row * magnitude).reshape(1, 8), bits, 8, clip_ratio)
        assert torch.isfinite(scale).all() and (scale > 0).all()
        assert torch.isfinite(dequantize_groups(codes, scale, zero)).all()
        assert int(codes.max()) <= 2**bits - 1 and int(zero.abs().max()) <= 127


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1, 16), (5, 1, 16)])
def test_one_token_and_a_batch_of_one_token_rows(shape, dtype):
    x = random(*shape).to(dtype)
    group_of_channel = torch.tensor([0, 1] * 8)

    def rounded(tokens: torch.Tensor) -> torch.Tensor:
        codes = quantize(tokens, 2, 8, group_of_channel, 0.8)
        return dequantize(**codes, group_of_channel=group_of_channel)

    whole = rounded(x)
    assert whole.shape == shape and torch.isfinite(whole).all()
    for row in range(shape[0]):
        assert torch.equal(rounded(x[row : row + 1]), whole[row : row + 1])


@pytest.mark.parametrize("bits", BITS)
def test_a_permutation_decides_only_which_channels_share_a_scale(bits):
    """The paper's words, permute and quantize and permute back, against groups that are gathered where they lie."""
    x, order = random(2, 5, 48), torch.randperm(48, generator=torch.Generator().manual_seed(bits))
    group_of_channel = torch.empty(48, dtype=torch.int64)
    for place, channel in enumerate(order.tolist()):
        group_of_channel[channel] = place // 16
    found = quantize(x, bits, 16, group_of_channel, 0.8)
    codes, scale, zero = quantize_groups(x[..., order], bits, 16, 0.8)
    assert torch.equal(found["codes"][..., order], codes)
    assert torch.equal(found["scale"], scale) and torch.equal(found["zero"], zero)
    back = dequantize(**found, group_of_channel=group_of_channel)
    assert torch.equal(back[..., order], dequantize_groups(codes, scale, zero))


@pytest.mark.parametrize("bits", BITS)
def test_quantizing_does_not_change_its_input(bits):
    x = random(1, 4, 16)
    before = x.clone()
    quantize_groups(x, bits, 8, 0.8)
    assert torch.equal(x, before)


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from(BITS),
    batch=st.integers(1, 3),
    tokens=st.lists(st.integers(1, 37), min_size=1, max_size=4),
    group=st.integers(1, 10),
    seed=st.integers(0, 10_000),
)
def test_a_store_gives_back_what_was_appended_in_whatever_pieces(bits, batch, tokens, group, seed):
    generator = torch.Generator().manual_seed(seed)
    channels = 2 * group
    groups = ChannelGroups(torch.randperm(channels, generator=generator) // group)
    store, pieces = BlockStore(bits, groups), []
    for count in tokens:
        codes = torch.randint(0, 2**bits, (batch, count, channels), generator=generator).to(torch.uint8)
        scale = torch.rand(batch, count, 2, generator=generator).half()
        zero = torch.randint(-127, 128, (batch, count, 2), generator=generator).to(torch.int8)
        pieces.append({"codes": codes, "scale": scale, "zero": zero})
        store.append(pieces[-1])
    total = sum(tokens)
    assert store.length == total
    for name, tensor in store.tokens().items():
        assert torch.equal(tensor, torch.cat([piece[name] for piece in pieces], dim=1))
    blocks = -(-total // 16)
    assert sum(x.nbytes for x in store) == batch * blocks * (2 * channels * bits + 16 * 2 * 3)
    keep = max(1, total // 2)
    shorter = BlockStore(bits, groups)
    shorter.append({name: tensor[:, :keep] for name, tensor in store.tokens().items()})
    store.crop(keep)
    assert all(torch.equal(one, other) for one, other in zip(store, shorter, strict=True))


@pytest.mark.parametrize(
    "bits, codes, low, high",
    [
        (2, [0, 1, 2, 3], 0b11_10_01_00, None),
        (2, [0] * 15 + [2], -(2**31), None),  # token 15 in the sign bit
        (3, [0, 1, 6, 7], 0b11_10_01_00, 0b1100),
        (3, [0] * 15 + [4], 0, -(2**15)),
        (4, [0, 1, 6, 15], 0b11_10_01_00, 0b11_01_00_00),
    ],
)
def test_the_words_are_the_documented_ones(bits, codes, low, high):
    codes = torch.tensor(codes, dtype=torch.uint8).view(1, -1, 1)
    scale = torch.ones(1, codes.shape[1], 1, dtype=torch.float16)
    packed = pack_blocks(codes, scale, scale.to(torch.int8), bits)
    assert packed["low"].tolist() == [[[low]]] and packed["low"].dtype == torch.int32
    assert high is None or packed["high"].tolist() == [[[high]]]
    ones = [1.0] * codes.shape[1] + [0.0] * (16 - codes.shape[1])  # lanes past the end are zero
    assert packed["scale"].tolist() == [[[ones]]] and packed["zero"].tolist() == [[[ones]]]
