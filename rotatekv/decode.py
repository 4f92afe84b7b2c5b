"""When a call is decoded by a fused kernel straight from the packed cache, and what the kernel must know of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import nn

from rotatekv.kernels.backend import kernels_on
from rotatekv.kernels.rope_tables import RopeTables

MOST_NEW_TOKENS = 16  # of one call; longer ones are prefill
_FEWEST_POSITIONS = 4096  # of a rope table


@dataclass(frozen=True)
class FusedCall:
    """One forward that the fused kernel can attend for.

    Args:
        first: (B,) int32, the first token of each sequence that is not padding; its position is 0.
        length: tokens of a sequence, the new ones included.
        source: of the model's rope tables.
    """

    first: torch.Tensor
    length: int
    source: RopeSource
    _kernels: dict[torch.device, ModuleType | None] = field(default_factory=dict, repr=False)

    def kernels(self, device: torch.device) -> ModuleType | None:
        """``kernels_on``, asked once for a device."""
        if device not in self._kernels:
            self._kernels[device] = kernels_on(device)
        return self._kernels[device]

    def rope(self, device: torch.device) -> RopeTables:
        """Tables for every position of the call."""
        return self.source.tables(self.length, device)


class RopeSource:
    """The rope tables of one model, one for each device, made anew when a longer sequence comes.

    Args:
        text_model: has the ``rotary_emb``; its frequencies may change (``forget_stale``).
    """

    def __init__(self, text_model: nn.Module):
        self._text_model, self._tables, self._made_of = text_model, {}, None

    def tables(self, positions: int, device: torch.device) -> RopeTables:
        found = self._tables.get(device)
        if found is None or found.positions < positions:
            room = max(_FEWEST_POSITIONS, 2 * positions)
            frequencies, scaling = self._made_of = self._frequencies()
            found = self._tables[device] = RopeTables.build(frequencies, room, scaling).to(device)
        return found

    def forget_stale(self) -> None:
        """Before a call: drop the tables if the model's frequencies are others by now, by dtype or by value."""
        if not self._tables:
            return
        (frequencies, scaling), (old, old_scaling) = self._frequencies(), self._made_of
        if scaling != old_scaling or not torch.equal(frequencies, old):
            self._tables = {}

    def _frequencies(self) -> tuple[torch.Tensor, float]:
        rotary = self._text_model.rotary_emb
        frequencies = rotary.inv_freq.detach().to("cpu", torch.float64, copy=True)
        return frequencies, float(getattr(rotary, "attention_scaling", 1.0))


def plan_fused_call(
    positions: torch.Tensor, new_tokens: int, attention_mask: torch.Tensor | None, source: RopeSource
) -> FusedCall | None:
    """The fused form of a call, or None where only the general path is right: a prefill, or odd masks or positions.

    Args:
        positions: (B, T) int32 of all tokens, the new ones included.
        attention_mask: what the caller gave the model: None, (B, T), or anything else.
    """
    batch, length = positions.shape
    if new_tokens > MOST_NEW_TOKENS or new_tokens == length or kernels_on(positions.device) is None:
        return None
    device = positions.device
    first = torch.zeros(batch, dtype=torch.int32, device=device)
    if attention_mask is not None:
        if attention_mask.dim() != 2 or attention_mask.shape != positions.shape:
            return None
        seen = attention_mask.bool().to(device)
        first = (~seen).sum(1).to(torch.int32)
        if not torch.equal(seen, torch.arange(length, dtype=torch.int32, device=device) >= first[:, None]):
            return None  # holes, or padding on the right
    expected = torch.arange(length, dtype=torch.int32, device=device) - first[:, None]
    if (first > length - new_tokens).any() or not torch.equal(torch.where(expected < 0, expected, positions), expected):
        return None
    return FusedCall(first, length, source)
