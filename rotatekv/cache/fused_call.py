"""When a call is decoded by a fused kernel straight from the packed cache, and what the kernel must know of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import ModuleType

import torch

from rotatekv.kernels.backend import kernels_on

MOST_NEW_TOKENS = 16  # of one call; longer ones are prefill


@dataclass(frozen=True)
class FusedCall:
    """One forward that the fused kernel can attend for: positions count from each row's first token.

    Args:
        first: (B,) int32, the first token of each sequence that is not padding; its position is 0.
        length: tokens of a sequence, the new ones included.
    """

    first: torch.Tensor
    length: int
    _kernels: dict[torch.device, ModuleType | None] = field(default_factory=dict, repr=False)
    _rows: dict = field(default_factory=dict, repr=False)

    def kernels(self, device: torch.device) -> ModuleType | None:
        """``kernels_on``, asked once for a device."""
        if device not in self._kernels:
            self._kernels[device] = kernels_on(device)
        return self._kernels[device]

    def rows(self, dropped: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """``first`` and ``origin`` of the kernels, (B,) int32 each, in a layer that has dropped that many tokens."""
        found = self._rows.get((dropped, device))
        if found is None:
            first = self.first.to(device)
            found = self._rows[dropped, device] = (first - dropped).clamp(min=0), dropped - first
        return found


def plan_fused_call(positions: torch.Tensor, new_tokens: int, attention_mask: torch.Tensor | None) -> FusedCall | None:
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
    return FusedCall(first, length)
