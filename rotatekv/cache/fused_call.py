"""When a call is decoded by a fused kernel straight from the packed cache, and what the kernel must know of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import ModuleType

import torch

from rotatekv.cache.sinks import Sinks
from rotatekv.cache.window import Window
from rotatekv.kernels.backend import kernels_on
from rotatekv.kernels.decode_attention import ExactTokens

MOST_NEW_TOKENS = 16  # of one call; longer ones are prefill


@dataclass(frozen=True)
class FusedCall:
    """One forward that the fused kernel can attend for: positions count from each sequence's first token.

    Args:
        leftpad: (B,) int32, the first token of each sequence that is not padding; its position is 0.
        length: tokens of a sequence, the new ones included.
        is_padded: some leftpad is not 0.
    """

    leftpad: torch.Tensor
    length: int
    is_padded: bool = False
    _kernels: dict[torch.device, ModuleType | None] = field(default_factory=dict, repr=False)
    _rows: dict = field(default_factory=dict, repr=False)

    def kernels(self, device: torch.device) -> ModuleType | None:
        """``kernels_on``, asked once for a device."""
        if device not in self._kernels:
            self._kernels[device] = kernels_on(device)
        return self._kernels[device]

    def rows(self, dropped: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """The kernels' ``first_seen`` and ``origin``, (B,) int32 each, in a layer that has dropped that many tokens."""
        found = self._rows.get((dropped, device))
        if found is None:
            leftpad = self.leftpad.to(device)
            found = self._rows[dropped, device] = (leftpad - dropped).clamp(min=0), dropped - leftpad
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
    leftpad = torch.zeros(batch, dtype=torch.int32, device=device)
    if attention_mask is not None:
        if attention_mask.dim() != 2 or attention_mask.shape != positions.shape:
            return None
        seen = attention_mask.bool().to(device)
        leftpad = (~seen).sum(1).to(torch.int32)
        if not torch.equal(seen, torch.arange(length, dtype=torch.int32, device=device) >= leftpad[:, None]):
            return None  # holes, or padding on the right
    expected = torch.arange(length, dtype=torch.int32, device=device) - leftpad[:, None]
    if (leftpad > length - new_tokens).any() or not torch.equal(
        torch.where(expected < 0, expected, positions), expected
    ):
        return None
    return FusedCall(leftpad, length, is_padded=attention_mask is not None and bool(leftpad.any()))


def exact_tokens(sinks: Sinks | None, window: Window | None, packed: int) -> ExactTokens | None:
    """Sinks and recent window for the kernel, sorted by sequence; ``packed`` tokens come before the window."""
    if window is None or not window.tokens:
        return None if sinks is None else ExactTokens(*(x.contiguous() for x in sinks.tensors()))
    keys, values = window.keys, window.values  # (B, H_kv, T_window, D)
    batch, _, tokens, _ = keys.shape
    counted = {"dtype": torch.int32, "device": keys.device}
    batch_index = torch.zeros(tokens, **counted)
    token_index = torch.arange(packed, packed + tokens, **counted)
    if batch > 1:
        batch_index = torch.arange(batch, **counted).repeat_interleave(tokens)
        token_index = token_index.repeat(batch)
    keys, values = (x.transpose(1, 2).flatten(0, 1) for x in (keys, values))  # (B·T_window, H_kv, D)
    if sinks is None:
        return ExactTokens(batch_index, token_index, keys.contiguous(), values.contiguous())
    if sinks.last_token >= packed:  # a sink in the window is exact already
        sinks = sinks.crop(packed)
    pairs = zip(sinks.tensors(), (batch_index, token_index, keys, values), strict=True)
    both = [torch.cat(pair) for pair in pairs]
    if batch > 1:
        order = torch.argsort(both[0], stable=True)
        both = [x[order] for x in both]
    return ExactTokens(*both)
