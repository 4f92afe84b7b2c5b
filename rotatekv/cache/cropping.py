"""How a layer of the cache gives up tokens: the last ones, a call that failed, and what a sliding window has passed."""

from __future__ import annotations

import math
import operator
from typing import NamedTuple

import torch

from rotatekv.cache.modes import storing
from rotatekv.cache.packed import PackedTokens
from rotatekv.cache.record import MOST_CROPPED, Record
from rotatekv.cache.sinks import Sinks
from rotatekv.cache.window import Window, to_storage
from rotatekv.kernels.layout import BLOCK


class Before(NamedTuple):
    """What a layer held before the running call. ``packed``: how many tokens were packed."""

    packed: int
    window: Window | None
    sinks: Sinks | None


class Croppable:
    """The part of ``RotateKVLayer`` that gives up tokens.

    transformers calls ``activate_past_recording`` where it means to crop. From then on each call keeps a ``Record``,
    which the next call and any crop drop.
    """

    record_past = False
    _record: Record | None

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

        A recording layer is then as if the last call had not had them. Otherwise what was packed stays packed, but for
        the first tokens of a group that is cut (``tokens_per_flush`` > 1): these go back to the window as they decode,
        in 16 bits, and are quantized again once the group is full again.
        """
        # generate of transformers 5.17 hands in a tensor of no dimension
        tokens_to_remove = operator.index(tokens_to_remove)
        self.check_crop(tokens_to_remove)
        record, self._record = self._record, None
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        length = self._kept() + tokens_to_remove
        if length <= 0:
            return self._clear()
        if record is not None:
            self._give_back(record, length)
        packed = self.packed.length
        if self.sinks is not None:
            self.sinks = self.sinks.crop(length)
        if self.window is not None:
            self.window = self.window.crop(max(length - packed, 0))
        if length < packed:
            self._crop_packed(length)

    def _give_back(self, record: Record, length: int) -> None:
        """Window and sinks get back what a sequence of ``length`` tokens has there."""
        if record.flushed is not None and record.start <= length:
            whole, packed = self._flush_policy(record.start).packed_of(length), self.packed.length
            older = record.flushed.after(whole - record.start)
            if self.window.is_massive is not None:
                older = Window(older.keys, older.values, self._are_sinks(whole, packed))
                self.sinks = None if self.sinks is None else self.sinks.crop(whole)
            self.window = older.append(self.window)
            self._keep_packed(whole)
        candidates = record.candidates
        if candidates is not None and candidates.shortest <= length:
            self.sinks = candidates.of_first(length)

    def _are_sinks(self, start: int, stop: int) -> torch.Tensor:
        """(B, stop − start) bool."""
        if self.sinks is None:
            return self.window.is_massive.new_zeros(self._shape[0], stop - start)
        return self.sinks.is_sink(self._shape[0], start, stop)

    def _crop_packed(self, length: int) -> None:
        """Keep the first ``length`` packed tokens: whole groups packed, the rest of them in the (empty) window."""
        whole = length // self.method.tokens_per_flush * self.method.tokens_per_flush
        if whole < length:
            keys, values = (to_storage(x[:, :, whole:length], self.storage_dtype) for x in self.read())
            is_massive = self.window.is_massive
            if is_massive is not None:  # sinks among them are sinks already
                is_massive = is_massive.new_zeros(len(keys), length - whole)
            self.window = Window(keys, values, is_massive)
        self.packed.crop(whole)

    def _keep_packed(self, length: int) -> None:
        if length or self.dropped:
            self.packed.crop(length)
        else:
            self.packed = PackedTokens.none(self.method)

    @storing
    def _take_back(self, before: Before) -> None:
        if not before.packed and before.window is None and not self.dropped:
            return self._clear()
        self._keep_packed(before.packed)
        self.window, self.sinks, self._record = before.window, before.sinks, None

    @storing
    def _drop_unseen(self) -> None:
        """Drop the whole blocks of tokens that no later query sees, a crop's own included."""
        unseen = self._kept() - self.sliding_window + 1 - (MOST_CROPPED if self.record_past else 0)
        step = math.lcm(BLOCK, self.method.tokens_per_flush)
        count = min(unseen, self.packed.length) // step * step
        if count <= 0:
            return
        sinks = None if self.sinks is None else self.sinks.drop(count)
        record = None if self._record is None else self._record.drop(count)
        new = {"packed": self.packed.after(count), "sinks": sinks, "_record": record}
        vars(self).update(new, dropped=self.dropped + count)  # at once: an interrupt finds all or nothing
