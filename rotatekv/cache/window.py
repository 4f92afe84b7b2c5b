"""The recent window where several tokens come in one call: each query sees its own, as if tokens came one by one.

A query at position i sees the last ``residual_length`` tokens in 16 bits, and those before them as they decode. A call
of many tokens quantizes tokens that are still in the window of its first queries: these are kept in both forms until
the call's attention is done. So a prefill, a prefill in chunks and a decode give the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Window:
    """Consecutive tokens of a layer in 16 bits, as attention sees them: the recent window, or those that leave it.

    Args:
        keys, values: (B, H_kv, T_window, D), keys after RoPE.
        is_massive: (B, T_window) bool, the tokens that become sinks when they are packed; None: the method has no
            massive tokens.
    """

    keys: torch.Tensor
    values: torch.Tensor
    is_massive: torch.Tensor | None = None

    @property
    def tokens(self) -> int:
        return self.keys.shape[2]

    def append(self, new: Window) -> Window:
        keys, values = torch.cat([self.keys, new.keys], dim=2), torch.cat([self.values, new.values], dim=2)
        if self.is_massive is None and new.is_massive is None:
            return Window(keys, values)
        return Window(keys, values, torch.cat([self.is_massive, new.is_massive], dim=1))

    def split(self, count: int) -> tuple[Window, Window]:
        """The first ``count`` tokens, and the others."""
        first = self._cut(slice(0, count))
        return first, self._cut(slice(count, None)).clone() if count else self

    def crop(self, length: int) -> Window:
        """The first ``length`` tokens."""
        return self._cut(slice(0, length)).clone()

    def after(self, count: int) -> Window:
        """Without the first ``count`` tokens."""
        return self._cut(slice(count, None)).clone()

    def _cut(self, part: slice) -> Window:
        is_massive = None if self.is_massive is None else self.is_massive[:, part]
        return Window(self.keys[:, :, part], self.values[:, :, part], is_massive)

    def clone(self) -> Window:
        """A view would keep the bytes of other tokens alive."""
        return self._each(torch.clone)

    def select_rows(self, rows: torch.Tensor) -> Window:
        return self._each(lambda x: x.index_select(0, rows))

    def to(self, device: torch.device | str) -> Window:
        return self._each(lambda x: x.to(device, non_blocking=True))

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Window:
        is_massive = None if self.is_massive is None else change(self.is_massive)
        return Window(change(self.keys), change(self.values), is_massive)

    def tensors(self, kind: str) -> Iterator[torch.Tensor]:
        """Those held for ``"keys"`` or ``"values"``; the flags count with the keys."""
        yield self.keys if kind == "keys" else self.values
        if kind == "keys" and self.is_massive is not None:
            yield self.is_massive


def to_storage(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """In a 16-bit ``dtype``, which holds no larger numbers than its own."""
    limit = torch.finfo(dtype).max
    return x.clamp(-limit, limit).to(dtype)


@dataclass(frozen=True)
class FlushPolicy:
    """How many tokens of a sequence are packed.

    Args:
        residual_length: tokens that stay in 16 bits, at least.
        tokens_per_flush: the others are packed in multiples of it.
        packed: tokens that are packed already. They stay so, also where a crop has left a shorter window.
    """

    residual_length: int
    tokens_per_flush: int
    packed: int = 0

    @property
    def keeps_tokens(self) -> bool:
        return self.residual_length > 0 or self.tokens_per_flush > 1

    def packed_of(self, length: int) -> int:
        """Packed tokens of a sequence of ``length`` tokens, the newest included."""
        whole = max(length - self.residual_length, 0) // self.tokens_per_flush * self.tokens_per_flush
        return max(whole, self.packed)

    def packed_of_each(self, lengths: torch.Tensor) -> torch.Tensor:
        """``packed_of`` of each length, int64."""
        step = self.tokens_per_flush
        return ((lengths - self.residual_length).clamp(min=0) // step * step).clamp(min=self.packed)

    @property
    def longest_window(self) -> int:
        """Of a query, its own token included; a token that came so many before it is packed for it."""
        return self.residual_length + self.tokens_per_flush - 1

    def differs(self, length: int, new_tokens: int) -> bool:
        """Whether ``new_tokens`` queries after ``length`` tokens see different tokens packed, but for themselves."""
        return self.keeps_tokens and self.packed_of(length + 1) < self.packed_of(length + new_tokens)

    def flush(self, window: Window | None, new: Window, dtype: torch.dtype) -> tuple[Window, Window | None]:
        """New tokens through the recent window: the tokens to pack now, and the window that is left, in ``dtype``."""
        if not self.keeps_tokens:
            return new, None
        new = Window(to_storage(new.keys, dtype), to_storage(new.values, dtype), new.is_massive)
        recent = new if window is None else window.append(new)
        return recent.split(self.packed_of(self.packed + recent.tokens) - self.packed)


@dataclass(frozen=True)
class FlushedTokens:
    """Tokens that a call has packed, as its first queries are to see them.

    Args:
        policy: as it was before the call; its ``packed`` is where these tokens start.
        keys, values: (B, H_kv, T_flushed, D), post-RoPE, what they were in the window, in 16 bits.
    """

    policy: FlushPolicy
    keys: torch.Tensor
    values: torch.Tensor

    @property
    def start(self) -> int:
        return self.policy.packed

    @property
    def end(self) -> int:
        return self.start + self.keys.shape[2]
