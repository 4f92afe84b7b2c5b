"""Hadamard matrices, the fast path, head groups and the grouped rotation against independent constructions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rotatekv.errors import UserError
from rotatekv.kernels.hadamard import (
    channels_to_heads,
    hadamard,
    hadamard_matrix,
    has_hadamard,
    head_group_size,
    heads_to_channels,
    rotate_channels,
)

ORDERS = [1, 2, 4, 8, 16, 64, 128, 12, 24, 48, 192, 20, 40, 80, 160]
REFUSED = [-4, 0, 3, 5, 6, 7, 10, 14, 18, 30, 92, 116, 184, 232, 8152]


def sylvester_by_bit_parity(order: int) -> np.ndarray:
    """Entry (i, j) is −1 to the number of bits that i and j share."""
    return np.array([[(-1) ** bin(i & j).count("1") for j in range(order)] for i in range(order)], dtype=float)


def paley_by_euler_criterion(prime: int) -> np.ndarray:
    matrix = np.ones((prime + 1, prime + 1))
    for i in range(prime):
        matrix[i + 1, 0] = -1
        for j in range(prime):
            power = pow((j - i) % prime, (prime - 1) // 2, prime)
            matrix[i + 1, j + 1] = 1 if i == j or power == 1 else -1
    return matrix


def independent_matrix(order: int) -> np.ndarray:
    odd = order // (order & -order)
    if odd == 1:
        matrix = sylvester_by_bit_parity(order)
    else:
        base = {3: 12, 5: 20}[odd]
        matrix = np.kron(paley_by_euler_criterion(base - 1), sylvester_by_bit_parity(order // base))
    return matrix / math.sqrt(order)


@pytest.mark.parametrize("order", ORDERS)
def test_matrix_is_orthonormal_with_equal_magnitudes(order):
    matrix = hadamard_matrix(order)
    assert matrix.shape == (order, order) and matrix.dtype == torch.float64
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(order, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, order**-0.5), rtol=0, atol=1e-15)


@pytest.mark.parametrize("order", ORDERS)
def test_matrix_equals_the_independent_construction(order):
    # Stored reorder indices belong to exactly this matrix, so its rows and signs must never change.
    np.testing.assert_allclose(hadamard_matrix(order).numpy(), independent_matrix(order), rtol=0, atol=1e-15)


@pytest.mark.parametrize("order", [*ORDERS, 512, 320])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fast_path_equals_the_dense_matmul(order, dtype):
    x = torch.randn(2, 3, order, dtype=dtype, generator=torch.Generator().manual_seed(order))
    dense = torch.from_numpy(independent_matrix(order))
    atol = 1e-12 if dtype == torch.float64 else 1e-5
    fast = hadamard(x)
    assert fast.shape == x.shape and fast.dtype == dtype
    torch.testing.assert_close(fast.double(), x.double() @ dense.T, rtol=0, atol=atol)
    torch.testing.assert_close(hadamard(x, inverse=True).double(), x.double() @ dense, rtol=0, atol=atol)


@pytest.mark.parametrize("order", ORDERS)
def test_inverse_undoes_the_transform_and_the_norm_stays(order):
    x = torch.randn(5, order, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = hadamard(x)
    torch.testing.assert_close(hadamard(y, inverse=True), x, rtol=0, atol=1e-12)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-12, atol=0)


def test_transform_takes_non_contiguous_input():
    x = torch.randn(24, 3, dtype=torch.float64).T
    torch.testing.assert_close(hadamard(x), hadamard(x.contiguous()), rtol=0, atol=1e-12)


@pytest.mark.parametrize("order", REFUSED)
def test_other_orders_are_refused_in_one_line(order):
    assert not has_hadamard(order)
    with pytest.raises(UserError, match="Hadamard") as caught:
        hadamard_matrix(order)
    assert "\n" not in str(caught.value)


def is_paley_order(order: int) -> bool:
    """By his theorem: q + 1 for a prime power q ≡ 3 mod 4, or 2·(q + 1) for one ≡ 1 mod 4."""
    primes = [p for p in range(2, order) if all(p % d for d in range(2, p))]
    powers = {p**k for p in primes for k in range(1, 9)}
    return any(q % 4 == r and order == n * (q + 1) for q in powers for r, n in ((3, 1), (1, 2)))


def test_supported_orders_are_paleys_times_powers_of_two():
    families = {base * 2**n for base in [1, *filter(is_paley_order, range(4, 301, 4))] for n in range(9)}
    assert [n for n in range(301) if has_hadamard(n)] == sorted(n for n in families if n <= 300)


@pytest.mark.parametrize("order", [3, 92, 184])
def test_transform_of_an_unsupported_width_is_refused(order):
    with pytest.raises(UserError, match=f"order {order}"):
        hadamard(torch.zeros(2, order))


@pytest.mark.parametrize(
    "heads, head_dim, requested, expected",
    [
        (8, 128, 4, 4),  # the paper's choice
        (3, 64, 4, 3),  # SmolLM2: 192 = 12 · 16
        (8, 128, 3, 2),
        (8, 128, 100, 8),
        (8, 128, 1, 1),
        (10, 64, 4, 2),
        (5, 64, 5, 5),  # 320 = 20 · 16
        (5, 64, 4, 1),
        (7, 64, 7, 7),  # 448 = 28 · 16
        (9, 64, 9, 9),  # 576 = 36 · 16
        (3, 80, 4, 3),  # 240 = 60 · 4
        (3, 52, 4, 1),  # 156 has none
        (6, 16, 4, 3),
    ],
)
def test_head_group_is_the_largest_legal_divisor(heads, head_dim, requested, expected):
    assert head_group_size(heads, head_dim, requested) == expected


def test_head_group_agrees_with_brute_force():
    orders = {base * 2**n for base in [1, *filter(is_paley_order, range(4, 301, 4))] for n in range(12)}
    for heads in range(1, 17):
        for head_dim in (8, 16, 24, 28):
            for requested in range(1, 9):
                legal = [g for g in range(1, requested + 1) if heads % g == 0 and g * head_dim in orders]
                assert head_group_size(heads, head_dim, requested) == max(legal)


def test_head_group_without_any_order_names_a_method_that_works():
    with pytest.raises(UserError, match="RTN2"):
        head_group_size(2, 184, 4)  # two heads together have a matrix, but values are rotated head by head


@pytest.mark.parametrize("groups, width", [(1, 48), (2, 48), (3, 16), (4, 8), (2, 20)])
def test_grouped_rotation_is_block_diagonal(groups, width):
    channels = groups * width
    block_diagonal = np.zeros((channels, channels))
    for g in range(groups):
        block_diagonal[g * width : (g + 1) * width, g * width : (g + 1) * width] = independent_matrix(width)
    rotated_basis = rotate_channels(torch.eye(channels, dtype=torch.float64), width)
    np.testing.assert_allclose(rotated_basis.numpy(), block_diagonal.T, rtol=0, atol=1e-12)
    x = torch.randn(2, 5, channels, dtype=torch.float64)
    np.testing.assert_allclose(rotate_channels(x, width).numpy(), x.numpy() @ block_diagonal.T, rtol=0, atol=1e-12)
    torch.testing.assert_close(rotate_channels(rotate_channels(x, width), width, inverse=True), x, rtol=0, atol=1e-12)


def test_heads_and_channels_convert_head_after_head_and_back():
    heads = torch.arange(2 * 3 * 5 * 4).reshape(2, 3, 5, 4)  # (B, H_kv, T, D)
    channels = heads_to_channels(heads)
    assert channels.shape == (2, 5, 12)
    for b, h, t, d in [(0, 0, 0, 0), (1, 2, 4, 3), (0, 1, 3, 2), (1, 0, 2, 1)]:
        assert channels[b, t, h * 4 + d] == heads[b, h, t, d]
    assert torch.equal(channels_to_heads(channels, 4), heads)
