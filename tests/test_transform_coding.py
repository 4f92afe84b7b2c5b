"""Transform coding against few lines of numpy: levels, scales, planes, the best map of a head and the split of a
budget."""

from __future__ import annotations

from functools import partial
from itertools import product

import numpy as np
import pytest
import torch

from rotatekv.calibration.transform import best_map
from rotatekv.kernels.transform_coding import (
    GROUP,
    MOST_BITS,
    NOISE,
    STEPS,
    Transform,
    dequantize_components,
    pack_components,
    quantize_components,
    unpack_components,
)
from rotatekv.methods.bit_budget import Choice, allocate
from rotatekv.methods.rotatekv_plus import VALUE_NOISE

MIXED = [[5, 4, 3, 1], [2, 0, 1, 0]]  # bits of the groups of two heads
COMPONENTS = np.repeat(MIXED, GROUP, axis=1)  # (H_kv, D), bits of each


def transform(bits, words_of_tokens: bool = True, weights=None) -> Transform:
    bits = torch.tensor(bits)
    weights = torch.ones(bits.shape) if weights is None else torch.tensor(weights)
    eye = torch.eye(bits.shape[1] * GROUP).expand(len(bits), -1, -1)
    return Transform(eye, torch.zeros(eye.shape[:2]), bits, weights, words_of_tokens=words_of_tokens)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def components(bits, tokens: int, seed: int = 0) -> torch.Tensor:
    """(1, T, H_kv, D) of a standard normal variable, in units of their steps; tokens differ in strength."""
    steps = torch.tensor(STEPS)[torch.tensor(bits)].repeat_interleave(GROUP, 1)
    return normal(1, tokens, *steps.shape, seed=seed) / steps * normal(1, tokens, 1, 1, seed=seed + 1).exp()


def levels(bits: int) -> np.ndarray:
    """Symmetric about zero, one apart; of no bits: zero."""
    return np.arange(2**bits) - (2**bits - 1) / 2


def rounded(x: np.ndarray, scale: float, bits: np.ndarray) -> np.ndarray:
    """One head's components (D,), each to the nearest of its levels."""
    nearest = [levels(b)[np.abs(levels(b) * scale - y).argmin()] for y, b in zip(x, bits, strict=True)]
    return np.array(nearest) * scale


def test_a_component_reads_as_the_level_nearest_to_it():
    x = components(MIXED, 12)
    codes, scale = quantize_components(x, transform(MIXED))
    assert codes.dtype == scale.dtype == torch.uint8 and scale.shape == (1, 12, 2)
    found = dequantize_components(codes, scale, transform(MIXED))[0].numpy()
    for token, head in product(range(12), range(2)):
        factor = 2 ** ((int(scale[0, token, head]) - 128) / 8)
        expected = rounded(x[0, token, head].numpy(), factor, COMPONENTS[head])
        np.testing.assert_allclose(found[token, head], expected, rtol=1e-6, atol=1e-12)
        code = np.where(COMPONENTS[head] > 0, expected / factor - 0.5 + 2.0 ** (COMPONENTS[head] - 1), 0)
        np.testing.assert_allclose(codes[0, token, head].numpy(), code, atol=1e-5)


