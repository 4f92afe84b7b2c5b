"""How a cache layer gives up tokens: rejected candidates, a call that failed, a conversation cut back, and those that a
sliding window has left behind."""

from __future__ import annotations

import copy
import functools
import math
import operator
from collections.abc import Callable
from typing import NamedTuple

import torch

from rotatekv.kernels.layout import BLOCK

SINKS = ("sink_rows", "sink_columns", "sink_keys", "sink_values")
MOST_CROPPED = 64  # tokens of the last call that a recording layer gives up without a trace


class SpareSinks(NamedTuple):
    """The first call's sinks, and the tokens that are sinks of fewer of its tokens, ``shortest`` of them or more.

    Args:
        until: (S,), the most tokens of which it is a sink. The others: as in ``RotateKVLayer``.
    """

    shortest: int
    until: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor

    def dropped(self, count: int) -> SpareSinks:
        """The same, counted from the token ``count`` on, which is the first that is left."""
        left = self.columns >= count
        _, until, rows, columns, keys, values = (x if isinstance(x, int) else x[left] for x in self)
        return SpareSinks(self.shortest - count, until - count, rows, columns - count, keys, values)


class RecentTokens(NamedTuple):
    """Tokens that the last call has packed, (B, H_kv, T_kept, D) as the window had them, from token ``start`` on."""

    start: int
    keys: torch.Tensor
    values: torch.Tensor


