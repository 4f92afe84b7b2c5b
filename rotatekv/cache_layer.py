"""One layer of the cache: packed codes, and nothing in 16 bits but the attention sinks and the recent window."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType

import torch
from transformers.cache_utils import CacheLayerMixin

from rotatekv.cropping import MOST_CROPPED, Croppable, RecentTokens, storing
from rotatekv.decode import FusedCall
from rotatekv.kernels import Packed
from rotatekv.kernels.backend import kernels_on
from rotatekv.kernels.reference_attention import ExactTokens
from rotatekv.methods import KVMethod
from rotatekv.stores import CodeStore, HeadForm, Store
from rotatekv.window import FlushedTokens, RecentWindow

_BESIDE = (  # the tensors beside the packed stores
    "window_keys", "window_values", "window_massive", "sink_rows", "sink_columns", "sink_keys", "sink_values",
)  # fmt: skip


def rope_from(rope: Callable, cos: torch.Tensor, sin: torch.Tensor) -> Callable[[torch.Tensor, int], torch.Tensor]:
    """What ``RotateKVLayer.update`` takes: a family's ``rope(x, cos, sin)`` with tables of all tokens, cut to x's."""

    def turn(x: torch.Tensor, start: int) -> torch.Tensor:
        tokens = slice(start, start + x.shape[2])
        return rope(x, cos[:, tokens], sin[:, tokens])

    return turn


class RotateKVLayer(Croppable, CacheLayerMixin):
    """One layer's keys and values: packed codes, then the recent window, with the sinks beside them.

    Tensors, each cut and joined along B and T by the cache's operations:
        packed_keys, packed_values: the stores of what the method's ``encode_*`` made of the first tokens.
        window_keys, window_values: the last ``residual_length`` tokens in 16 bits, (B, T_window, H_kv·D), and up to
            ``tokens_per_flush`` − 1 before them: tokens are packed in whole groups, counted from the first one.
        sink_rows, sink_columns: (S,) int32, the sequence and the token of each attention sink.
        window_massive: (B, T_window) bool, the window's tokens that will be sinks; None unless ``set_massive`` says.
        sink_keys, sink_values: (S, H_kv·D) in 16 bits, in the stores' order; they replace the decoded tokens.
    """

    is_croppable = True
    is_sliding = False

    def __init__(self, method: KVMethod):  # the base class's own would set keys and values
        self.method = method
        self._clear()

    def _clear(self) -> None:
        self.packed_keys, self.packed_values = self.method.key_store(), self.method.value_store()
        self.window_keys = self.window_values = self.window_massive = self._new_massive = None
        self.sink_rows = self.sink_columns = self.sink_keys = self.sink_values = None
        self._sinks_in_window = True  # maybe; once none is there, only a crop brings one back
        self._before: tuple[int, dict[str, torch.Tensor | None]] | None = None
        self._sinks_until = self._recent = self._spare = None
        self.is_initialized = False

    def end_call(self, failed: bool = False) -> None:
        """The running call is done; ``failed``: take back what it has stored here."""
        before, self._before, self._new_massive = self._before, None, None
        if self.sink_keys is None:
            self.sink_rows = self.sink_columns = None  # named, not stored
        if before is not None and failed:
            self._take_back(*before)

    @storing
    def _take_back(self, packed: int, beside: dict[str, torch.Tensor | None]) -> None:
        if not packed and beside["window_keys"] is None:
            return self._clear()
        self._keep_packed(packed)
        for name, tensor in beside.items():
            setattr(self, name, tensor)
        self._recent, self._spare, self._sinks_in_window = None, None, True

    @property
    def keys(self) -> torch.Tensor | None:
        """(B, H_kv, T, D), decoded at each call, in the model's dtype: after RoPE, but for a method that quantizes keys
        before it (``keys_before_rope``); None: there are none."""
        return self._decoded(0)

    @property
    def values(self) -> torch.Tensor | None:
        """(B, H_kv, T, D), decoded at each call, in the model's dtype (folded weights: still rotated)."""
        return self._decoded(1)

    def _decoded(self, which: int) -> torch.Tensor | None:
        return self._read(None)[which].to(self.dtype) if self.get_seq_length() else None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        # Sinks and windows take 16 bits whatever the model's dtype.
        self.storage_dtype = torch.bfloat16 if self.dtype == torch.bfloat16 else torch.float16
        self.is_initialized = True

    def set_sinks(self, rows: torch.Tensor, columns: torch.Tensor, until: torch.Tensor | None = None) -> None:
        """Name the tokens of the coming first update that stay unquantized; (S,) int32 each.

        Args:
            until: with some that are not sinks of all its tokens: see ``SpareSinks``.
        """
        self.sink_rows, self.sink_columns, self._sinks_until = rows, columns, until

    def set_massive(self, is_massive: torch.Tensor) -> None:
        """Name those of the coming update's tokens, (B, T) bool, that become sinks when they are packed."""
        self._new_massive = is_massive

    @storing
    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        rope: Callable[[torch.Tensor, int], torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, FlushedTokens | None]:
        """Store T new tokens and return all of them as attention is to see them, their own quantization included.

        Args:
            key_states: (B, H_kv, T, D), before RoPE (folded weights: already rotated).
            value_states: (B, H_kv, T, D).
            rope: ``rope(keys, start)`` applies RoPE to consecutive keys, those of the tokens from ``start`` on.

        Returns:
            post-RoPE keys and values, (B, H_kv, T_cached, D), in the dtype of the inputs, and the tokens this call has
            packed that some of its own queries still see in their recent window; None: there are none.
        """
        if rope is None:
            raise RuntimeError("a RotateKVCache only works in a model patched with patch_model(model, ...)")
        # Autocast would round the rotations to its dtype, and cannot join float16 scales.
        with torch.autocast(key_states.device.type, enabled=False):
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            self.dtype = key_states.dtype  # the model's, which may be another one by now
            keys, values = key_states.detach(), value_states.detach()
            kernels, window, length = kernels_on(keys.device), self._window(), self.get_seq_length()
            windows_differ = window.differs(length, keys.shape[2])
            flushed = self._write(keys if self.method.keys_before_rope else rope(keys, length), values, kernels)
            read = self._as_attended(*self._read(kernels), rope, 0)
            if not windows_differ:
                return *read, None
            keys, values = flushed  # (B, T_flushed, H_kv·D)
            heads = self.method.keys_out(keys.float()), self.method.values_out(values.float())
            return *read, FlushedTokens(window, *self._as_attended(*heads, rope, window.packed))

    def _as_attended(self, keys: torch.Tensor, values: torch.Tensor, rope, start: int) -> tuple[torch.Tensor, ...]:
        """Heads of the tokens from ``start`` on, as they were written → post-RoPE, in the dtype of the model."""
        keys, values = keys.to(self.dtype), values.to(self.dtype)
        return (rope(keys, start) if self.method.keys_before_rope else keys), values

    def _window(self, packed: int | None = None) -> RecentWindow:
        packed = self.packed_keys.length if packed is None else packed
        return RecentWindow(self.method.config.residual_length, self.method.tokens_per_flush, packed)

    def can_attend(self, kernels: ModuleType | None, new_tokens: int) -> bool:
        """Whether ``attend`` is right: the method has a kernel, codes are packed, all queries have one window."""
        one_window = not self._window().differs(self.get_seq_length(), new_tokens)
        return one_window and self.method.can_fuse and self._are_read_by(kernels)

    def _are_read_by(self, kernels: ModuleType | None) -> bool:
        if kernels is None or not self.packed_keys.length:
            return False
        return kernels.READS_TOKEN_GROUPS or not self.method.key_tokens_per_scale

    @storing
    def attend(
        self,
        query: torch.Tensor,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        scaling: float,
        rope_new: Callable[[torch.Tensor], torch.Tensor],
        call: FusedCall,
    ) -> torch.Tensor:
        """Store T new tokens and attend to all of them in one kernel; what ``update`` and attention give together.

        Args:
            query: (B, H, T, D), before RoPE. key_states, value_states: as in ``update``.
            scaling: factor on the scores.

        Returns:
            (B, H, T, D) in the dtype of the inputs; folded weights: still in the values' rotated space.
        """
        with torch.autocast(key_states.device.type, enabled=False):
            device = query.device
            kernels = call.kernels(device)
            if not self.method.keys_before_rope:  # otherwise the kernel turns queries and keys
                query, key_states = rope_new(query), rope_new(key_states)
            self._write(key_states, value_states, kernels)
            output = kernels.decode_attention(
                query.float().contiguous(),
                self.packed_keys.tensors,
                self.packed_values.tensors,
                self.method.key_form.groups_on(device),
                call.first.to(device),
                self.packed_keys.length,
                self.get_seq_length(),
                self.method.decode_options(scaling, call.rope(device), device),
                self._exact_tokens(),
            )
            return output.to(query.dtype)

    def _exact_tokens(self) -> ExactTokens | None:
        """Sinks and recent window, sorted by sequence, their keys in the order the blocks have."""
        parts = []
        if self.sink_keys is not None:
            sinks = (self.sink_rows, self.sink_columns, self.sink_keys, self.sink_values)
            if self.window_keys is not None and self._sinks_in_window:  # a sink in the window is exact already
                packed = self.sink_columns < self.packed_keys.length
                self._sinks_in_window = not bool(packed.all())
                sinks = tuple(tensor[packed] for tensor in sinks)
            parts.append(sinks)
        if self.window_keys is not None and self.window_keys.shape[1]:
            batch, tokens = self.window_keys.shape[:2]
            counted = {"dtype": torch.int32, "device": self.window_keys.device}
            columns = torch.arange(self.packed_keys.length, self.get_seq_length(), **counted)
            rows = torch.zeros(tokens, **counted)
            if batch > 1:
                rows, columns = torch.arange(batch, **counted).repeat_interleave(tokens), columns.repeat(batch)
            keys, values = self.window_keys.flatten(0, 1), self.window_values.flatten(0, 1)  # (B·T_window, H_kv·D)
            parts.append((rows, columns, self.packed_keys.to_stored_order(keys), values))
        if len(parts) < 2:
            return ExactTokens(*parts[0]) if parts else None
        rows, columns, keys, values = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        if self.window_keys.shape[0] > 1:
            order = torch.argsort(rows, stable=True)
            rows, columns, keys, values = rows[order], columns[order], keys[order], values[order]
        return ExactTokens(rows, columns, keys, values)

    def _write(
        self, keys: torch.Tensor, values: torch.Tensor, kernels: ModuleType | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store T new tokens; what was packed by that, (B, T_flushed, H_kv·D) before it was."""
        self._before = self.packed_keys.length, {name: getattr(self, name) for name in _BESIDE}
        self._recent = self._spare = None
        keys, values = self.method.keys_in(keys), self.method.values_in(values)  # (B, T, H_kv·D)
        if self.sink_rows is not None and self.sink_keys is None:
            self.sink_rows, self.sink_columns = self.sink_rows.to(keys.device), self.sink_columns.to(keys.device)
            where = (self.sink_rows.long(), self.sink_columns.long())
            self.sink_keys = self.packed_keys.to_stored_order(self._to_storage(keys[where]))
            self.sink_values = self.packed_values.to_stored_order(self._to_storage(values[where]))
            if self._sinks_until is not None:
                self._put_aside_spare_sinks(self._sinks_until.to(keys.device), keys.shape[1])
        start = self.packed_keys.length
        if self._window().keeps_tokens:
            keys, values = self._to_storage(keys), self._to_storage(values)
        keys, self.window_keys = self._split_window(self.window_keys, keys)
        values, self.window_values = self._split_window(self.window_values, values)
        if self._new_massive is not None:
            massive, self.window_massive = self._split_window(self.window_massive, self._new_massive.to(keys.device))
            self._new_massive = None
            if massive.shape[1]:
                self._add_sinks(massive, keys, values)
        if self.record_past and self._window().keeps_tokens and keys.shape[1]:
            first = self._window().packed_of(self.get_seq_length() + keys.shape[1] - MOST_CROPPED)
            self._recent = RecentTokens(first, keys[:, first - start :].clone(), values[:, first - start :].clone())
        if keys.shape[1]:
            self.packed_keys.add(keys, self.method.encode_keys, kernels)
            self.packed_values.add(values, self.method.encode_values, kernels)
        return keys, values

    def _add_sinks(self, massive: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Make sinks of the ``massive`` (B, T_packed) tokens about to be packed; keys, values (B, T_packed, H_kv·D)."""
        rows, columns = massive.nonzero(as_tuple=True)
        if not len(rows):
            return
        new = {
            "sink_rows": rows.int(), "sink_columns": (columns + self.packed_keys.length).int(),
            "sink_keys": self.packed_keys.to_stored_order(self._to_storage(keys[rows, columns])),
            "sink_values": self.packed_values.to_stored_order(self._to_storage(values[rows, columns])),
        }  # fmt: skip
        if self.sink_rows is not None:
            new = {name: torch.cat([getattr(self, name), x]) for name, x in new.items()}
            order = torch.argsort(new["sink_rows"], stable=True)  # rows ascend
            new = {name: x[order] for name, x in new.items()}
        for name, x in new.items():
            setattr(self, name, x)

    def _split_window(self, window: torch.Tensor | None, new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The tokens to quantize now, and those that stay in the recent window; (B, ·, ...) each."""
        if not self._window().keeps_tokens:
            return new, None
        recent = new if window is None else torch.cat([window, new], dim=1)
        packed = self.packed_keys.length
        cut = self._window().packed_of(packed + recent.shape[1]) - packed
        return recent[:, :cut], recent[:, cut:].clone() if cut or window is None else recent

    def _read(self, kernels: ModuleType | None) -> tuple[torch.Tensor, torch.Tensor]:
        method, key_form, value_form = self.method, self.method.key_form, self.method.value_form
        if key_form and value_form and self._are_read_by(kernels):
            keys = (self.packed_keys, self.window_keys, self.sink_keys, key_form, method.keys_out)
            values = (self.packed_values, self.window_values, self.sink_values, value_form, method.values_out)
            return self._read_blocks(kernels, *keys), self._read_blocks(kernels, *values)  # (B, H_kv, T, D)
        keys = self._restore(self.packed_keys, self.window_keys, self.sink_keys, self.method.decode_keys)
        values = self._restore(self.packed_values, self.window_values, self.sink_values, self.method.decode_values)
        return self.method.keys_out(keys), self.method.values_out(values)  # (B, H_kv, T, D)

    def _read_blocks(
        self, kernels: ModuleType, packed: CodeStore, window, sinks, form: HeadForm,
        to_heads: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:  # fmt: skip
        """What ``_restore`` and ``to_heads`` give, with the packed tokens straight from a kernel."""
        heads = packed.heads(form, self.get_seq_length(), kernels)  # (B, H_kv, T, D)
        if window is not None:
            heads[:, :, packed.length :] = to_heads(window.float())
        if sinks is not None:
            of_sinks = to_heads(packed.from_stored_order(sinks).float().unsqueeze(0))[0].transpose(0, 1)  # (S, H_kv, D)
            heads[self.sink_rows.long(), :, self.sink_columns.long()] = of_sinks
        return heads

    def _restore(self, packed: Store, window, sinks, decode: Callable[[Packed], torch.Tensor]) -> torch.Tensor:
        parts = [decode(packed.tokens())] if packed.length else []
        if window is not None:
            parts.append(window.to(parts[0].dtype) if parts else window.float())
        channels = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]  # (B, T, H_kv·D)
        if sinks is not None:
            exact = packed.from_stored_order(sinks).to(channels.dtype)
            channels[self.sink_rows.long(), self.sink_columns.long()] = exact
        return channels

    def _to_storage(self, x: torch.Tensor) -> torch.Tensor:
        limit = torch.finfo(self.storage_dtype).max
        return x.clamp(-limit, limit).to(self.storage_dtype)

    def get_seq_length(self) -> int:
        return self.packed_keys.length + (0 if self.window_keys is None else self.window_keys.shape[1])

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self._clear()
        self.record_past = False

    @storing
    def select_rows(self, rows: torch.Tensor) -> None:
        """Make row ``i`` of the batch what row ``rows[i]`` was: packed codes move, nothing is quantized again."""
        if not self.is_initialized:
            return
        self._recent, self._spare, rows = None, None, rows.to(self.device)
        self.packed_keys.select_rows(rows)
        self.packed_values.select_rows(rows)
        if self.window_keys is not None:
            self.window_keys = self.window_keys.index_select(0, rows)
            self.window_values = self.window_values.index_select(0, rows)
        if self.window_massive is not None:
            self.window_massive = self.window_massive.index_select(0, rows)
        if self.sink_keys is not None:
            new_rows, source = (rows.unsqueeze(1) == self.sink_rows.unsqueeze(0)).nonzero(as_tuple=True)
            self._keep_sinks(new_rows.int(), source, renamed=True)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.select_rows(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.select_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            rows = next(self.tensors("keys")).shape[0]
            self.select_rows(torch.arange(rows, dtype=torch.int64, device=self.device).repeat_interleave(repeats))

    def tensors(self, kind: str) -> Iterator[torch.Tensor]:
        """Every tensor held for ``kind``, ``"keys"`` or ``"values"``; the sinks' indices count with the keys."""
        packed, names = getattr(self, f"packed_{kind}"), [f"window_{kind}", f"sink_{kind}"]
        yield from packed
        for kept in (self._recent, self._spare):
            if kept is not None:
                yield getattr(kept, kind)
        if self._spare is not None and kind == "keys":
            yield from (self._spare.rows, self._spare.columns, self._spare.until)
        for name in names + (["sink_rows", "sink_columns", "window_massive"] if kind == "keys" else []):
            if (tensor := getattr(self, name)) is not None:
                yield tensor

    def offload(self) -> None:
        self._move("cpu")

    def prefetch(self) -> None:
        if self.is_initialized:
            self._move(self.device)

    @storing
    def _move(self, device: torch.device | str) -> None:
        self._recent = self._spare = None
        self.packed_keys.move(device)
        self.packed_values.move(device)
        for name in _BESIDE:
            if (tensor := getattr(self, name)) is not None:
                setattr(self, name, tensor.to(device, non_blocking=True))