@pytest.mark.parametrize(
    "bits, weights", [(MIXED, None), (MIXED, [[1.0, 0.9, 0.8, 0.6], [0.7, 0.1, 0.6, 1.0]]), ([[2] * 4] * 2, None)]
)
def test_no_stored_scale_is_much_better_than_the_one_chosen(bits, weights):
    """Of all 256."""
    of_heads = transform(bits, weights=weights)
    x, tokens = components(bits, 60), 60
    codes, scale = quantize_components(x, of_heads)
    weight = of_heads.weights.repeat_interleave(GROUP, 1).double() * (of_heads.component_bits > 0)

    def errors(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return ((dequantize_components(codes, scale, of_heads) - x).double().square() * weight).sum(-1)[0]

    half = of_heads.levels
    every = torch.empty(256, tokens, 2, dtype=torch.float64)
    for stored in range(256):
        there = torch.full_like(scale, stored)
        code = (x / 2 ** ((stored - 128) / 8) + half).floor().maximum(0 * half).minimum((2 * half - 1).clamp_min(0))
        every[stored] = errors(code.byte(), there)
    loss = errors(codes, scale) / every.min(0).values
    assert loss.min() > 1 - 1e-5
    assert loss.mean() < 1.01 and loss.max() < 1.1


@pytest.mark.parametrize("bits", range(1, MOST_BITS + 1))
def test_steps_are_the_best_of_a_normal_variable_and_the_noise_is_what_they_leave(bits):
    density_at = np.linspace(-8, 8, 16_001)
    density = np.exp(-(density_at**2) / 2) / np.sqrt(2 * np.pi) * (density_at[1] - density_at[0])

    def noise(step: float) -> float:
        codes = np.clip(np.floor(density_at / step + 2 ** (bits - 1)), 0, 2**bits - 1)
        return float((((codes + 0.5 - 2 ** (bits - 1)) * step - density_at) ** 2 * density).sum())

    candidates = STEPS[bits] * np.linspace(0.9, 1.1, 41)
    assert noise(STEPS[bits]) < 1.0005 * min(map(noise, candidates))
    assert noise(STEPS[bits]) == pytest.approx(NOISE[bits], rel=0.11)
    coded = transform([[bits] * 4])
    x = normal(1, 3000, 1, 64)  # of variance 1
    codes, scale = quantize_components(x / STEPS[bits], coded)
    found = ((dequantize_components(codes, scale, coded) * STEPS[bits] - x) ** 2).mean().item()
    assert 0.65 * NOISE[bits] < found < NOISE[bits]  # a scale of the token's own


@pytest.mark.parametrize("size", [0.0, 1e-12, 1e-4, 1e4, 1e15])
def test_tokens_of_any_size_read_as_numbers(size):
    """A scale of 8 bits ends at 2^±16: beyond, codes are the nearest there are."""
    x = components(MIXED, 5) * size
    coded = transform(MIXED)
    codes, scale = quantize_components(x, coded)
    found = dequantize_components(codes, scale, coded)
    assert found.isfinite().all()
    assert (codes.numpy() < 2**COMPONENTS).all()
    if size in (1e-4, 1e4):
        again, other = quantize_components(components(MIXED, 5), coded)
        usual = dequantize_components(again, other, coded) * size
        assert (found - x).square().mean() < 1.02 * (usual - x).square().mean()
    elif size > 1:
        assert (found * x >= 0).all() and (scale == 255).all()
    else:
        assert found.abs().max() <= 2.0**-16 * 15.5 and not scale.any()


def test_one_huge_token_does_not_touch_the_others():
    x = components(MIXED, 20)
    huge = x.clone()
    huge[0, 7, 1] *= 1e6
    codes, scale = quantize_components(x, transform(MIXED))
    others, of_others = quantize_components(huge, transform(MIXED))
    assert (scale != of_others).nonzero().tolist() == [[0, 7, 1]]
    assert all(torch.equal(codes[0, token], others[0, token]) for token in range(20) if token != 7)


def test_a_head_without_bits_reads_as_zero():
    coded = transform([[0, 0], [0, 3]])
    codes, scale = quantize_components(normal(1, 16, 2, 32), coded)
    found = dequantize_components(codes, scale, coded)
    assert not found[:, :, 0].any() and not found[:, :, 1, :16].any() and found[:, :, 1, 16:].all()
    assert {name: x.shape[2] for name, x in pack_components(codes, scale, coded).items()} == {
        "pairs": 1,
        "singles": 1,
        "scale": 2,
    }


# --- planes --------------------------------------------------------------------------------------------------------


def place_of_single(number: int) -> int:
    """Number 4a + b lies at bit 4·(0, 2, 1, 3)[a] + b."""
    return 4 * (0, 2, 1, 3)[number // 4] + number % 4


def random_codes(bits, rows: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    shape = rows, tokens, len(bits), len(bits[0]) * GROUP
    limits = 2 ** torch.tensor(bits).repeat_interleave(GROUP, 1)
    codes = (torch.rand(shape, generator=generator) * limits).byte()
    return codes, torch.randint(256, shape[:3], generator=generator).byte()


@pytest.mark.parametrize("words_of_tokens", [True, False])
@pytest.mark.parametrize("bits", [MIXED, [[0, 1], [2, 3], [4, 5]], [[2, 2]]])
def test_packed_codes_are_the_same_again(bits, words_of_tokens):
    codes, scale = random_codes(bits, 3, 48)
    coded = transform(bits, words_of_tokens)
    packed = pack_components(codes, scale, coded)
    for tokens in (48, 33, 16, 1):
        found = unpack_components(packed, tokens, coded)
        assert torch.equal(found[0], codes[:, :tokens]) and torch.equal(found[1], scale[:, :tokens])
    held = sum(x.nbytes for x in packed.values())
    assert held == 3 * 48 * (sum(map(sum, bits)) * GROUP // 8 + len(bits))


@pytest.mark.parametrize("words_of_tokens", [True, False])
def test_every_bit_lies_where_the_layout_says(words_of_tokens):
    codes, scale = random_codes(MIXED, 2, 32)
    packed = {name: x.numpy() for name, x in pack_components(codes, scale, transform(MIXED, words_of_tokens)).items()}
    assert {name: str(x.dtype) for name, x in packed.items()} == {
        "pairs": "int32",
        "singles": "int16",
        "scale": "uint8",
    }
    numbers, pair, single = codes.numpy(), 0, 0
    for head, group in product(range(2), range(4)):
        bits = MIXED[head][group]
        for row, block, word in product(range(2), range(2), range(16)):
            if words_of_tokens:
                sixteen = numbers[row, 16 * block + word, head, 16 * group : 16 * group + 16]
            else:
                sixteen = numbers[row, 16 * block : 16 * block + 16, head, 16 * group + word]
            for plane in range(bits // 2):
                held = int(packed["pairs"][row, block, pair + plane, word])
                assert [held >> 2 * c & 3 for c in range(16)] == [int(x) >> 2 * plane & 3 for x in sixteen]
            if bits % 2:
                held = int(packed["singles"][row, block, single, word])
                assert [held >> place_of_single(c) & 1 for c in range(16)] == [int(x) >> bits - 1 for x in sixteen]
        pair, single = pair + bits // 2, single + bits % 2
    assert packed["pairs"].shape[2] == pair and packed["singles"].shape[2] == single
    want = scale.numpy().reshape(2, 2, 16, 2).transpose(0, 1, 3, 2)
    assert (packed["scale"] == want).all()


def test_a_single_and_itself_shifted_by_twelve_hold_four_numbers_in_each_bytes_low_half():
    numbers = np.random.default_rng(0).integers(0, 2, 16)
    word = sum(int(x) << place_of_single(c) for c, x in enumerate(numbers))
    both = (word | word << 12) & 0x0F0F0F0F
    for byte in range(4):
        assert [both >> 8 * byte + b & 1 for b in range(4)] == numbers[4 * byte : 4 * byte + 4].tolist()


# --- the best map --------------------------------------------------------------------------------------------------


def covariance(dim: int, seed: int) -> torch.Tensor:
    """(D, D) float64, of directions whose strengths differ by e^±3."""
    generator = torch.Generator().manual_seed(seed)
    axes = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64)).Q
    return axes * torch.exp(2 * torch.randn(dim, generator=generator, dtype=torch.float64)) @ axes.T


def cost_of(map_: torch.Tensor, second_moment: torch.Tensor, metric: torch.Tensor, noise: torch.Tensor) -> float:
    """What rounding costs by any map: each group's components get ``noise`` (D / 16,) times their mean variance."""
    back = torch.linalg.inv(map_)
    variance = (map_ @ second_moment @ map_.T).diagonal().view(len(noise), -1).mean(1)
    return ((noise * variance)[:, None] * (back.T @ metric @ back).diagonal().view(len(noise), -1)).sum().item()


@pytest.mark.parametrize("group", [GROUP, 64])
def test_a_heads_map_gives_components_of_variance_1_whose_noise_costs_what_is_foretold(group):
    second_moment, metric = covariance(64, 1), covariance(64, 2)
    map_, costs = best_map(second_moment, metric, group, ridge=0.0)
    variance = (map_ @ second_moment @ map_.T).diagonal()
    torch.testing.assert_close(variance, torch.ones_like(variance))
    assert (costs.diff() < 0).all()
    noise = torch.linspace(0.01, 0.4, 64 // group, dtype=torch.float64)
    assert cost_of(map_, second_moment, metric, noise) == pytest.approx((costs * noise).sum().item())
    torch.testing.assert_close(torch.linalg.inv(map_) @ map_, torch.eye(64, dtype=torch.float64))


@pytest.mark.parametrize("group", [GROUP, 64])
def test_no_map_nearby_costs_less(group):
    second_moment, metric = covariance(64, 1), covariance(64, 2)
    map_, _ = best_map(second_moment, metric, group, ridge=0.0)
    noise = torch.tensor(NOISE[64 // group : 0 : -1], dtype=torch.float64)  # most bits for the strongest group
    least = cost_of(map_, second_moment, metric, noise)
    generator = torch.Generator().manual_seed(0)
    for size in (0.01, 0.1, 0.5) * 20:
        moved = torch.eye(64, dtype=torch.float64)
        moved += size * torch.randn(64, 64, generator=generator, dtype=torch.float64) / 8
        assert cost_of(moved @ map_, second_moment, metric, noise) >= least * (1 - 1e-9)
    plain = torch.linalg.cholesky(torch.linalg.inv(second_moment)).T  # white components, of no strength
    assert cost_of(plain, second_moment, metric, noise) > 1.5 * least


@pytest.mark.parametrize("budget", [1.0, 2.0])
def test_random_vectors_cost_what_is_foretold(budget):
    """Of a normal variable, rounded in steps that fit all of them; a scale of each one's own makes it less."""
    second_moment, metric = covariance(128, 7), covariance(128, 8)
    map_, costs = best_map(second_moment, metric, GROUP, ridge=0.0)
    bits = allocate([Choice(cost, GROUP, NOISE) for cost in costs.tolist()], budget * 128)
    assert 0 in bits and max(bits) > 3
    steps = torch.tensor(STEPS, dtype=torch.float64)[bits]
    coded = transform([bits], weights=[(costs * steps**2).tolist()])
    x = normal(4000, 128).double() @ torch.linalg.cholesky(second_moment).T
    y = (x @ map_.T / steps.repeat_interleave(GROUP)).float()[None, :, None]  # (1, T, 1, D), as they are coded

    def measured(codes: torch.Tensor, scale: torch.Tensor) -> float:
        read = dequantize_components(codes, scale, coded)[0, :, 0].double() * steps.repeat_interleave(GROUP)
        error = read @ torch.linalg.inv(map_).T - x
        return ((error @ metric) * error).sum(1).mean().item()

    foretold = (costs * torch.tensor(NOISE, dtype=torch.float64)[bits]).sum().item()
    nearest = (y + coded.levels).floor().clamp_min(0).minimum((2 * coded.levels - 1).clamp_min(0))
    assert measured(nearest.byte(), torch.full(y.shape[:3], 128)) == pytest.approx(foretold, rel=0.07)
    assert 0.7 * foretold < measured(*quantize_components(y, coded)) < foretold


def test_the_ridge_keeps_a_map_of_degenerate_moments_in_bounds():
    """Directions that no text has shown, and that no query has asked for."""
    second_moment, metric = torch.zeros(2, 64, 64, dtype=torch.float64)
    second_moment[:3, :3] = covariance(3, 0)
    metric[1:5, 1:5] = covariance(4, 0)
    map_, costs = best_map(second_moment, metric, GROUP)
    assert map_.isfinite().all() and torch.linalg.cond(map_) < 1e4 and (costs > 0).all()
    map_, costs = best_map(0 * second_moment, 0 * metric, GROUP)
    assert map_.half().isfinite().all() and costs.isfinite().all()


# --- the split of a budget -----------------------------------------------------------------------------------------


def total(choices: list[Choice], bits) -> tuple[float, int]:
    """What an allocation costs and spends."""
    pairs = list(zip(choices, bits, strict=True))
    return sum(c.cost * c.noise[b - c.least] for c, b in pairs), sum(c.numbers * b for c, b in pairs)


@pytest.mark.parametrize("seed", range(6))
def test_no_split_of_a_budget_costs_less(seed):
    generator = np.random.default_rng(seed)
    choices = [Choice(float(np.exp(3 * generator.normal())), 16, NOISE) for _ in range(3)]
    choices.append(Choice(float(np.exp(3 * generator.normal())), 16, VALUE_NOISE, 1))
    savings = np.sort(generator.exponential(size=4))  # of the last bit first, each no less than the one after it
    choices.append(Choice(1.0, 16, (*np.cumsum(savings)[::-1].tolist(), 0.0), 1))
    every = [total(choices, bits) for bits in product(range(6), range(6), range(6), range(1, 6), range(1, 6))]
    for budget in (40, 96, 160, 161, 237, 400, 1000):
        cost, spent = total(choices, allocate(choices, budget))
        assert spent <= budget
        assert cost <= min(other for other, bits in every if bits <= budget) * (1 + 1e-9)
    assert allocate(choices, 0) == [0, 0, 0, 1, 1]  # the least are given whatever they cost
    assert allocate(choices, 10**6) == [5] * 5


@pytest.mark.parametrize("seed", range(6))
def test_choices_of_different_sizes_lose_no_more_than_the_last_one(seed):
    """A bit for one of them may not fit while bits for a smaller one do."""
    generator = np.random.default_rng(seed)
    sizes = (16, 16, 48, 64)
    choices = [Choice(float(np.exp(2 * generator.normal())), numbers, NOISE) for numbers in sizes]
    every = [total(choices, bits) for bits in product(range(6), repeat=4)]
    for budget in range(0, 600, 50):
        cost, spent = total(choices, allocate(choices, budget))
        assert budget - max(sizes) < spent <= budget or spent == 5 * sum(sizes)
        assert cost <= min(other for other, bits in every if bits <= max(budget - max(sizes), 0)) * (1 + 1e-9)


def test_free_choices_take_what_is_left_in_order():
    choice = partial(Choice, 0.0, 16, NOISE)
    assert allocate([choice(), Choice(1.0, 16, NOISE), choice()], 16 * 7) == [2, 5, 0]
