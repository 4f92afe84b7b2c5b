"""The recent window where several tokens come in one call: each query sees its own, as if tokens came one by one.

A query at position i sees the last ``residual_length`` tokens as they came, in 16 bits or 8, and those before them as
they decode. A call of many tokens quantizes tokens that are still in the window of its first queries: these are kept in
both forms until the call's attention is done. So a prefill, a prefill in chunks and a decode give the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

_GROUP = 32  # channels that share a scale, so that an outlier costs no others
_SCALE, _FLAGS = " scale", "is_massive"  # names of what a window holds


@dataclass(frozen=True)
class WindowForm:
    """How the tokens of a recent window are kept.

    Args:
        dtype: of 16 bits.
        key_bits, value_bits: 16, or 8: an int8 for each number, and a scale of 16 bits for 32 channels of a token.
    """

    dtype: torch.dtype
    key_bits: int = 16
    value_bits: int = 16

    def hold(self, name: str, heads: torch.Tensor, bits: int) -> dict[str, torch.Tensor]:
        """(B, H_kv, T, D), as it is kept under that name."""
        if bits == 16:
            return {name: to_storage(heads, self.dtype)}
        info, groups = torch.finfo(self.dtype), _in_groups(heads.float())  # (B, H_kv, T, D / 32, 32)
        scale = groups.abs().amax(-1) / 127  # (B, H_kv, T, D / 32)
        scale = scale.clamp(max(info.tiny * info.eps, 1e-30), info.max / 128).to(self.dtype)
        codes = (groups / scale.float().unsqueeze(-1)).round().clamp(-127, 127).to(torch.int8)
        return {name: codes.flatten(-2), name + _SCALE: scale}


def _in_groups(heads: torch.Tensor) -> torch.Tensor:
    """(…, D) → (…, D / 32, 32), or with the largest groups of a power of two that D has."""
    return heads.unflatten(-1, (-1, math.gcd(heads.shape[-1], _GROUP)))


@dataclass(frozen=True)
class Window:
    """Consecutive tokens of a layer as attention sees them: the recent window, or those that leave it.

    Args:
        held: "keys" (after RoPE) and "values", (B, H_kv, T_window, D), as ``WindowForm.hold`` gives them; and where the
            method has massive tokens "is_massive", (B, 1, T_window) bool, those that become sinks when they are packed.
    """

    held: dict[str, torch.Tensor]

    @classmethod
    def of(
        cls, keys: torch.Tensor, values: torch.Tensor, is_massive: torch.Tensor | None, form: WindowForm | None
    ) -> Window:
        """(B, H_kv, T, D) each and (B, T) bool; without a form keys and values stay what they are."""
        parts = {"keys": keys, "values": values}
        if form is not None:
            parts = form.hold("keys", keys, form.key_bits) | form.hold("values", values, form.value_bits)
        return cls(parts if is_massive is None else parts | {_FLAGS: is_massive.unsqueeze(1)})

    @property
    def tokens(self) -> int:
        return self.held["keys"].shape[2]

    @property
    def keys(self) -> torch.Tensor:
        """(B, H_kv, T_window, D), in 16 bits."""
        return self._heads("keys")

    @property
    def values(self) -> torch.Tensor:
        return self._heads("values")

    @property
    def is_massive(self) -> torch.Tensor | None:
        """(B, T_window) bool; None: the method has no massive tokens."""
        return self.held[_FLAGS].squeeze(1) if _FLAGS in self.held else None

    def _heads(self, name: str) -> torch.Tensor:
        heads, scale = self.held[name], self.held.get(name + _SCALE)
        if scale is None:
            return heads
        return (_in_groups(heads.to(scale.dtype)) * scale.unsqueeze(-1)).flatten(-2)  # (B, H_kv, T_window, D)

    def append(self, new: Window) -> Window:
        return Window({name: torch.cat([x, new.held[name]], dim=2) for name, x in self.held.items()})

    def split(self, count: int) -> tuple[Window, Window]:
        """The first ``count`` tokens, and the others."""
        first = self._cut(slice(0, count))
        return first, self.after(count) if count else self

    def crop(self, length: int) -> Window:
        """The first ``length`` tokens."""
        return self._cut(slice(0, length)).clone()

    def after(self, count: int) -> Window:
        """Without the first ``count`` tokens."""
        return self._cut(slice(count, None)).clone()

    def _cut(self, part: slice) -> Window:
        return self._each(lambda x: x[:, :, part])

    def clone(self) -> Window:
        """A view would keep the bytes of other tokens alive."""
        return self._each(torch.clone)

    def with_massive(self, is_massive: torch.Tensor) -> Window:
        """With other flags, (B, T_window) bool."""
        return Window(self.held | {_FLAGS: is_massive.unsqueeze(1)})

    def without_massive(self) -> Window:
        """Without flags."""
        return Window({name: x for name, x in self.held.items() if name != _FLAGS})

    def select_rows(self, rows: torch.Tensor) -> Window:
        return self._each(lambda x: x.index_select(0, rows))

    def to(self, device: torch.device | str) -> Window:
        return self._each(lambda x: x.to(device, non_blocking=True))

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Window:
        return Window({name: change(x) for name, x in self.held.items()})

    def tensors(self, kind: str) -> Iterator[torch.Tensor]:
        """Those held for ``"keys"`` or ``"values"``; the flags count with the keys."""
        for name, x in self.held.items():
            if name.startswith("values") == (kind == "values"):
                yield x


def to_storage(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """In a 16-bit ``dtype``, which holds no larger numbers than its own."""
    limit = torch.finfo(dtype).max
    return x.clamp(-limit, limit).to(dtype)


@dataclass(frozen=True)
class FlushPolicy:
    """How many tokens of a sequence are packed.

    Args:
        residual_length: tokens that stay in the window, at least.
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

    def flush(self, window: Window | None, new: Window) -> tuple[Window, Window | None]:
        """New tokens through the recent window: the tokens to pack now, and the window that is left."""
        if not self.keeps_tokens:
            return new, None
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