def storing(method: Callable) -> Callable:
    """A method of a layer that makes tensors to keep: plain ones, of no graph, and not those of
    ``torch.inference_mode``, which no call outside it could write to."""

    @functools.wraps(method)
    def store(layer, *args, **kwargs):
        if not torch.is_inference_mode_enabled() and not torch.is_grad_enabled():
            return method(layer, *args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return method(layer, *args, **kwargs)

    return store


def without_autocast(method: Callable) -> Callable:
    """A method of a layer that autocast is not to touch: it would round rotations, and cannot join float16 scales."""

    @functools.wraps(method)
    def exact(layer, *args, **kwargs):
        kind = layer.device.type
        if not torch.is_autocast_enabled(kind):
            return method(layer, *args, **kwargs)
        with torch.autocast(kind, enabled=False):
            return method(layer, *args, **kwargs)

    return exact


class Croppable:
    """The part of ``RotateKVLayer`` that gives up tokens.

    transformers calls ``activate_past_recording`` where it means to crop. From then on each call keeps in 16 bits what
    a crop of up to ``MOST_CROPPED`` of its tokens must give back: what it has packed of the window's tokens, and of a
    first call the tokens that its last ones have crowded out of the sinks. The next call and any crop drop them.
    """

    record_past = False
    _recent: RecentTokens | None
    _spare: SpareSinks | None

    def activate_past_recording(self) -> None:
        self.record_past = True

    def check_crop(self, tokens_to_remove: int) -> None:
        """Raises what ``crop`` raises, and changes nothing."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the number of tokens to remove, not {tokens_to_remove}")
        if tokens_to_remove and self.dropped and self._kept() + tokens_to_remove < self.sliding_window - 1:
            raise RuntimeError(
                f"{-tokens_to_remove} tokens cannot be cropped: the layer has dropped what a window of "
                f"{self.sliding_window} tokens would see then; call activate_past_recording() before the calls to crop"
            )

    @storing
    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last ``-tokens_to_remove`` tokens; ``tokens_to_remove`` ≤ 0, an integer or a tensor of one.

        A recording layer (``activate_past_recording``) is then as if the last call had not had them. Otherwise what was
        packed stays packed, but for the first tokens of a group that is cut (``tokens_per_flush`` > 1): these go back
        to the window as they decode, in 16 bits, and are quantized again once the group is full again.
        """
        # generate of transformers 5.17 hands in a tensor of no dimension
        tokens_to_remove = operator.index(tokens_to_remove)
        self.check_crop(tokens_to_remove)
        recent, self._recent, spare, self._spare = self._recent, None, self._spare, None
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        length = self._kept() + tokens_to_remove
        if length <= 0:
            return self._clear()
        if recent is not None and recent.start <= length:
            self._unpack(recent, length)
        if spare is not None and spare.shortest <= length:
            left = spare.until >= length
            self.sink_rows, self.sink_columns, self.sink_keys, self.sink_values = (x[left] for x in spare[2:])
        window, packed = self._window_tokens(), self.packed_keys.length
        if self.sink_keys is not None:
            self._keep_sinks(self.sink_rows, (self.sink_columns < length).nonzero()[:, 0])
        if window:  # a clone, not a view: a view would keep the dropped tokens' bytes alive
            left = max(length - packed, 0)
            self.window_keys = self.window_keys[:, :, :left].clone()
            self.window_values = self.window_values[:, :, :left].clone()
            if self.window_massive is not None:
                self.window_massive = self.window_massive[:, :left].clone()
        self._sinks_in_window = True
        if length < packed:
            self._crop_packed(length)

    def _put_aside_spare_sinks(self, until: torch.Tensor, tokens: int) -> None:
        """Of a first call of ``tokens`` tokens keep as sinks those that are sinks of all of them."""
        sinks = (self.sink_rows, self.sink_columns, self.sink_keys, self.sink_values)
        self._spare = SpareSinks(tokens - MOST_CROPPED, until, *sinks)
        self._keep_sinks(self.sink_rows, (until == tokens).nonzero()[:, 0])

    def _unpack(self, recent: RecentTokens, length: int) -> None:
        """Give the window back what a sequence of ``length`` tokens has there."""
        packed = self.packed_keys.length
        whole = self._window(recent.start).packed_of(length)
        self.window_keys = torch.cat([recent.keys[:, :, whole - recent.start :], self.window_keys], dim=2)
        self.window_values = torch.cat([recent.values[:, :, whole - recent.start :], self.window_values], dim=2)
        if self.window_massive is not None:
            massive = self.window_massive.new_zeros(self.window_keys.shape[0], self.window_keys.shape[2])
            massive[:, packed - whole :] = self.window_massive
            if self.sink_keys is not None:
                back = self.sink_columns >= whole
                massive[self.sink_rows[back].long(), self.sink_columns[back].long() - whole] = True
                self._keep_sinks(self.sink_rows, (~back).nonzero()[:, 0])
            self.window_massive = massive
        self._keep_packed(whole)

    def _crop_packed(self, length: int) -> None:
        """Keep the first ``length`` packed tokens: whole groups packed, the rest of them in the (empty) window."""
        whole = length // self.method.tokens_per_flush * self.method.tokens_per_flush
        if whole < length:
            keys, values = (self._to_storage(x[:, :, whole:length]) for x in self.read())
            self.window_keys, self.window_values = keys, values
            if self.window_massive is not None:  # sinks among them are sinks already
                self.window_massive = self.window_massive.new_zeros(keys.shape[0], length - whole)
        self.packed_keys.crop(whole)
        self.packed_values.crop(whole)

    def _keep_packed(self, length: int) -> None:
        if length or self.dropped:
            self.packed_keys.crop(length)
            self.packed_values.crop(length)
        else:
            self.packed_keys, self.packed_values = self.method.key_store(), self.method.value_store()

    def _keep_sinks(self, rows: torch.Tensor, source: torch.Tensor, renamed: bool = False) -> None:
        self.sink_rows = rows if renamed else rows[source]
        self.sink_columns = self.sink_columns[source]
        self.sink_keys, self.sink_values = self.sink_keys[source], self.sink_values[source]

    @storing
    def _take_back(self, packed: int, beside: dict[str, torch.Tensor | None]) -> None:
        if not packed and beside["window_keys"] is None and not self.dropped:
            return self._clear()
        self._keep_packed(packed)
        for name, tensor in beside.items():
            setattr(self, name, tensor)
        self._recent, self._spare, self._sinks_in_window = None, None, True

    @storing
    def _drop_unseen(self) -> None:
        """Drop the whole blocks of tokens that no later query sees, a crop's own included."""
        unseen = self._kept() - self.sliding_window + 1 - (MOST_CROPPED if self.record_past else 0)
        step = math.lcm(BLOCK, self.method.tokens_per_flush)
        count = min(unseen, self.packed_keys.length) // step * step
        if count <= 0:
            return
        new = {"packed_keys": copy.copy(self.packed_keys), "packed_values": copy.copy(self.packed_values)}
        for store in new.values():
            store.drop(count)
        if self.sink_keys is not None:
            left = self.sink_columns >= count
            new |= {name: getattr(self, name)[left] for name in SINKS}
            new["sink_columns"] = new["sink_columns"] - count
        if self._recent is not None:
            new["_recent"] = self._recent._replace(start=self._recent.start - count)
        if self._spare is not None:
            new["_spare"] = self._spare.dropped(count)
        vars(self).update(new, dropped=self.dropped + count)  # at once: an interrupt finds all or nothing
