"""A factor and an offset for every channel: what some codecs' keys lack after the inverse Hadamard."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Affine:
    """``x·factor + offset``.

    Attributes:
        factor, offset: (C,) float32.
    """

    factor: torch.Tensor
    offset: torch.Tensor

    def __call__(self, channels: torch.Tensor) -> torch.Tensor:
        """(..., C) → (..., C)."""
        return channels * self.factor + self.offset
