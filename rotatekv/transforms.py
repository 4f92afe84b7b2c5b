"""Orthonormal Walsh-Hadamard transforms, the grouped-head key rotation and the channel reorder, with their inverses."""

from __future__ import annotations

import math
from functools import lru_cache

import torch

from rotatekv.errors import UserError

try:  # GPU extra: Dao-AILab/fast-hadamard-transform
    from fast_hadamard_transform import hadamard_transform as _cuda_hadamard_transform
except ImportError:
    _cuda_hadamard_transform = None

_PALEY_PRIMES = {12: 11, 20: 19}


def has_hadamard(order: int) -> bool:
    """Whether ``order`` is 2^n, 12·2^n or 20·2^n, the orders this package builds."""
    return order >= 1 and any(order % base == 0 and _is_power_of_two(order // base) for base in (1, 12, 20))


def hadamard_matrix(order: int) -> torch.Tensor:
    """The orthonormal Hadamard matrix: Sylvester's for 2^n, Paley I (order 12 or 20) ⊗ Sylvester otherwise.

    Returns:
        (order, order) float64, entries ±1/sqrt(order), ``H @ H.T = I``.

    Raises:
        UserError: no matrix of that order here.
    """
    if not has_hadamard(order):
        raise UserError(f"no Hadamard matrix of order {order}: it must be 2^n, 12·2^n or 20·2^n")
    base = next((b for b in _PALEY_PRIMES if order % b == 0 and _is_power_of_two(order // b)), 1)
    matrix = _paley(_PALEY_PRIMES[base]) if base > 1 else torch.ones(1, 1, dtype=torch.float64)
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    while matrix.shape[0] < order:
        matrix = torch.kron(matrix, two)
    return matrix / math.sqrt(order)


def hadamard(x: torch.Tensor, inverse: bool = False) -> torch.Tensor:
    """Multiply the last dimension by the orthonormal Hadamard matrix: ``y = x @ H.T`` (``x = y @ H`` if inverse).

    Runs as two small matmuls with the Kronecker factors of H = A ⊗ B, in the dtype of ``x``; on CUDA, orders 2^n
    go to ``fast_hadamard_transform`` where it is installed.

    Args:
        x: (..., order).
    """
    order = x.shape[-1]
    if x.is_cuda and _cuda_hadamard_transform is not None and _is_power_of_two(order):
        return _cuda_hadamard_transform(x.contiguous(), scale=1.0 / math.sqrt(order))  # symmetric: its own inverse
    left, right = _kronecker_factors(order, x.dtype, x.device)
    blocks = x.reshape(*x.shape[:-1], left.shape[0], right.shape[0])  # (..., a, b)
    if inverse:
        return (left.T @ blocks @ right).reshape(x.shape)
    return (left @ blocks @ right.T).reshape(x.shape)


def head_group_size(num_key_value_heads: int, head_dim: int, requested: int) -> int:
    """G: the largest divisor of H_kv up to ``requested`` whose width G·head_dim has a Hadamard matrix.

    Raises:
        UserError: not even a single head has one.
    """
    # PAPER: G = 4 with orders 2^n; models whose head count 4 does not divide take the next smaller G here.
    for size in range(min(requested, num_key_value_heads), 0, -1):
        if num_key_value_heads % size == 0 and has_hadamard(size * head_dim):
            return size
    raise UserError(
        f"no head group up to {requested} of {num_key_value_heads} heads × {head_dim} has a Hadamard order "
        "(2^n, 12·2^n or 20·2^n): this model needs --method RTN2, RTN3 or RTN4"
    )


def rotate_channels(x: torch.Tensor, width: int, inverse: bool = False) -> torch.Tensor:
    """Rotate each run of ``width`` consecutive channels: Pre-RoPE Grouped-Head Rotation for width G·D.

    Args:
        x: (..., C) with ``width`` dividing C.
    """
    groups = x.reshape(*x.shape[:-1], x.shape[-1] // width, width)  # (..., C / W, W)
    return hadamard(groups, inverse).reshape(x.shape)  # (..., C)


def heads_to_channels(x: torch.Tensor) -> torch.Tensor:
    """(B, H_kv, T, D) → (B, T, H_kv·D)."""
    return x.transpose(1, 2).flatten(2)


def channels_to_heads(x: torch.Tensor, head_dim: int) -> torch.Tensor:
    """(B, T, H_kv·D) → (B, H_kv, T, D)."""
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def _is_power_of_two(n: int) -> bool:
    return n >= 1 and n & (n - 1) == 0


def _paley(prime: int) -> torch.Tensor:
    """Paley's first construction for a prime ≡ 3 mod 4: order prime + 1, entries ±1."""
    squares = {i * i % prime for i in range(1, prime)}
    symbol = [0] + [1 if i in squares else -1 for i in range(1, prime)]
    matrix = torch.ones(prime + 1, prime + 1, dtype=torch.float64)
    for row in range(prime):
        matrix[row + 1, 0] = -1
        for column in range(prime):
            matrix[row + 1, column + 1] = 1 if row == column else symbol[(column - row) % prime]
    return matrix


@lru_cache(maxsize=64)
def _kronecker_factors(order: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """A (a, a) and B (b, b) with A ⊗ B the matrix of ``hadamard_matrix`` and b the power of two nearest sqrt(order)."""
    if not has_hadamard(order):
        raise UserError(f"no Hadamard matrix of order {order}: it must be 2^n, 12·2^n or 20·2^n")
    splits = [2**n for n in range(order.bit_length()) if order % 2**n == 0 and has_hadamard(order // 2**n)]
    right = min(splits, key=lambda b: abs(math.log(b / math.sqrt(order))))
    return tuple(hadamard_matrix(size).to(device, dtype) for size in (order // right, right))
