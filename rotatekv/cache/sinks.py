"""Attention-Sink-Aware quantization: which tokens stay unquantized, and where they are kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from rotatekv.cache.window import Window, to_storage
from rotatekv.methods import KVMethod


@dataclass(frozen=True)
class FirstCallSinks:
    """Tokens of a layer's first call that stay unquantized.

    Args:
        batch_index, token_index: (S,) int32 each, the sequence and the token of every sink, sorted.
        until: (S,) int32, see ``sinks_of_prefixes``; None: all are sinks of the whole call.
    """

    batch_index: torch.Tensor
    token_index: torch.Tensor
    until: torch.Tensor | None = None


@dataclass(frozen=True)
class MassiveTokens:
    """Tokens of any call that become sinks when they leave the recent window: ``is_massive`` (B, T) bool."""

    is_massive: torch.Tensor


ChosenSinks = FirstCallSinks | MassiveTokens


@dataclass(frozen=True)
class Sinks:
    """The sinks of a layer, in 16 bits, as attention sees them. They replace what the codes of a token decode to.

    Args:
        batch_index, token_index: (S,) int32 each, the sequence (ascending) and the token of every sink.
        keys, values: (S, H_kv, D), keys after RoPE.
    """

    batch_index: torch.Tensor
    token_index: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor

    @classmethod
    def of(
        cls,
        batch_index: torch.Tensor,
        token_index: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        dtype: torch.dtype,
        start: int = 0,
    ) -> Sinks:
        """Sinks in a 16-bit ``dtype`` among (B, H_kv, T, D) keys and values, the first of which is token ``start``."""
        batch_index, token_index = (x.to(keys.device, torch.int32) for x in (batch_index, token_index))
        where = batch_index.long(), slice(None), token_index.long()
        return cls(batch_index, token_index + start, *(to_storage(x[where], dtype) for x in (keys, values)))

    @cached_property
    def last_token(self) -> int:
        return int(self.token_index.max()) if len(self.token_index) else -1

    def where(self, chosen: torch.Tensor) -> Sinks:
        """By (S,) bool, or by indices."""
        return Sinks(self.batch_index[chosen], self.token_index[chosen], self.keys[chosen], self.values[chosen])

    def append(self, new: Sinks) -> Sinks:
        pairs = zip(self.tensors(), new.tensors(), strict=True)
        joined = Sinks(*(torch.cat(pair) for pair in pairs))
        return joined.where(torch.argsort(joined.batch_index, stable=True))

    def crop(self, length: int) -> Sinks:
        """Those of the first ``length`` tokens."""
        return self.where(self.token_index < length)

    def drop(self, count: int) -> Sinks:
        """Without those of the first ``count`` tokens, counted from the next one."""
        left = self.where(self.token_index >= count)
        return replace(left, token_index=left.token_index - count)

    def select_rows(self, rows: torch.Tensor) -> Sinks:
        """Batch index ``i`` gets the sinks that ``rows[i]`` had."""
        batch_index, source = (rows.unsqueeze(1) == self.batch_index.unsqueeze(0)).nonzero(as_tuple=True)
        return replace(self.where(source), batch_index=batch_index.int())

    def to(self, device: torch.device | str) -> Sinks:
        return Sinks(*(x.to(device, non_blocking=True) for x in self.tensors()))

    def is_sink(self, batch_size: int, start: int, stop: int) -> torch.Tensor:
        """(B, stop − start) bool: which of these tokens are sinks."""
        found = torch.zeros(batch_size, stop - start, dtype=torch.bool, device=self.token_index.device)
        inside = self.where((self.token_index >= start) & (self.token_index < stop))
        found[inside.batch_index.long(), inside.token_index.long() - start] = True
        return found

    def write_into(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Put the sinks in their places of (B, H_kv, T, D) keys and values."""
        places = self.batch_index.long(), slice(None), self.token_index.long()
        keys[places] = self.keys.to(keys.dtype)
        values[places] = self.values.to(values.dtype)

    def tensors(self, kind: str | None = None) -> Iterator[torch.Tensor]:
        """All, or those held for ``"keys"`` or ``"values"``; the indices count with the keys."""
        if kind != "values":
            yield from (self.batch_index, self.token_index, self.keys)
        if kind != "keys":
            yield self.values


def with_massive(
    sinks: Sinks | None, flushed: Window, is_massive: torch.Tensor, start: int, dtype: torch.dtype
) -> Sinks | None:
    """The sinks, and the massive ones of the tokens that leave the window, the first of which is token ``start``."""
    batch_index, token_index = is_massive.nonzero(as_tuple=True)
    if not len(batch_index):
        return sinks
    new = Sinks.of(batch_index, token_index, flushed.keys, flushed.values, dtype, start)
    return new if sinks is None else sinks.append(new)


