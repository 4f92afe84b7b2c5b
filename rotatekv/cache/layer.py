"""One layer of the cache, as transformers calls it: it packs new tokens, and attends to all by a fused kernel."""

from __future__ import annotations

from types import ModuleType

import torch
from transformers.cache_utils import CacheLayerMixin

from rotatekv.cache.fused_call import FusedCall, exact_tokens
from rotatekv.cache.modes import storing, without_autocast
from rotatekv.cache.record import MOST_CROPPED, Record, SinkCandidates
from rotatekv.cache.sinks import ChosenSinks, FirstCallSinks, MassiveTokens, Sinks, choose_sinks, with_massive
from rotatekv.cache.tokens import Before, StoredTokens
from rotatekv.cache.window import FlushedTokens, Window
from rotatekv.kernels.backend import kernels_on, queries_for


class RotateKVLayer(StoredTokens, CacheLayerMixin):
    """One layer's keys and values, in a transformers cache; ``StoredTokens`` says what it holds."""

    is_croppable = True

    @property
    def is_sliding(self) -> bool:
        return self.sliding_window is not None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        # Sinks, and windows not in 8 bits, take 16 whatever the model's dtype.
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

    def can_attend(self, kernels: ModuleType | None, call: FusedCall) -> bool:
        """Whether ``attend`` is right for the tokens just written: the method has a kernel, codes are packed, all
        queries have one window, and a frame of keys starts where the kernel thinks it does."""
        if self.flushed is not None or self.method.fused_decode is None or not self.packed.are_read_by(kernels):
            return False
        if self.method.key_frames is not None and call.is_padded:  # a frame may start with padding, at any position
            return False
        return self.rope is None or self.rope.is_half_split

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
        kernels, fused = call.kernels(device), self.method.fused_decode
        assert kernels is not None and fused is not None  # ``can_attend`` has said so
        if self.rope is not None:
            rope = self.rope.model.kernel_tables(self.rope.kind, call.length, device)
        output = kernels.decode_attention(
            queries_for(kernels, query),
            self.packed.keys.tensors,
            self.packed.values.tensors,
            fused.group_of_channel(device),
            *call.rows(self.dropped, device),
            self.packed.length,
            self._kept(),
            fused.options(scaling, rope, device, self.sliding_window or 0),
            exact_tokens(self.sinks, self.window, self.packed.length),
            self.dropped,
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
        new = Window.of(keys, values, is_massive, self._window_form if policy.keeps_tokens else None)
        flushed, self.window = policy.flush(self.window, new)
        if flushed.is_massive is not None and flushed.tokens:
            self.sinks = with_massive(self.sinks, flushed, flushed.is_massive, policy.packed, self.storage_dtype)
        if self.record_past:
            self._record = Record.of(policy, flushed, self.window, candidates)
        self.flushed = None
        if flushed.tokens:
            old_keys, old_values = flushed.keys, flushed.values
            self._pack(old_keys, old_values, kernels)
            self.flushed = FlushedTokens(policy, old_keys, old_values) if differ else None

    def _store_sinks(self, chosen: FirstCallSinks, keys: torch.Tensor, values: torch.Tensor) -> SinkCandidates | None:
        """Keep the first call's sinks; the candidates for a shorter call's where they are known."""
        self.sinks = Sinks.of(chosen.batch_index, chosen.token_index, keys, values, self.storage_dtype)
        if chosen.until is None:
            return None
        candidates = SinkCandidates.of(chosen.until, self.sinks, keys.shape[2])
        self.sinks = candidates.of_first(keys.shape[2])
        return candidates

    def _pack(self, keys: torch.Tensor, values: torch.Tensor, kernels: ModuleType | None) -> None:
        """Quantize (B, H_kv, T, D) tokens that follow the packed ones."""
        unrope: tuple[torch.Tensor, ...] | None = None
        first = self.dropped + self.packed.length
        last, half_split = first + keys.shape[2], self.rope is None or self.rope.is_half_split
        by_kernel = kernels is not None and self.packed.keys.is_written_by_kernels and half_split
        if self.method.key_frames is not None:
            kernels = kernels if by_kernel else None
            if not by_kernel:
                keys = self.method.key_frames.enter(keys, self.rope, self.positions, first)
            elif self.rope is not None:
                unrope = self.positions.kernel_turns(self.rope, first, last, self.method.key_frames.size, keys.device)
        elif self.rope is not None:
            span = self.rope, first, last, self.dtype, keys.device
            if by_kernel:
                unrope = self.positions.kernel_unrope(*span)
            else:
                keys = self.rope.unturn(keys, self.positions.tables(*span))
        self.packed.append(keys, values, kernels, unrope)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._kept() + query_length, self.dropped

    def get_max_length(self) -> int:
        return -1 if self.sliding_window is None else self.sliding_window

    def reset(self) -> None:
        self._clear()
        self.record_past = False

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.select_rows(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.select_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            rows = torch.arange(self._shape[0], dtype=torch.int64, device=self.device)
            self.select_rows(rows.repeat_interleave(repeats))

    def offload(self) -> None:
        self._move("cpu")

    def prefetch(self) -> None:
        if self.is_initialized:
            self._move(self.device)
