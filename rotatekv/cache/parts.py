"""Batches whose sequences are kept each in a cache of its own: its own tokens, without padding and other sequences'.

Two kinds of batches need it. *Packed*: documents one after the other in a row, known by ``position_ids`` that restart.
*Padded*, where it matters which tokens count: KIVI and RotateKV+ pack them in groups, a recent window holds the last
ones, and sinks are chosen in the first call that has a token of the sequence. So a sequence's numbers are those it has
alone, but that a sliding window is as long as transformers' own, which counts padding between tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch.nn.functional import pad
from transformers.cache_utils import CacheLayerMixin

from rotatekv.cache.layer import RotateKVLayer


class SequenceCache(Protocol):
    """What a part asks of the cache of its sequence, a ``RotateKVCache``."""

    layers: list
    token_mask: torch.Tensor | None
    mask_is_causal: bool

    def begin_forward(
        self, position_ids: torch.Tensor, batch_size: int, attention_mask: torch.Tensor | None
    ) -> None: ...

    def end_forward(self, failed: bool = False) -> None: ...

    def get_seq_length(self) -> int: ...

    def check_crop(self, tokens_to_remove: int) -> None: ...

    def crop(self, tokens_to_remove: int) -> None: ...

    def select_rows(self, rows: torch.Tensor) -> None: ...

    def incomplete_layers(self) -> list[int]: ...


@dataclass
class Part:
    """One sequence of a batch.

    Args:
        batch_index: which row of the batch it is in.
        cache: of this sequence alone.
        token_index: (T_part,) int64, which of the row's tokens are its own, ascending.
        new: (T_new,) int64, which of the running call's tokens are.
    """

    batch_index: int
    cache: SequenceCache
    token_index: torch.Tensor
    new: torch.Tensor

    def begin_forward(self, position_ids: torch.Tensor, own: torch.Tensor, cached: int) -> None:
        """``position_ids`` (B, T) of the call's tokens, of which ``own`` (T,) bool are the sequence's."""
        self.new = own.nonzero()[:, 0].to(self.token_index.device)
        self.token_index = torch.cat([self.token_index, self.new + cached])
        if len(self.new):
            self.cache.begin_forward(self.of(position_ids, 1), 1, None)

    def of(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """(B or 1, ...) ``x`` with the call's tokens along ``dim`` → (1, ...), the sequence's."""
        return self._row(x).index_select(dim, self.new.to(x.device))

    def token_mask(self, mask: torch.Tensor | None) -> torch.Tensor | None:
        """What a caller's mask says of the sequence's tokens: (1, T_part) of a 2-D one; another as it is."""
        if mask is None or mask.dim() != 2:
            return mask
        unnamed = int(self.token_index[-1]) + 1 - mask.shape[1]  # by a short mask: hidden
        return self._row(pad(mask, (0, max(unnamed, 0)))).index_select(1, self.token_index.to(mask.device))

    @property
    def has_gaps(self) -> bool:
        """Whether there is padding between the sequence's tokens."""
        return int(self.token_index[-1] - self.token_index[0]) >= len(self.token_index)

    def kept_by(self, layer: int) -> torch.Tensor:
        """Those of ``token_index`` that a layer keeps, after its sliding window."""
        return self.token_index[self.cache.layers[layer].dropped :]

    def attention_mask(self, mask: torch.Tensor | None) -> torch.Tensor | None:
        """The (B or 1, ·, T or 1, T_cached) mask that attention is given → (1, ·, T_new or 1, T_part)."""
        if mask is None:
            return None
        queries = self.of(mask, 2) if mask.shape[2] > 1 else self._row(mask)
        return queries.index_select(3, self.token_index.to(mask.device))

    def _row(self, x: torch.Tensor) -> torch.Tensor:
        return x[self.batch_index : self.batch_index + 1] if x.shape[0] > 1 else x

    def crop(self, length: int) -> None:
        """Drop the tokens that lie past the row's first ``length``."""
        self.cache.crop(self.past(length))
        self.token_index = self.token_index[self.token_index < length]

    def past(self, length: int) -> int:
        """Minus the number of tokens that lie past the row's first ``length``."""
        return -int((self.token_index >= length).sum())


