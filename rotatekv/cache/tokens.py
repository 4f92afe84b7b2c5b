"""The tokens of a layer of the cache: how they are read and moved, and how the layer gives them up again."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import torch

from rotatekv.cache.modes import storing, without_autocast
from rotatekv.cache.packed import PackedTokens
from rotatekv.cache.record import MOST_CROPPED, Record
from rotatekv.cache.sinks import Sinks
from rotatekv.cache.window import FlushedTokens, FlushPolicy, Window, WindowForm
from rotatekv.kernels.backend import kernels_on
from rotatekv.kernels.layout import BLOCK
from rotatekv.methods import KVMethod
from rotatekv.rope import LayerRope, Positions


class Before(NamedTuple):
    """What a layer held before the running call. ``packed``: how many tokens were packed."""

    packed: int
    window: Window | None
    sinks: Sinks | None


class StoredTokens:
    """The tokens of a layer: packed codes, then the recent window, with the sinks beside them.

    It gives up the last tokens (a crop), those of a call that failed, and those that a sliding window has passed.
    transformers calls ``activate_past_recording`` where it means to crop. From then on each call keeps a ``Record``,
    which the next call and any crop drop.

    Attributes:
        packed: the first tokens, quantized.
        window: the last ``residual_length`` tokens in ``residual_bits``, and up to ``tokens_per_flush`` − 1 before
            them: tokens are packed in whole groups, counted from the first one. None: the method packs every token at
            once.
        sinks: the attention sinks in 16 bits; they replace the decoded tokens.
        dropped: how many tokens a sliding window has left behind. All indices count from the token after them.
        flushed: tokens of the running call that are packed, but that its first queries see in their window.

    Args:
        rope: how the model turns this layer's keys; None: it does not.
        positions: of all tokens, shared by a cache's layers.
        sliding_window: a query sees that many tokens, its own included; those before are dropped in whole blocks.
            None: all tokens are seen.
    """

    record_past = False
    # Set by the first call:
    dtype: torch.dtype  # the model's
    storage_dtype: torch.dtype  # of sinks and window
    device: torch.device
    _shape: tuple[int, int, int]  # B, H_kv, D

    def __init__(
        self,
        method: KVMethod,
        rope: LayerRope | None = None,
        positions: Positions | None = None,
        sliding_window: int | None = None,
    ):  # transformers' own is not called: it would set keys and values
        self.method, self.positions = method, Positions() if positions is None else positions
        self.set_rope(rope)
        self.sliding_window = sliding_window
        self._clear()

    def set_rope(self, rope: LayerRope | None) -> None:
        needs_rope = self.method.keys_before_rope or self.method.key_frames is not None
        self.rope = rope if needs_rope else None

    def _clear(self) -> None:
        self.packed = PackedTokens.none(self.method)
        self.window: Window | None = None
        self.sinks: Sinks | None = None
        self.flushed: FlushedTokens | None = None
        self._record: Record | None = None
        self._before: Before | None = None
        self.dropped = 0
        self.is_initialized = False

    def _kept(self) -> int:
        """Tokens that are here: all but the dropped ones."""
        return self.packed.length + (0 if self.window is None else self.window.tokens)

    def get_seq_length(self) -> int:
        return self.dropped + self._kept()

    @property
    def _window_form(self) -> WindowForm:
        return WindowForm(self.storage_dtype, *self.method.window_bits)

    def _flush_policy(self, packed: int) -> FlushPolicy:
        residual_length = self.method.residual_length(self.sliding_window)
        return FlushPolicy(residual_length, self.method.tokens_per_flush, packed)

    @storing
    @without_autocast
    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All tokens that are kept as attention sees them, (B, H_kv, T, D) each, in the model's dtype."""
        kernels = kernels_on(self.packed.keys.device or self.device)
        batch, heads, dim = self._shape
        shape = batch, heads, self._kept(), dim
        turns = self._turns_from_frames(kernels)
        keys, values = self.packed.heads(shape, self.dtype, self.device, kernels, self.sinks is None, turns)
        if self.method.key_frames is not None and turns is None:
            keys = self.method.key_frames.leave(keys, self.rope, self.positions, self.dropped).to(self.dtype)
        elif self.method.key_frames is None and self.rope is not None:
            span = self.dropped, self.get_seq_length()
            keys = self.rope.turn(keys, self.positions.tables(self.rope, *span, self.dtype, keys.device))
        if self.window is not None:
            keys[:, :, self.packed.length :] = self.window.keys
            values[:, :, self.packed.length :] = self.window.values
        if self.sinks is not None:
            self.sinks.write_into(keys, values)
        return keys, values

    def _turns_from_frames(self, kernels: ModuleType | None) -> tuple[torch.Tensor, ...] | None:
        """What a kernel takes the packed keys to their positions with; None: it does not."""
        frames, device = self.method.key_frames, self.packed.keys.device
        if frames is None or device is None or not self.packed.leave_frames(kernels):
            return None
        if self.rope is None:
            return ()
        if not self.rope.is_half_split:
            return None
        return self.positions.kernel_turns(
            self.rope, self.dropped, self.dropped + self.packed.length, frames.size, device
        )

    @property
    def keys(self) -> torch.Tensor | None:
        """(B, H_kv, T, D) of the tokens that are kept, after RoPE, decoded at each call, in the model's dtype; None:
        there are none."""
        return self._decoded(0)

    @property
    def values(self) -> torch.Tensor | None:
        """(B, H_kv, T, D) of the tokens that are kept, decoded at each call, in the model's dtype."""
        return self._decoded(1)

    def _decoded(self, which: int) -> torch.Tensor | None:
        if not self._kept():
            return None
        decoded = self.read()[which]
        self.positions.forget()
        return decoded

    def end_call(self, failed: bool = False) -> None:
        """The running call is done; ``failed``: take back what it has stored here."""
        if failed and self._before is not None:
            self._take_back(self._before)
        elif not failed and self.sliding_window is not None:
            self._drop_unseen(self.sliding_window)
        self._before = self.flushed = None  # last: an interrupt before it, and all is done again

    def activate_past_recording(self) -> None:
        self.record_past = True

    def check_crop(self, tokens_to_remove: int) -> None:
        """Raises what ``crop`` raises, and changes nothing."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the number of tokens to remove, not {tokens_to_remove}")
        if not tokens_to_remove or not self.dropped or self.sliding_window is None:
            return
        if self._kept() + tokens_to_remove < self.sliding_window - 1:
            raise RuntimeError(
                f"{-tokens_to_remove} tokens cannot be cropped: the layer has dropped what a window of "
                f"{self.sliding_window} tokens would see then; call activate_past_recording() before the calls to crop"
            )

    @storing
    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last ``-tokens_to_remove`` tokens; ``tokens_to_remove`` ≤ 0, an integer or a tensor of one.

        A recording layer is then as if the last call had not had them. Otherwise what was packed stays packed, but for
        the first tokens of a group that is cut (``tokens_per_flush`` > 1): these go back to the window as they decode,
        and are quantized again once the group is full again.
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
        if record.flushed is not None and self.window is not None and record.start <= length:
            whole, packed = self._flush_policy(record.start).packed_of(length), self.packed.length
            older = record.flushed.after(whole - record.start)
            if self.window.is_massive is not None:
                older = older.with_massive(self._are_sinks(whole, packed))
                self.sinks = None if self.sinks is None else self.sinks.crop(whole)
            self.window = older.append(self.window)
            self._keep_packed(whole)
        candidates = record.candidates
        if candidates is not None and candidates.shortest <= length:
            self.sinks = candidates.of_first(length)

    def _are_sinks(self, start: int, stop: int) -> torch.Tensor:
        """(B, stop − start) bool."""
        if self.sinks is None:
            return torch.zeros(self._shape[0], stop - start, dtype=torch.bool, device=self.device)
        return self.sinks.is_sink(self._shape[0], start, stop)

    def _crop_packed(self, length: int) -> None:
        """Keep the first ``length`` packed tokens: whole groups packed, the rest of them in the (empty) window."""
        whole = length // self.method.tokens_per_flush * self.method.tokens_per_flush
        if whole < length:
            keys, values = (x[:, :, whole:length] for x in self.read())
            is_massive = None if self.window is None else self.window.is_massive
            if is_massive is not None:  # sinks among them are sinks already
                is_massive = is_massive.new_zeros(len(keys), length - whole)
            self.window = Window.of(keys, values, is_massive, self._window_form)
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
    def _drop_unseen(self, sliding_window: int) -> None:
        """Drop the whole blocks of tokens that no later query sees, a crop's own included."""
        unseen = self._kept() - sliding_window + 1 - (MOST_CROPPED if self.record_past else 0)
        step = math.lcm(BLOCK, self.method.tokens_per_flush)
        count = min(unseen, self.packed.length) // step * step
        if count <= 0:
            return
        sinks = None if self.sinks is None else self.sinks.drop(count)
        record = None if self._record is None else self._record.drop(count)
        new = {"packed": self.packed.after(count), "sinks": sinks, "_record": record}
        vars(self).update(new, dropped=self.dropped + count)  # at once: an interrupt finds all or nothing

    @storing
    def select_rows(self, rows: torch.Tensor) -> None:
        """Make row ``i`` of the batch what row ``rows[i]`` was: packed codes move, nothing is quantized again."""
        if not self.is_initialized:
            return
        self._record, rows = None, rows.to(self.device)
        self.packed.select_rows(rows)
        self._shape = len(rows), *self._shape[1:]
        if self.window is not None:
            self.window = self.window.select_rows(rows)
        if self.sinks is not None:
            self.sinks = self.sinks.select_rows(rows)

    @storing
    def _move(self, device: torch.device | str) -> None:
        self._record = None
        self.packed.move(device)
        self.window = None if self.window is None else self.window.to(device)
        self.sinks = None if self.sinks is None else self.sinks.to(device)

    def tensors(self, kind: str) -> Iterator[torch.Tensor]:
        """Every tensor held for ``kind``, ``"keys"`` or ``"values"``; the sinks' indices count with the keys."""
        yield from self.packed.keys if kind == "keys" else self.packed.values
        for held in (self._record, self.window, self.sinks):
            if held is not None:
                yield from held.tensors(kind)
