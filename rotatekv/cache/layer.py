"""One layer of the cache: packed codes, and nothing in 16 bits but the attention sinks and the recent window."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import torch
from transformers.cache_utils import CacheLayerMixin

from rotatekv.cache.cropping import Before, Croppable
from rotatekv.cache.fused_call import FusedCall, exact_tokens
from rotatekv.cache.modes import storing, without_autocast
from rotatekv.cache.packed import PackedTokens
from rotatekv.cache.record import MOST_CROPPED, Record, SinkCandidates
from rotatekv.cache.sinks import ChosenSinks, FirstCallSinks, MassiveTokens, Sinks, choose_sinks, with_massive
from rotatekv.cache.window import FlushedTokens, FlushPolicy, Window
from rotatekv.kernels.backend import kernels_on
from rotatekv.methods import KVMethod
from rotatekv.rope import LayerRope, Positions


class RotateKVLayer(Croppable, CacheLayerMixin):
    """One layer's keys and values: packed codes, then the recent window, with the sinks beside them.

    Attributes:
        packed: the first tokens, quantized.
        window: the last ``residual_length`` tokens in 16 bits, and up to ``tokens_per_flush`` − 1 before them: tokens
            are packed in whole groups, counted from the first one. None: the method packs every token at once.
        sinks: the attention sinks in 16 bits; they replace the decoded tokens.
        dropped: how many tokens a sliding window has left behind. All indices count from the token after them.
        flushed: tokens of the running call that are packed, but that its first queries see in their window.

    Args:
        rope: how the model turns this layer's keys; None: it does not.
        positions: of all tokens, shared by a cache's layers.
        sliding_window: a query sees that many tokens, its own included; those before are dropped in whole blocks.
            None: all tokens are seen.
    """

    is_croppable = True

    def __init__(
        self,
        method: KVMethod,
        rope: LayerRope | None = None,
        positions: Positions | None = None,
        sliding_window: int | None = None,
    ):  # the base class's own would set keys and values
        self.method, self.positions = method, Positions() if positions is None else positions
        self.set_rope(rope)
        self.sliding_window = sliding_window
        self._clear()

    def set_rope(self, rope: LayerRope | None) -> None:
        self.rope = rope if self.method.keys_before_rope else None

    @property
    def is_sliding(self) -> bool:
        return self.sliding_window is not None

    def _clear(self) -> None:
        self.packed = PackedTokens.none(self.method)
        self.window: Window | None = None
        self.sinks: Sinks | None = None
        self.flushed: FlushedTokens | None = None
        self._record: Record | None = None
        self._before: Before | None = None
        self.dropped = 0
        self.is_initialized = False

    def end_call(self, failed: bool = False) -> None:
        """The running call is done; ``failed``: take back what it has stored here."""
        if failed and self._before is not None:
            self._take_back(self._before)
        elif not failed and self.sliding_window is not None:
            self._drop_unseen()
        self._before = self.flushed = None  # last: an interrupt before it, and all is done again

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

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        # Sinks and windows take 16 bits whatever the model's dtype.
        self.storage_dtype = torch.bfloat16 if self.dtype == torch.bfloat16 else torch.float16
        self.is_initialized = True

    def choose_sinks(self, hidden_states: torch.Tensor, token_mask: torch.Tensor | None = None) -> ChosenSinks | None:
        """Which of the coming call's tokens stay unquantized, by the (B, T, hidden_size) input of the decoder layer.

        Args:
            token_mask: (B, T) bool, False at padding; None: there is none.
        """
        is_first, most_cropped = self.get_seq_length() == 0, MOST_CROPPED if self.record_past else 0
        return choose_sinks(self.method, hidden_states, token_mask, is_first, most_cropped)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, sinks: ChosenSinks | None = None, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store T new tokens and return all that are kept as attention sees them, their own quantization included.

        Args:
            key_states: (B, H_kv, T, D), after RoPE, their positions the last T of ``positions``.
            value_states: (B, H_kv, T, D).
            sinks: which of them stay unquantized; see ``choose_sinks``.

        Returns:
            post-RoPE keys and values, (B, H_kv, T_kept, D), in the dtype of the inputs.
        """
        self.write(key_states, value_states, kernels_on(key_states.device), sinks)
        return self.read()

    def write(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        kernels: ModuleType | None = None,
        sinks: ChosenSinks | None = None,
    ) -> None:
        """Store T new tokens, (B, H_kv, T, D) each, as ``update`` takes them, and set ``flushed``."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.dtype = key_states.dtype  # the model's, which may be another one by now
        self._write(key_states, value_states, kernels, sinks)

    @storing
    @without_autocast
    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All tokens that are kept as attention sees them, (B, H_kv, T, D) each, in the model's dtype."""
        kernels = kernels_on(self.packed.keys.device or self.device)
        batch, heads, dim = self._shape
        shape = batch, heads, self._kept(), dim
        keys, values = self.packed.heads(shape, self.dtype, self.device, kernels, views=self.sinks is None)
        if self.rope is not None:
            span = self.dropped, self.get_seq_length()
            keys = self.rope.turn(keys, self.positions.tables(self.rope, *span, self.dtype, keys.device))
        if self.window is not None:
            keys[:, :, self.packed.length :] = self.window.keys
            values[:, :, self.packed.length :] = self.window.values
        if self.sinks is not None:
            self.sinks.write_into(keys, values)
        return keys, values

    def _flush_policy(self, packed: int) -> FlushPolicy:
        return FlushPolicy(self.method.config.residual_length, self.method.tokens_per_flush, packed)

    def can_attend(self, kernels: ModuleType | None) -> bool:
        """Whether ``attend`` is right for the tokens just written: the method has a kernel, codes are packed, all
        queries have one window."""
        turns = self.rope is None or self.rope.is_half_split
        return (
            self.flushed is None and turns and self.method.fused_decode is not None and self.packed.are_read_by(kernels)
        )

    @storing
    @without_autocast
    def attend(self, query: torch.Tensor, scaling: float, call: FusedCall) -> torch.Tensor:
        """Attention of the T tokens just written to all that are kept, in one kernel that reads the packed cache.

        Args:
            query: (B, H, T, D), after RoPE. scaling: factor on the scores.

        Returns:
            (B, H, T, D) in the dtype of the query.
        """
        device, rope = query.device, None
        if self.rope is not None:
            rope = self.rope.model.kernel_tables(self.rope.kind, call.length, device)
        output = call.kernels(device).decode_attention(
            query.float().contiguous(),
            self.packed.keys.tensors,
            self.packed.values.tensors,
            self.method.key_format.groups_on(device),
            *call.rows(self.dropped, device),
            self.packed.length,
            self._kept(),
            self.method.fused_decode.options(scaling, rope, device, self.sliding_window or 0),
            exact_tokens(self.sinks, self.window, self.packed.length),
        )
        return output.to(query.dtype)

    @storing
    @without_autocast
    def _write(
        self, keys: torch.Tensor, values: torch.Tensor, kernels: ModuleType | None, chosen: ChosenSinks | None
    ) -> None:
        policy = self._flush_policy(self.packed.length)
        exact = not self.get_seq_length() and not self.method.config.quantize_prefill  # its queries see no window
        differ = not exact and policy.differs(self._kept(), keys.shape[2])
        self._before = Before(policy.packed, self.window, self.sinks)
        self._record = candidates = None
        self._shape = keys.shape[0], keys.shape[1], keys.shape[3]
        if isinstance(chosen, FirstCallSinks):
            candidates = self._store_sinks(chosen, keys, values)
        is_massive = chosen.is_massive.to(keys.device) if isinstance(chosen, MassiveTokens) else None
        flushed, self.window = policy.flush(self.window, Window(keys, values, is_massive), self.storage_dtype)
        if is_massive is not None and flushed.tokens:
            self.sinks = with_massive(self.sinks, flushed, policy.packed, self.storage_dtype)
        if self.record_past:
            self._record = Record.of(policy, flushed, self.window, candidates)
        if flushed.tokens:
            self._pack(flushed.keys, flushed.values, kernels)
        self.flushed = None
        if differ:
            self.flushed = FlushedTokens(policy, flushed.keys.to(self.dtype), flushed.values.to(self.dtype))

    def _store_sinks(self, chosen: FirstCallSinks, keys: torch.Tensor, values: torch.Tensor) -> SinkCandidates | None:
        """Keep the first call's sinks; the candidates for a shorter call's where they are known."""
        self.sinks = Sinks.of(chosen.batch_index, chosen.token_index, keys, values, self.storage_dtype)
        if chosen.until is None:
            return None
        candidates = SinkCandidates.of(chosen, self.sinks, keys.shape[2])
        self.sinks = candidates.of_first(keys.shape[2])
        return candidates

    def _pack(self, keys: torch.Tensor, values: torch.Tensor, kernels: ModuleType | None) -> None:
        """Quantize (B, H_kv, T, D) tokens that follow the packed ones."""
        unrope = None
        if self.rope is not None:
            first = self.dropped + self.packed.length
            span = self.rope, first, first + keys.shape[2], self.dtype, keys.device
            if kernels is not None and self.packed.keys.is_written_by_kernels and self.rope.is_half_split:
                unrope = self.positions.kernel_unrope(*span)
            else:
                keys = self.rope.unturn(keys, self.positions.tables(*span))
        self.packed.append(keys, values, kernels, unrope)

    def _kept(self) -> int:
        """Tokens that are here: all but the dropped ones."""
        return self.packed.length + (0 if self.window is None else self.window.tokens)

    def get_seq_length(self) -> int:
        return self.dropped + self._kept()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._kept() + query_length, self.dropped

    def get_max_length(self) -> int:
        return -1 if self.sliding_window is None else self.sliding_window

    def reset(self) -> None:
        self._clear()
        self.record_past = False

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

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.select_rows(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.select_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            rows = torch.arange(self._shape[0], dtype=torch.int64, device=self.device)
            self.select_rows(rows.repeat_interleave(repeats))

    def tensors(self, kind: str) -> Iterator[torch.Tensor]:
        """Every tensor held for ``kind``, ``"keys"`` or ``"values"``; the sinks' indices count with the keys."""
        yield from self.packed.keys if kind == "keys" else self.packed.values
        for held in (self._record, self.window, self.sinks):
            if held is not None:
                yield from held.tensors(kind)

    def offload(self) -> None:
        self._move("cpu")

    def prefetch(self) -> None:
        if self.is_initialized:
            self._move(self.device)

    @storing
    def _move(self, device: torch.device | str) -> None:
        self._record = None
        self.packed.move(device)
        self.window = None if self.window is None else self.window.to(device)
        self.sinks = None if self.sinks is None else self.sinks.to(device)
