"""Tables of cos and sin from which a kernel builds RoPE at any position by angle addition, without drift."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from rotatekv.kernels.transform_coding import FRAME

COARSE_STEP = 16  # positions between two rows of the coarse table
FINE_POSITIONS = 32  # a block of 16 tokens may start 0 … 15 positions after a coarse row


@dataclass(frozen=True, eq=False)
class RopeTables:
    """cos and sin of position·frequency, float32, computed in float64; one for all layers and caches of a model.

    Compared and hashed by identity, so that what a kernel derives from a table can be kept by it.

    Attributes:
        coarse_cos, coarse_sin: (n, rotary_dim / 2), row q is position 16·q.
        fine_cos, fine_sin: (rotary_dim / 2, 32), column p is position p.
        attention_scaling: factor on cos and sin (YaRN and the like).
    """

    coarse_cos: torch.Tensor
    coarse_sin: torch.Tensor
    fine_cos: torch.Tensor
    fine_sin: torch.Tensor
    attention_scaling: float = 1.0

    @classmethod
    def build(cls, frequencies: torch.Tensor, positions: int, attention_scaling: float = 1.0) -> RopeTables:
        """Tables for positions 0 … ``positions`` − 1 and −FRAME … FRAME; ``frequencies`` (rotary_dim / 2,) in radians
        per position."""
        frequencies = frequencies.double().cpu()
        counted = {"dtype": torch.float64, "device": "cpu"}
        coarse = torch.arange(-(-max(positions, FRAME + 1) // COARSE_STEP), **counted) * COARSE_STEP
        coarse_angles = coarse[:, None] * frequencies  # (n, rotary_dim / 2)
        fine_angles = frequencies[:, None] * torch.arange(FINE_POSITIONS, **counted)  # (rotary_dim / 2, 32)
        tables = [f(a).float() for a in (coarse_angles, fine_angles) for f in (torch.cos, torch.sin)]
        coarse_cos, coarse_sin, fine_cos, fine_sin = (table.contiguous() for table in tables)
        return cls(coarse_cos, coarse_sin, fine_cos, fine_sin, attention_scaling)

    def to(self, device: torch.device) -> RopeTables:
        names = ("coarse_cos", "coarse_sin", "fine_cos", "fine_sin")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    @property
    def rotary_dim(self) -> int:
        """Channels of a head that RoPE turns: the first ``rotary_dim``."""
        return 2 * self.fine_cos.shape[0]

    @property
    def positions(self) -> int:
        return self.coarse_cos.shape[0] * COARSE_STEP

    def at(self, positions: torch.Tensor, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin, (..., rotary_dim / 2) of ``dtype``, times attention_scaling; ``positions`` (...) int64, of
        either sign."""
        row, column = positions.abs() // COARSE_STEP, positions.abs() % COARSE_STEP
        coarse_cos, coarse_sin = self.coarse_cos.to(dtype)[row], self.coarse_sin.to(dtype)[row]
        fine_cos, fine_sin = self.fine_cos.T.to(dtype)[column], self.fine_sin.T.to(dtype)[column]
        cos = coarse_cos * fine_cos - coarse_sin * fine_sin
        sin = coarse_sin * fine_cos + coarse_cos * fine_sin
        return cos * self.attention_scaling, sin * positions.sign().unsqueeze(-1) * self.attention_scaling

    def turn(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """RoPE of (B, heads, T, D) ``x`` at ``positions`` (B, T) int64, on the first ``rotary_dim`` channels."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        tables = self.at(positions, torch.float64)
        cos, sin = (table.to(dtype).unsqueeze(1) for table in tables)  # (B, 1, T, rotary_dim / 2)
        return turn_halves(x, cos, sin).to(x.dtype)


def turn_halves(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """(..., D) turned by cos and sin (..., rotary_dim / 2): channel i and i + rotary_dim / 2 are a pair."""
    low, high, rest = x.tensor_split((cos.shape[-1], 2 * cos.shape[-1]), dim=-1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin, rest], dim=-1)