class Parts:
    """The sequences of a batch, each alone.

    Args:
        tokens: of a row that are stored, padding included.
        is_packed: they are documents of a packed batch; else each is a row.
    """

    def __init__(self, parts: Sequence[Part], tokens: int = 0, is_packed: bool = False):
        self.parts, self.tokens, self.is_packed = list(parts), tokens, is_packed
        self._coming = tokens

    @classmethod
    def of_rows(cls, cache: SequenceCache, rows: int, device: torch.device) -> Parts:
        """The rows of a cache between two calls, whose stored tokens are none of them padding."""
        tokens, parts = cache.get_seq_length(), []
        counted = {"dtype": torch.int64, "device": device}
        for row in range(rows):
            alone = copy.deepcopy(cache)
            alone.select_rows(torch.tensor([row], **counted))
            parts.append(Part(row, alone, torch.arange(tokens, **counted), torch.arange(0, **counted)))
        return cls(parts, tokens)

    @classmethod
    def of_documents(
        cls, documents: torch.Tensor, new_cache: Callable[[], SequenceCache]
    ) -> tuple[Parts, list[torch.Tensor]]:
        """One for each of ``documents`` (B, T), numbered in each row, and which of its row's tokens are its own."""
        found = [(row, numbers == n) for row, numbers in enumerate(documents) for n in numbers.unique()]
        none = documents.new_empty(0, dtype=torch.int64)
        return cls([Part(row, new_cache(), none, none) for row, _ in found], is_packed=True), [own for _, own in found]

    def running(self) -> list[Part]:
        """Those that have tokens in the running call."""
        return [part for part in self.parts if len(part.new)]

    def caches(self) -> list[SequenceCache]:
        return [part.cache for part in self.parts]

    def begin_forward(self, position_ids: torch.Tensor, owned: Iterable[torch.Tensor]) -> None:
        """``position_ids`` (B, T) of the new tokens, and for each part which of its row's are its own, (T,) bool."""
        self._coming = self.tokens + position_ids.shape[1]
        for part, own in zip(self.parts, owned, strict=True):
            part.begin_forward(position_ids, own, self.tokens)

    def end_forward(self, failed: bool) -> None:
        self._coming = self.tokens = self.tokens if failed else self._coming
        for part in self.parts:
            part.cache.end_forward(failed)
            part.token_index = part.token_index[part.token_index < self.tokens]

    def crop(self, tokens_to_remove: int) -> None:
        self.tokens = max(self.tokens + tokens_to_remove, 0)
        for part in self.parts:
            part.crop(self.tokens)

    def check_crop(self, tokens_to_remove: int) -> None:
        for part in self.parts:
            part.cache.check_crop(max(tokens_to_remove, part.past(self.tokens + tokens_to_remove)))

    def select_rows(self, rows: torch.Tensor) -> None:
        """Row ``i`` gets copies of the parts that row ``rows[i]`` had."""
        self.parts = [
            replace(part, batch_index=i, cache=copy.deepcopy(part.cache))
            for i, row in enumerate(rows.tolist())
            for part in self.parts
            if part.batch_index == row
        ]


class SplitLayer(CacheLayerMixin):
    """Stands in a cache for a layer whose sequences each lie in a cache of their own."""

    is_croppable = True

    def __init__(self, parts: Parts, number: int, layer: RotateKVLayer):  # the base class's would set keys and values
        self.parts, self.number, self.method = parts, number, layer.method
        self.sliding_window, self.is_sliding = layer.sliding_window, layer.is_sliding

    @property
    def is_initialized(self) -> bool:
        return self.parts.tokens > 0

    @property
    def keys(self) -> torch.Tensor | None:
        """(B, H_kv, T, D) as ``RotateKVLayer.keys``; zeros for padding and for what a sliding window has dropped."""
        return self._decoded("keys")

    @property
    def values(self) -> torch.Tensor | None:
        return self._decoded("values")

    def _decoded(self, kind: str) -> torch.Tensor | None:
        whole = None
        for part in self.parts.parts:
            heads = getattr(part.cache.layers[self.number], kind)
            if heads is None:
                continue
            if whole is None:
                rows = 1 + max(one.batch_index for one in self.parts.parts)
                whole = heads.new_zeros(rows, heads.shape[1], self.parts.tokens, heads.shape[3])
            whole[part.batch_index, :, part.token_index[-heads.shape[2] :].to(heads.device)] = heads[0]
        return whole

    @property
    def record_past(self) -> bool:
        return any(layer.record_past for layer in self._of_parts())

    @record_past.setter
    def record_past(self, records: bool) -> None:
        for layer in self._of_parts():
            layer.record_past = records

    def activate_past_recording(self) -> None:
        self.record_past = True

    def _of_parts(self) -> list[RotateKVLayer]:
        return [cache.layers[self.number] for cache in self.parts.caches()]

    def offload(self) -> None:
        for layer in self._of_parts():
            layer.offload()

    def prefetch(self) -> None:
        for layer in self._of_parts():
            layer.prefetch()

    def get_seq_length(self) -> int:
        return self.parts.tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.parts.tokens + query_length, 0

    def get_max_length(self) -> int:
        return -1 if self.sliding_window is None else self.sliding_window

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """The parts' layers are what is initialized."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        raise RuntimeError("a RotateKVCache only works in a model patched with patch_model(model, ...)")

    def crop(self, tokens_to_remove: int) -> None:
        """The parts do it."""

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """The parts do it."""


def find_documents(position_ids: torch.Tensor, use_cache: bool) -> torch.Tensor | None:
    """The documents of a packed batch, (B or 1, T) int64, numbered in each row; None: every row is one.

    As in transformers, a document ends where the next position is not one more. A call that keeps its cache, which
    transformers never takes for a packed one, must go back in position somewhere.

    Args:
        position_ids: (B or 1, T).
    """
    steps = position_ids.diff(dim=1)
    ends = steps != 1
    if not bool((steps < 1 if use_cache else ends).any()):
        return None
    return pad(ends.cumsum(1), (1, 0))
