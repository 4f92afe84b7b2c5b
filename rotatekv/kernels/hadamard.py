"""Orthonormal Walsh-Hadamard transforms, the grouped-head key rotation and the channel reorder, with their inverses."""

from __future__ import annotations

import itertools
import math
from functools import cache, lru_cache

import torch

from rotatekv.errors import UserError

try:  # GPU extra: Dao-AILab/fast-hadamard-transform
    from fast_hadamard_transform import hadamard_transform as _cuda_hadamard_transform
except ImportError:
    _cuda_hadamard_transform = None

_LARGEST_BASE = 1024  # of Paley's orders that are multiplied by densely


def has_hadamard(order: int) -> bool:
    """Whether this package builds a matrix of ``order``: 2^n, or 2^n times an order of Paley's (12, 20, 28, 36, …)."""
    return hadamard_base(order) > 0


@lru_cache(maxsize=256)
def hadamard_base(order: int) -> int:
    """The smallest P with order = P·2^n and P = 1 or an order of Paley's up to 1024; 0: there is none."""
    base = order // (order & -order) if order >= 1 else 0  # the odd part
    while 1 < base <= min(order, _LARGEST_BASE) and not _paley_field(base):
        base *= 2
    return base if base <= min(order, _LARGEST_BASE) else 0


def hadamard_matrix(order: int) -> torch.Tensor:
    """The orthonormal Hadamard matrix: Sylvester's for 2^n, Paley's of order ``hadamard_base`` ⊗ Sylvester's otherwise.

    Returns:
        (order, order) float64 on the CPU, entries ±1/sqrt(order), ``H @ H.T = I``.

    Raises:
        UserError: no matrix of that order here.
    """
    base = hadamard_base(order)
    if not base:
        raise UserError(f"no Hadamard matrix of order {order} here: take 1, 12, 20, 28, 36, 44, 52, 60 … times 2^n")
    matrix = base_matrix(base).double()
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64, device="cpu")
    while matrix.shape[0] < order:
        matrix = torch.kron(matrix, two)
    return matrix / math.sqrt(order)


@cache
def base_matrix(base: int) -> torch.Tensor:
    """Paley's Hadamard matrix of an order that ``hadamard_base`` gives, (base, base) float32, entries ±1.

    Kept as long as the process lives, since the CPU kernels take its address.
    """
    if base == 1:
        return torch.ones(1, 1, dtype=torch.float32, device="cpu")
    found = _paley_field(base)
    assert found is not None, base
    prime, power = found
    field = prime**power
    conference = torch.ones(field + 1, field + 1, dtype=torch.float32, device="cpu")
    conference[0, 0] = 0
    conference[1:, 1:] = _quadratic_characters(prime, power)
    identity = torch.eye(field + 1, dtype=torch.float32, device="cpu")
    if base == field + 1:  # his first construction
        conference[1:, 0] = -1
        return conference + identity
    square = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float32, device="cpu")
    turned = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float32, device="cpu")
    return torch.kron(conference, square) + torch.kron(identity, turned)


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
        UserError: a single head, which is how values are rotated, has none.
    """
    # PAPER: G = 4 with orders 2^n; models whose head count 4 does not divide take the next smaller G here.
    if not has_hadamard(head_dim):
        raise UserError(no_hadamard(head_dim))
    sizes = range(min(requested, num_key_value_heads), 0, -1)
    return next(size for size in sizes if num_key_value_heads % size == 0 and has_hadamard(size * head_dim))


def no_hadamard(head_dim: int) -> str:
    """What to do about a model whose heads cannot be rotated."""
    return (
        f"there is no Hadamard matrix of order {head_dim} here, this model's head_dim: take a method that does not "
        "rotate, --method RTN2, RTN3 or RTN4"
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


def _paley_field(order: int) -> tuple[int, int] | None:
    """(p, k) of the field GF(p^k) that makes a matrix of ``order``, by Paley's first or second construction."""
    first, second = order - 1, order // 2 - 1
    if first % 4 == 3 and (field := _prime_power(first)):
        return field
    return _prime_power(second) if order % 4 == 0 and second % 4 == 1 else None


def _prime_power(n: int) -> tuple[int, int] | None:
    """(p, k) with p^k = n; None: n is no power of a prime."""
    if n < 2:
        return None
    prime = next((d for d in range(2, math.isqrt(n) + 1) if n % d == 0), n)
    power = round(math.log(n, prime))
    return (prime, power) if prime**power == n else None


def _quadratic_characters(prime: int, power: int) -> torch.Tensor:
    """χ(column − row) over GF(p^k), (p^k, p^k) float32: 0, 1 for squares, −1 for the others.

    Element e has the digits of e to the base p as its polynomial's coefficients.
    """
    count = prime**power
    weights = prime ** torch.arange(power, dtype=torch.int64, device="cpu")
    digits = torch.arange(count, dtype=torch.int64, device="cpu")[:, None] // weights % prime  # (p^k, k)
    differences = ((digits[None] - digits[:, None]) % prime * weights).sum(-1)
    # x is primitive modulo the first f = x^k − remainder of which its powers are all elements but 0.
    candidates = (_powers_of_x(prime, remainder) for remainder in itertools.product(range(prime), repeat=power))
    powers = next(found for found in candidates if len(found) == count - 1)
    character = torch.zeros(count, dtype=torch.float32, device="cpu")
    character[powers[::2]], character[powers[1::2]] = 1, -1  # squares are the even powers
    return character[differences]


def _powers_of_x(prime: int, remainder: tuple[int, ...]) -> list[int]:
    """x⁰, x¹, … modulo x^k − remainder over GF(p), as numbers, until 0 or an earlier one comes again."""
    element, seen = (1,) + (0,) * (len(remainder) - 1), {}
    while any(element) and element not in seen:
        seen[element] = sum(digit * prime**place for place, digit in enumerate(element))
        lower, top = (0, *element[:-1]), element[-1]
        element = tuple((a + top * b) % prime for a, b in zip(lower, remainder, strict=True))
    return list(seen.values())


@lru_cache(maxsize=64)
def _kronecker_factors(order: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """A (a, a) and B (b, b) with A ⊗ B the matrix of ``hadamard_matrix`` and b the power of two nearest sqrt(order)."""
    # Where there is no matrix at all, the last line says so.
    splits = [2**n for n in range(order.bit_length()) if order % 2**n == 0 and has_hadamard(order // 2**n)] or [1]
    right = min(splits, key=lambda b: abs(math.log(b / math.sqrt(order))))
    return tuple(hadamard_matrix(size).to(device, dtype) for size in (order // right, right))
