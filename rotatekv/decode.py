"""When a call is decoded by a fused kernel straight from the packed cache, and what the kernel must know of it."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import nn

from rotatekv.errors import UserError
from rotatekv.kernels import cpu
from rotatekv.kernels.rope_tables import RopeTables

MOST_NEW_TOKENS = 16  # of one call; longer ones are prefill
BACKENDS = ("reference", "cpu")
_FEWEST_POSITIONS = 4096  # of a rope table


@dataclass(frozen=True)
class FusedCall:
    """One forward that the fused kernel can attend for.

    Args:
        first: (B,) int32, the first token of each sequence that is not padding; its position is 0.
        rope: tables for every position of the call.
    """

    first: torch.Tensor
    rope: RopeTables


class RopeSource:
    """The rope tables of one model, made anew when a longer sequence comes."""

    def __init__(self, rotary: nn.Module):
        self._rotary, self._tables = rotary, None

    def tables(self, positions: int) -> RopeTables:
        if self._tables is None or self._tables.positions < positions:
            room = max(_FEWEST_POSITIONS, 2 * positions)
            scaling = float(getattr(self._rotary, "attention_scaling", 1.0))
            self._tables = RopeTables.build(self._rotary.inv_freq, room, scaling)
        return self._tables


def backend() -> str:
    """``ROTATEKV_BACKEND``, or ``cpu``, which is used where it can be built.

    Raises:
        UserError: a backend of another name.
    """
    name = os.environ.get("ROTATEKV_BACKEND") or "cpu"
    if name not in BACKENDS:
        raise UserError(f"ROTATEKV_BACKEND={name} is not a backend: choose {' or '.join(BACKENDS)}")
    return name


def fuses_on(device: torch.device) -> bool:
    """Whether fused kernels run for tensors of this device."""
    return backend() == "cpu" and device.type == "cpu" and not torch.compiler.is_compiling() and cpu.available()


def plan_fused_call(
    positions: torch.Tensor, new_tokens: int, attention_mask: torch.Tensor | None, source: RopeSource
) -> FusedCall | None:
    """The fused form of a call, or None where only the general path is right: a prefill, or odd masks or positions.

    Args:
        positions: (B, T) int32 of all tokens, the new ones included.
        attention_mask: what the caller gave the model: None, (B, T), or anything else.
    """
    batch, length = positions.shape
    if new_tokens > MOST_NEW_TOKENS or new_tokens == length or not fuses_on(positions.device):
        return None
    first = torch.zeros(batch, dtype=torch.int32)
    if attention_mask is not None:
        if attention_mask.dim() != 2 or attention_mask.shape != positions.shape:
            return None
        seen = attention_mask.bool()
        first = (~seen).sum(1).to(torch.int32)
        if not torch.equal(seen, torch.arange(length) >= first[:, None]):
            return None  # holes, or padding on the right
    expected = torch.arange(length, dtype=torch.int32) - first[:, None]
    if (first > length - new_tokens).any() or not torch.equal(torch.where(expected < 0, expected, positions), expected):
        return None
    return FusedCall(first, source.tables(length))