def choose_sinks(
    method: KVMethod,
    hidden_states: torch.Tensor,
    token_mask: torch.Tensor | None = None,
    is_first_call: bool = True,
    most_cropped: int = 0,
) -> ChosenSinks | None:
    """Which tokens of a layer's call stay unquantized; None: no more than are known.

    Args:
        hidden_states: (B, T, hidden_size), the input of the decoder layer.
        token_mask: (B, T) bool of these tokens, False at padding; None: there is none.
        most_cropped: a crop of up to so many of the call's tokens is to find the sinks of those that are left.
    """
    config = method.config
    if config.sink_selection == "massive":
        return MassiveTokens(massive_tokens(hidden_states, method.sink_threshold, token_mask))
    # PAPER: sinks are found at prefill; a prefill in several calls has them chosen in the first.
    if not is_first_call:
        return None
    if config.sink_selection == "first":
        return FirstCallSinks(*first_tokens(hidden_states, config.num_sink_entries, token_mask))
    if most_cropped:
        return FirstCallSinks(*sinks_of_prefixes(hidden_states, config.num_sink_entries, most_cropped, token_mask))
    return FirstCallSinks(*detect_sinks(hidden_states, config.num_sink_entries, token_mask))


def massive_tokens(
    hidden_states: torch.Tensor, threshold: float, token_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """(B, T) bool: the tokens with an entry beyond ``threshold``, padding left out.

    It depends on the token alone, so it does not matter in which call the token comes.
    """
    is_massive = largest_magnitude(hidden_states) > threshold
    return is_massive if token_mask is None else is_massive & token_mask.to(is_massive.device)


def largest_magnitude(hidden_states: torch.Tensor) -> torch.Tensor:
    """(B, T, hidden_size) → (B, T)."""
    hidden_states = hidden_states.detach()
    return torch.maximum(hidden_states.amax(-1), -hidden_states.amin(-1))  # no tensor of all magnitudes


def first_tokens(
    hidden_states: torch.Tensor, count: int, token_mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first ``count`` tokens of each sequence, padding left out (KVQuant, arXiv 2401.18079: one).

    Args, returns: as ``detect_sinks``.
    """
    real = hidden_states.new_ones(hidden_states.shape[:2], dtype=torch.bool)
    if token_mask is not None:
        real = token_mask.to(hidden_states.device)
    batch_index, token_index = (real & (real.cumsum(1) <= count)).nonzero(as_tuple=True)
    return batch_index.int(), token_index.int()


def _magnitudes(hidden_states: torch.Tensor, token_mask: torch.Tensor | None) -> torch.Tensor:
    """(B, T, hidden_size), below every real one at padding."""
    magnitudes = hidden_states.detach().abs()
    if token_mask is None:
        return magnitudes
    return magnitudes.masked_fill(~token_mask.to(magnitudes.device).unsqueeze(-1), -1.0)


def detect_sinks(
    hidden_states: torch.Tensor, num_entries: int, token_mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens holding the ``num_entries`` largest magnitudes of a layer's input hidden states, per sequence.

    Several entries may fall on one token, so a sequence has at most ``num_entries`` sinks.

    Args:
        hidden_states: (B, T, hidden_size), the input of the decoder layer.
        token_mask: (B, T) bool, False at padding, which is never a sink.

    Returns:
        batch_index, token_index: (S,) int32 each, the sequence and the token of every sink, sorted.
    """
    magnitudes = _magnitudes(hidden_states, token_mask)
    batch, tokens, width = magnitudes.shape
    flat = magnitudes.flatten(1)  # (B, T·hidden_size)
    top = flat.topk(min(num_entries, tokens * width), dim=1)
    is_sink = torch.zeros(batch, tokens, dtype=torch.bool, device=flat.device)
    is_sink.scatter_(1, top.indices // width, True)
    if token_mask is not None:
        is_sink &= token_mask.to(is_sink.device)
    batch_index, token_index = is_sink.nonzero(as_tuple=True)
    return batch_index.int(), token_index.int()


def sinks_of_prefixes(
    hidden_states: torch.Tensor, num_entries: int, most_cropped: int, token_mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The sinks of the first t tokens for all t from T − ``most_cropped`` to T, each with the largest such t.

    A token that is a sink of t tokens is one of any fewer that hold it, since fewer compete.

    Returns:
        batch_index, token_index, until: (S,) int32 each, sorted.
    """
    magnitudes = _magnitudes(hidden_states, token_mask)
    batch, tokens, width = magnitudes.shape
    shortest = max(tokens - most_cropped, 1)
    # All entries that can be among the largest: those of the shortest prefix, and each later token's own.
    first = magnitudes[:, :shortest].flatten(1)
    first = first.topk(min(num_entries, first.shape[1]), dim=1)
    later = magnitudes[:, shortest:].topk(min(num_entries, width), dim=2).values  # (B, T − shortest, ·)
    owners = torch.arange(shortest, tokens, dtype=torch.int64, device=magnitudes.device)
    owners = owners.repeat_interleave(later.shape[2])
    entries = torch.cat([first.values, later.flatten(1)], dim=1)
    owners = torch.cat([first.indices // width, owners.expand(batch, -1)], dim=1)
    until = torch.zeros(batch, tokens, dtype=torch.int32, device=magnitudes.device)
    for length in range(shortest, tokens):
        seen = entries.masked_fill(owners >= length, -1.0)
        top = seen.topk(min(num_entries, length * width), dim=1)
        until.scatter_(1, owners.gather(1, top.indices), length)
    batch_index, whole = detect_sinks(hidden_states, num_entries, token_mask)
    until[batch_index.long(), whole.long()] = tokens
    if token_mask is not None:
        until.masked_fill_(~token_mask.to(until.device), 0)
    batch_index, token_index = until.nonzero(as_tuple=True)
    return batch_index.int(), token_index.int(), until[batch_index, token_index]
