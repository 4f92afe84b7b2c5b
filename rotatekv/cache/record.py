"""What a layer that records its past keeps of its last call, for a crop that takes back rejected candidates."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from rotatekv.cache.sinks import Sinks
from rotatekv.cache.window import FlushPolicy, Window

MOST_CROPPED = 64  # tokens of the last call that a recording layer gives up without a trace


@dataclass(frozen=True)
class SinkCandidates:
    """The tokens of a first call that are sinks of all its tokens, or of fewer, ``shortest`` of them or more.

    Args:
        until: (S,) int32, the most tokens of which each is a sink.
    """

    shortest: int
    until: torch.Tensor
    sinks: Sinks

    @classmethod
    def of(cls, until: torch.Tensor, sinks: Sinks, tokens: int) -> SinkCandidates:
        """Of a first call of so many tokens."""
        return cls(tokens - MOST_CROPPED, until.to(sinks.token_index.device), sinks)

    def of_first(self, tokens: int) -> Sinks:
        """The sinks of the call's first ``tokens`` tokens, ``shortest`` or more."""
        return self.sinks.where(self.until >= tokens)

    def drop(self, count: int) -> SinkCandidates:
        """The same, counted from the token ``count`` on, which is the first that is left."""
        left = self.sinks.token_index >= count
        return SinkCandidates(self.shortest - count, self.until[left] - count, self.sinks.drop(count))


@dataclass(frozen=True)
class Record:
    """The last call's packed tokens and crowded-out sinks.

    Args:
        start: the token of the layer that ``flushed`` begins with.
        flushed: tokens that the call has packed, as the window had them; None: it has packed none from its window.
        candidates: of a first call whose sinks depend on its length; None: of any other.
    """

    start: int
    flushed: Window | None
    candidates: SinkCandidates | None

    @classmethod
    def of(
        cls, policy: FlushPolicy, flushed: Window, window: Window | None, candidates: SinkCandidates | None
    ) -> Record:
        """``policy`` as it was before the call, which left ``window`` and packed ``flushed``."""
        if window is None or not flushed.tokens:
            return cls(policy.packed, None, candidates)
        start = policy.packed_of(policy.packed + flushed.tokens + window.tokens - MOST_CROPPED)
        kept = flushed.without_massive().after(start - policy.packed)
        return cls(start, kept, candidates)

    def drop(self, count: int) -> Record:
        """The same, counted from the token ``count`` on."""
        candidates = None if self.candidates is None else self.candidates.drop(count)
        return Record(self.start - count, self.flushed, candidates)

    def tensors(self, kind: str) -> Iterator[torch.Tensor]:
        """Those held for ``"keys"`` or ``"values"``; indices count with the keys."""
        if self.flushed is not None:
            yield from self.flushed.tensors(kind)
        if self.candidates is not None:
            yield from self.candidates.sinks.tensors(kind)
            if kind == "keys":
                yield self.candidates.until
