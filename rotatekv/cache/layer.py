"""One layer of the cache: packed codes, and nothing in 16 bits but the attention sinks and the recent window."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType

import torch
from transformers.cache_utils import CacheLayerMixin

from rotatekv.cache.cropping import MOST_CROPPED, SINKS, Croppable, RecentTokens, storing, without_autocast
from rotatekv.cache.fused_call import FusedCall
from rotatekv.cache.window import FlushedTokens, RecentWindow
from rotatekv.kernels.backend import kernels_on
from rotatekv.kernels.decode_attention import ExactTokens
from rotatekv.methods import KVMethod
from rotatekv.methods.formats import BlockFormat
from rotatekv.methods.stores import CodeStore, Encoded, Store
from rotatekv.rope import LayerRope, Positions

_BESIDE = ("window_keys", "window_values", "window_massive", *SINKS)  # the tensors beside the packed stores


class RotateKVLayer(Croppable, CacheLayerMixin):
    """One layer's keys and values: packed codes, then the recent window, with the sinks beside them.

    Tensors, each cut and joined along B and T by the cache's operations:
        packed_keys, packed_values: the stores of what the method's ``encode_*`` made of the first tokens.
        window_keys, window_values: the last ``residual_length`` tokens in 16 bits, (B, H_kv, T_window, D), and up to
            ``tokens_per_flush`` − 1 before them: tokens are packed in whole groups, counted from the first one.
        sink_rows, sink_columns: (S,) int32, the sequence and the token of each attention sink.
        window_massive: (B, T_window) bool, the window's tokens that will be sinks; None unless ``set_massive`` says.
        sink_keys, sink_values: (S, H_kv, D) in 16 bits; they replace the decoded tokens.
    Windows and sinks are as attention sees them: keys after RoPE, values not rotated.

    Args:
        rope: how the model turns this layer's keys; None: it does not.
        positions: of all tokens, shared by a cache's layers.
        sliding_window: a query sees that many tokens, its own included; those before are dropped in whole blocks. All
            tokens are counted from the first that is kept, ``dropped``. None: all tokens are seen.
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
        self.packed_keys, self.packed_values = self.method.key_store(), self.method.value_store()
        self.window_keys = self.window_values = self.window_massive = self._new_massive = None
        self.sink_rows = self.sink_columns = self.sink_keys = self.sink_values = None
        self._sinks_in_window = True  # maybe; once none is there, only a crop brings one back
        self._sinks_until = self._recent = self._spare = self.flushed = None
        self.dropped = 0
        self.is_initialized = False
        self._before: tuple[int, dict[str, torch.Tensor | None]] | None = None

    def end_call(self, failed: bool = False) -> None:
        """The running call is done; ``failed``: take back what it has stored here."""
        if failed and self._before is not None:
            self._take_back(*self._before)
        elif not failed and self.sliding_window is not None:
            self._drop_unseen()
        if self.sink_keys is None:
            self.sink_rows = self.sink_columns = None  # named, not stored
        self._before = self._new_massive = self.flushed = None  # last: an interrupt before it, and all is done again

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

    def set_sinks(self, rows: torch.Tensor, columns: torch.Tensor, until: torch.Tensor | None = None) -> None:
        """Name the tokens of the coming first update that stay unquantized; (S,) int32 each.

        Args:
            until: with some that are not sinks of all its tokens: see ``SpareSinks``.
        """
        self.sink_rows, self.sink_columns, self._sinks_until = rows, columns, until

    def set_massive(self, is_massive: torch.Tensor) -> None:
        """Name those of the coming update's tokens, (B, T) bool, that become sinks when they are packed."""
        self._new_massive = is_massive

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store T new tokens and return all that are kept as attention sees them, their own quantization included.

        Args:
            key_states: (B, H_kv, T, D), after RoPE, their positions the last T of ``positions``.
            value_states: (B, H_kv, T, D).

        Returns:
            post-RoPE keys and values, (B, H_kv, T_kept, D), in the dtype of the inputs.
        """
        self.write(key_states, value_states, kernels_on(key_states.device))
        return self.read()

    def write(self, key_states: torch.Tensor, value_states: torch.Tensor, kernels: ModuleType | None = None) -> None:
        """Store T new tokens, (B, H_kv, T, D) each, as ``update`` takes them; ``flushed`` are then those this call has
        packed that some of its own queries still see in their recent window, None where there are none."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.dtype = key_states.dtype  # the model's, which may be another one by now
        self._write(key_states, value_states, kernels)

    @storing
    @without_autocast
    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All tokens that are kept as attention sees them, (B, H_kv, T, D) each, in the model's dtype."""
        kernels, method = kernels_on(self.packed_keys.device or self.device), self.method
        keys = self._decode(self.packed_keys, kernels, method.key_format, method.decode_keys, method.keys_out)
        values = self._decode(self.packed_values, kernels, method.value_format, method.decode_values, method.values_out)
        if self.rope is not None:
            span = self.dropped, self.get_seq_length()
            keys = self.rope.turn(keys, self.positions.tables(self.rope, *span, self.dtype, keys.device))
        return self._with_exact(keys, "keys"), self._with_exact(values, "values")

    def _decode(
        self,
        packed: Store,
        kernels: ModuleType | None,
        form: BlockFormat | None,
        decode: Callable[[Encoded], torch.Tensor],
        to_heads: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """(B, H_kv, T, D) in the model's dtype with room for all tokens, of which the packed ones are set."""
        tokens = self._kept()
        if form is not None and isinstance(packed, CodeStore) and self._are_read_by(kernels):
            return packed.heads(form, tokens, kernels).to(self.dtype)
        if packed.length == tokens and self.sink_keys is None:
            return to_heads(decode(packed.tokens())).to(self.dtype)
        batch, heads, dim = self._shape
        room = torch.empty(batch, heads, tokens, dim, dtype=self.dtype, device=self.device)
        if packed.length:
            room[:, :, : packed.length] = to_heads(decode(packed.tokens()))
        return room

    def _with_exact(self, heads: torch.Tensor, kind: str) -> torch.Tensor:
        """The window's and the sinks' own in place of what the packed ones decode to."""
        window, sinks = getattr(self, f"window_{kind}"), getattr(self, f"sink_{kind}")
        if window is not None:
            heads[:, :, self.packed_keys.length :] = window
        if sinks is not None:
            heads[self.sink_rows.long(), :, self.sink_columns.long()] = sinks.to(heads.dtype)
        return heads

    def _window(self, packed: int | None = None) -> RecentWindow:
        packed = self.packed_keys.length if packed is None else packed
        return RecentWindow(self.method.config.residual_length, self.method.tokens_per_flush, packed)

    def can_attend(self, kernels: ModuleType | None) -> bool:
        """Whether ``attend`` is right for the tokens just written: the method has a kernel, codes are packed, all
        queries have one window."""
        turns = self.rope is None or self.rope.is_half_split
        return self.flushed is None and turns and self.method.fused_decode is not None and self._are_read_by(kernels)

    def _are_read_by(self, kernels: ModuleType | None) -> bool:
        if kernels is None or not self.packed_keys.length:
            return False
        key_format = self.method.key_format
        return kernels.READS_TOKEN_GROUPS or key_format is None or not key_format.tokens_per_scale

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
            self.packed_keys.tensors,
            self.packed_values.tensors,
            self.method.key_format.groups_on(device),
            *call.rows(self.dropped, device),
            self.packed_keys.length,
            self._kept(),
            self.method.fused_decode.options(scaling, rope, device, self.sliding_window or 0),
            self._exact_tokens(),
        )
        return output.to(query.dtype)

    def _exact_tokens(self) -> ExactTokens | None:
        """Sinks and recent window, sorted by sequence."""
        parts = []
        if self.sink_keys is not None:
            sinks = (self.sink_rows, self.sink_columns, self.sink_keys, self.sink_values)
            if self.window_keys is not None and self._sinks_in_window:  # a sink in the window is exact already
                packed = self.sink_columns < self.packed_keys.length
                self._sinks_in_window = not bool(packed.all())
                sinks = tuple(tensor[packed] for tensor in sinks)
            parts.append(sinks)
        if self.window_keys is not None and self.window_keys.shape[2]:
            batch, _, tokens, _ = self.window_keys.shape
            counted = {"dtype": torch.int32, "device": self.window_keys.device}
            columns = torch.arange(self.packed_keys.length, self._kept(), **counted)
            rows = torch.zeros(tokens, **counted)
            if batch > 1:
                rows, columns = torch.arange(batch, **counted).repeat_interleave(tokens), columns.repeat(batch)
            heads = (x.transpose(1, 2).flatten(0, 1) for x in (self.window_keys, self.window_values))
            parts.append((rows, columns, *heads))  # (B·T_window, H_kv, D)
        if len(parts) < 2:
            return ExactTokens(*(x.contiguous() for x in parts[0])) if parts else None
        rows, columns, keys, values = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        if self.window_keys.shape[0] > 1:
            order = torch.argsort(rows, stable=True)
            rows, columns, keys, values = rows[order], columns[order], keys[order], values[order]
        return ExactTokens(rows, columns, keys, values)

    @storing
    @without_autocast
    def _write(self, keys: torch.Tensor, values: torch.Tensor, kernels: ModuleType | None) -> None:
        window = self._window()
        exact = not self.get_seq_length() and not self.method.config.quantize_prefill  # its queries see no window
        differ = not exact and window.differs(self._kept(), keys.shape[2])
        self._before = self.packed_keys.length, {name: getattr(self, name) for name in _BESIDE}
        self._recent = self._spare = None
        self._shape = keys.shape[0], keys.shape[1], keys.shape[3]
        if self.sink_rows is not None and self.sink_keys is None:
            self.sink_rows, self.sink_columns = self.sink_rows.to(keys.device), self.sink_columns.to(keys.device)
            where = self.sink_rows.long(), slice(None), self.sink_columns.long()
            self.sink_keys, self.sink_values = self._to_storage(keys[where]), self._to_storage(values[where])
            if self._sinks_until is not None:
                self._put_aside_spare_sinks(self._sinks_until.to(keys.device), keys.shape[2])
        start = self.packed_keys.length
        if window.keeps_tokens:
            keys, values = self._to_storage(keys), self._to_storage(values)
            keys, self.window_keys = self._split_window(self.window_keys, keys, 2)
            values, self.window_values = self._split_window(self.window_values, values, 2)
        if self._new_massive is not None:
            massive, self.window_massive = self._split_window(self.window_massive, self._new_massive.to(keys.device), 1)
            self._new_massive = None
            if massive.shape[1]:
                self._add_sinks(massive, keys, values)
        if self.record_past and window.keeps_tokens and keys.shape[2]:
            first = window.packed_of(start + self._window_tokens() + keys.shape[2] - MOST_CROPPED)
            recent = (x[:, :, first - start :].clone() for x in (keys, values))
            self._recent = RecentTokens(first, *recent)
        if keys.shape[2]:
            self._pack(keys, values, kernels)
        self.flushed = FlushedTokens(window, *(x.to(self.dtype) for x in (keys, values))) if differ else None

    def _pack(self, keys: torch.Tensor, values: torch.Tensor, kernels: ModuleType | None) -> None:
        """Quantize (B, H_kv, T, D) tokens that follow the packed ones."""
        method, start, unrope = self.method, self.packed_keys.length, None
        if self.rope is not None:
            first = self.dropped + start
            span = self.rope, first, first + keys.shape[2], self.dtype, keys.device
            if kernels is not None and self.packed_keys.is_written_by_kernels and self.rope.is_half_split:
                unrope = self.positions.kernel_unrope(*span)
            else:
                keys = self.rope.unturn(keys, self.positions.tables(*span))
        self.packed_keys.add(keys, lambda x: method.encode_keys(method.keys_in(x)), kernels, method.key_format, unrope)
        self.packed_values.add(
            values, lambda x: method.encode_values(method.values_in(x)), kernels, method.value_format
        )

    def _add_sinks(self, massive: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Make sinks of the ``massive`` (B, T) tokens about to be packed; keys, values (B, H_kv, T, D)."""
        rows, columns = massive.nonzero(as_tuple=True)
        if not len(rows):
            return
        new = {
            "sink_rows": rows.int(),
            "sink_columns": (columns + self.packed_keys.length).int(),
            "sink_keys": self._to_storage(keys[rows, :, columns]),
            "sink_values": self._to_storage(values[rows, :, columns]),
        }
        if self.sink_rows is not None:
            new = {name: torch.cat([getattr(self, name), x]) for name, x in new.items()}
            order = torch.argsort(new["sink_rows"], stable=True)  # rows ascend
            new = {name: x[order] for name, x in new.items()}
        for name, x in new.items():
            setattr(self, name, x)

    def _split_window(
        self, window: torch.Tensor | None, new: torch.Tensor, dim: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The tokens to quantize now, and those that stay in the recent window; tokens along ``dim``."""
        if not self._window().keeps_tokens:
            return new, None
        recent = new if window is None else torch.cat([window, new], dim=dim)
        packed = self.packed_keys.length
        cut = self._window().packed_of(packed + recent.shape[dim]) - packed
        if not cut and window is not None:
            return recent.narrow(dim, 0, 0), recent
        return recent.narrow(dim, 0, cut), recent.narrow(dim, cut, recent.shape[dim] - cut).clone()

    def _to_storage(self, x: torch.Tensor) -> torch.Tensor:
        limit = torch.finfo(self.storage_dtype).max
        return x.clamp(-limit, limit).to(self.storage_dtype)

    def _kept(self) -> int:
        """Tokens that are here: all but the dropped ones."""
        return self.packed_keys.length + self._window_tokens()

    def _window_tokens(self) -> int:
        return 0 if self.window_keys is None else self.window_keys.shape[2]

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
        self._recent, self._spare, rows = None, None, rows.to(self.device)
        self.packed_keys.select_rows(rows)
        self.packed_values.select_rows(rows)
        self._shape = len(rows), *self._shape[1:]
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
