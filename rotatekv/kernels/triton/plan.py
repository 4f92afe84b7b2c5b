"""How a Hadamard matrix of order W is cut into two small factors that ``tl.dot`` can take. Plain torch.

Channel i·b + j of a rotation group lies at (i, j) of an (a, b) matrix, and H = A ⊗ B rotates it as A·X·Bᵀ, and
back as Aᵀ·X·B. Both factors are kept as ±1, which every tensor-core format holds exactly, and W^-0.5 is applied once,
elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from rotatekv.kernels.hadamard import hadamard_matrix, has_hadamard

SMALLEST_DOT = 16  # tl.dot's smallest side, up to triton 3.4


@dataclass(frozen=True)
class Factors:
    """W = G·D = a·b, with every side padded to a power of two.

    Attributes:
        heads, head_dim: G and D; b divides D, so a head is D / b whole rows.
        rows, columns: a and b.
        rotated: False: the kernels skip A and B.
    """

    heads: int
    head_dim: int
    rows: int
    columns: int
    rotated: bool

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    @property
    def rows_pad(self) -> int:
        return _padded(self.rows, self.rotated and self.rows > 1)  # one row: the kernels skip A

    @property
    def columns_pad(self) -> int:
        return _padded(self.columns, self.rotated)

    @property
    def heads_pad(self) -> int:
        return power_of_two(self.heads)

    @property
    def head_rows(self) -> int:
        """Rows of the (a, b) matrix that make one head."""
        return self.head_dim // self.columns

    @property
    def head_rows_pad(self) -> int:
        least = SMALLEST_DOT // self.heads_pad if self.rotated and self.rows > 1 else 1
        return max(power_of_two(self.head_rows), least)

    @property
    def elements(self) -> int:
        """Numbers of one padded token, the larger of before and after un-rotation."""
        return self.columns_pad * max(self.rows_pad, self.heads_pad * self.head_rows_pad)

    @property
    def norm(self) -> float:
        """What a product with both ±1 factors is multiplied by."""
        return self.width**-0.5 if self.rotated else 1.0

    @property
    def warps(self) -> int:
        """Of a program: a tile of 16 tokens takes 16 registers a thread, 32 from W = 512 on (16 warps spill)."""
        return min(max(self.elements // 32, 4), 8)

    def constants(self) -> dict[str, int]:
        """The kernels' constexpr arguments."""
        return {
            "G": self.heads,
            "D": self.head_dim,
            "A": self.rows,
            "B": self.columns,
            "A_PAD": self.rows_pad,
            "B_PAD": self.columns_pad,
            "G_PAD": self.heads_pad,
            "ROWS": self.head_rows,
            "ROWS_PAD": self.head_rows_pad,
            "ROTATED": self.rotated,
        }


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def terms_of(queries: torch.Tensor) -> int:
    """Halves of float16 that a number is cut into: one is as good as a model in 16 bits."""
    return 2 if queries.dtype == torch.float32 else 1


@lru_cache(maxsize=64)
def factor(width: int, head_dim: int) -> Factors:
    """The split with the fewest padded numbers whose b divides D.

    Args:
        width: W; 0 where channels are not rotated.

    Raises:
        ValueError: no Hadamard matrix of order W, or W is not made of whole heads.
    """
    rotated = width > 0
    width = width or head_dim
    if width % head_dim or (rotated and not has_hadamard(width)):
        raise ValueError(f"rotation_width {width}: whole heads of {head_dim} with a Hadamard matrix are needed")
    options = []
    for power in range(width.bit_length()):
        columns = 2**power
        if head_dim % columns == 0 and (not rotated or has_hadamard(width // columns)):
            options.append(Factors(width // head_dim, head_dim, width // columns, columns, rotated))
    return min(options, key=lambda f: (f.elements, abs(f.columns - 16)))


@lru_cache(maxsize=64)
def matrices(factors: Factors, device: torch.device, inverse: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """The left factor with each head's rows padded, (G_PAD·ROWS_PAD, A_PAD), and the right one, (B_PAD, B_PAD).

    Entries are ±1, and 0 as padding. Aᵀ and Bᵀ for the inverse, A and B else; identities where nothing is rotated.
    """
    left, right = (_signs(size, factors.rotated) for size in (factors.rows, factors.columns))
    if inverse:
        left, right = left.T, right.T
    padded = torch.zeros(factors.heads_pad, factors.head_rows_pad, factors.rows_pad, dtype=torch.float32, device="cpu")
    padded[: factors.heads, : factors.head_rows, : factors.rows] = left.unflatten(0, (factors.heads, -1))
    square = torch.zeros(factors.columns_pad, factors.columns_pad, dtype=torch.float32, device="cpu")
    square[: factors.columns, : factors.columns] = right
    return padded.flatten(0, 1).contiguous().to(device), square.to(device)


def _signs(order: int, rotated: bool) -> torch.Tensor:
    return hadamard_matrix(order).sign().float() if rotated else torch.eye(order, dtype=torch.float32, device="cpu")


def _padded(n: int, dots: bool) -> int:
    return max(power_of_two(n), SMALLEST_DOT) if dots else power_of_two(n)
