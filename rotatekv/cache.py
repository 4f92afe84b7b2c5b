"""RotateKVCache: a transformers cache whose layers hold packed codes, and nothing in full precision but the sinks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from rotatekv.config import QuantConfig
from rotatekv.methods import KVMethod

Packed = dict[str, torch.Tensor]


class RotateKVLayer(CacheLayerMixin):
    """One layer's keys and values: packed codes, then the recent window, with the sinks beside them.

    Tensors, each cut and joined along B and T by the cache's operations:
        packed_keys, packed_values: what the method's ``encode_*`` made of the first tokens, (B, T_packed, ...) each.
        window_keys, window_values: the last ``residual_length`` tokens in 16 bits, (B, T_window, H_kv·D).
        sink_rows, sink_columns: (S,) int32, the sequence and the token of each attention sink.
        sink_keys, sink_values: (S, H_kv·D) in 16 bits; they replace the decoded tokens.
    """

    is_croppable = True
    is_sliding = False

    def __init__(self, method: KVMethod):
        super().__init__()
        self.method = method
        self._clear()

    def _clear(self) -> None:
        self.packed_keys: Packed = {}
        self.packed_values: Packed = {}
        self.window_keys = self.window_values = None
        self.sink_rows = self.sink_columns = self.sink_keys = self.sink_values = None
        self.is_initialized = False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        # Sinks and windows take 16 bits whatever the model's dtype.
        self.storage_dtype = torch.bfloat16 if self.dtype == torch.bfloat16 else torch.float16
        self.is_initialized = True

    def set_sinks(self, rows: torch.Tensor, columns: torch.Tensor) -> None:
        """Name the tokens of the coming first update that stay unquantized; (S,) int32 each."""
        self.sink_rows, self.sink_columns = rows, columns

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        rope: Callable[[torch.Tensor], torch.Tensor] | None = None,
        rope_new: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store T new tokens and return all of them as attention is to see them, their own quantization included.

        Args:
            key_states: (B, H_kv, T, D), before RoPE (folded weights: already rotated).
            value_states: (B, H_kv, T, D).
            rope, rope_new: apply RoPE to all cached keys and to the T new keys.

        Returns:
            post-RoPE keys and values, (B, H_kv, T_cached, D), in the dtype of the inputs.
        """
        if rope is None or rope_new is None:
            raise RuntimeError("a RotateKVCache only works in a model patched with patch_model(model, ...)")
        with torch.no_grad():
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            keys, values = key_states.detach(), value_states.detach()
            self._write(keys if self.method.keys_before_rope else rope_new(keys), values)
            keys, values = self._read()
            keys = keys.to(self.dtype)
            return (rope(keys) if self.method.keys_before_rope else keys), values.to(self.dtype)

    def _write(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        keys, values = self.method.keys_in(keys), self.method.values_in(values)  # (B, T, H_kv·D)
        if self.sink_rows is not None and self.sink_keys is None:
            self.sink_rows, self.sink_columns = self.sink_rows.to(keys.device), self.sink_columns.to(keys.device)
            where = (self.sink_rows.long(), self.sink_columns.long())
            self.sink_keys, self.sink_values = self._to_storage(keys[where]), self._to_storage(values[where])
        keys, self.window_keys = self._split_window(self.window_keys, keys)
        values, self.window_values = self._split_window(self.window_values, values)
        if keys.shape[1]:
            self.packed_keys = _append(self.packed_keys, self.method.encode_keys(keys))
            self.packed_values = _append(self.packed_values, self.method.encode_values(values))

    def _split_window(self, window: torch.Tensor | None, new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The tokens to quantize now, and those that stay in the recent window; (B, ·, H_kv·D) each."""
        length = self.method.config.residual_length
        if not length:
            return new, None
        new = self._to_storage(new)
        recent = new if window is None else torch.cat([window, new], dim=1)
        cut = max(recent.shape[1] - length, 0)
        return recent[:, :cut], recent[:, cut:].clone()

    def _read(self) -> tuple[torch.Tensor, torch.Tensor]:
        keys = self._restore(self.packed_keys, self.window_keys, self.sink_keys, self.method.decode_keys)
        values = self._restore(self.packed_values, self.window_values, self.sink_values, self.method.decode_values)
        return self.method.keys_out(keys), self.method.values_out(values)  # (B, H_kv, T, D)

    def _restore(self, packed: Packed, window, sinks, decode: Callable[[Packed], torch.Tensor]) -> torch.Tensor:
        parts = [decode(packed)] if packed else []
        if window is not None:
            parts.append(window.to(parts[0].dtype) if parts else window.float())
        channels = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]  # (B, T, H_kv·D)
        if sinks is not None:
            channels[self.sink_rows.long(), self.sink_columns.long()] = sinks.to(channels.dtype)
        return channels

    def _to_storage(self, x: torch.Tensor) -> torch.Tensor:
        limit = torch.finfo(self.storage_dtype).max
        return x.clamp(-limit, limit).to(self.storage_dtype)

    def get_seq_length(self) -> int:
        packed = next(iter(self.packed_keys.values())).shape[1] if self.packed_keys else 0
        return packed + (0 if self.window_keys is None else self.window_keys.shape[1])

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self._clear()

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last ``-tokens_to_remove`` tokens; ``tokens_to_remove`` ≤ 0."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the number of tokens to remove, not {tokens_to_remove}")
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        length = self.get_seq_length() + tokens_to_remove
        if length <= 0:
            return self.reset()
        window = 0 if self.window_keys is None else self.window_keys.shape[1]
        packed = self.get_seq_length() - window
        # A clone, not a view: a view would keep the dropped tokens' bytes alive.
        if length < packed:
            self.packed_keys = {name: x[:, :length].clone() for name, x in self.packed_keys.items()}
            self.packed_values = {name: x[:, :length].clone() for name, x in self.packed_values.items()}
        if window:
            left = max(length - packed, 0)
            self.window_keys = self.window_keys[:, :left].clone()
            self.window_values = self.window_values[:, :left].clone()
        if self.sink_keys is not None:
            self._keep_sinks(self.sink_rows, (self.sink_columns < length).nonzero()[:, 0])

    def select_rows(self, rows: torch.Tensor) -> None:
        """Make row ``i`` of the batch what row ``rows[i]`` was: packed codes move, nothing is quantized again."""
        if not self.is_initialized:
            return
        rows = rows.to(self.device)
        self.packed_keys = {name: x.index_select(0, rows) for name, x in self.packed_keys.items()}
        self.packed_values = {name: x.index_select(0, rows) for name, x in self.packed_values.items()}
        if self.window_keys is not None:
            self.window_keys = self.window_keys.index_select(0, rows)
            self.window_values = self.window_values.index_select(0, rows)
        if self.sink_keys is not None:
            new_rows, source = (rows.unsqueeze(1) == self.sink_rows.unsqueeze(0)).nonzero(as_tuple=True)
            self._keep_sinks(new_rows.int(), source, renamed=True)

    def _keep_sinks(self, rows: torch.Tensor, source: torch.Tensor, renamed: bool = False) -> None:
        self.sink_rows = rows if renamed else rows[source]
        self.sink_columns = self.sink_columns[source]
        self.sink_keys, self.sink_values = self.sink_keys[source], self.sink_values[source]

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.select_rows(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.select_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            rows = next(iter((self.packed_keys or {"window": self.window_keys}).values())).shape[0]
            self.select_rows(torch.arange(rows, device=self.device).repeat_interleave(repeats))

    def tensors(self, kind: str) -> Iterator[torch.Tensor]:
        """Every tensor held for ``kind``, ``"keys"`` or ``"values"``; the sinks' indices count with the keys."""
        packed, names = getattr(self, f"packed_{kind}"), [f"window_{kind}", f"sink_{kind}"]
        yield from packed.values()
        for name in names + (["sink_rows", "sink_columns"] if kind == "keys" else []):
            if (tensor := getattr(self, name)) is not None:
                yield tensor

    def offload(self) -> None:
        self._move("cpu")

    def prefetch(self) -> None:
        if self.is_initialized:
            self._move(self.device)

    def _move(self, device: torch.device | str) -> None:
        for kind in ("keys", "values"):
            moved = {name: x.to(device, non_blocking=True) for name, x in getattr(self, f"packed_{kind}").items()}
            setattr(self, f"packed_{kind}", moved)
        for name in ("window_keys", "window_values", "sink_rows", "sink_columns", "sink_keys", "sink_values"):
            if (tensor := getattr(self, name)) is not None:
                setattr(self, name, tensor.to(device, non_blocking=True))


@dataclass(frozen=True)
class CacheSpec:
    """What a patched model and its caches must agree on.

    Args:
        methods: one codec per layer.
        fingerprint: hash of the config, the model's shape and the reorder indices.
    """

    config: QuantConfig
    methods: tuple[KVMethod, ...]
    fingerprint: str


class RotateKVCache(Cache):
    """The cache of a patched model; make one with ``RotateKVCache.for_model(model)`` or let ``generate`` do it.

    Attributes:
        positions: (B, T) int32, the position of every cached token, kept once for all layers.
        token_mask: (B, T) bool of the running first call, False at padding; None when there is none.
    """

    def __init__(self, spec: CacheSpec):
        super().__init__(layers=[RotateKVLayer(method) for method in spec.methods])
        self.config, self.fingerprint = spec.config, spec.fingerprint
        self.positions: torch.Tensor | None = None
        self.token_mask: torch.Tensor | None = None
        self._rope_table: tuple[torch.Tensor, torch.Tensor] | None = None

    @classmethod
    def for_model(cls, model) -> RotateKVCache:
        """An empty cache for a patched model.

        Raises:
            ValueError: the model is not patched.
        """
        from rotatekv.patch import handle_of  # patch imports attention, which imports this file

        return cls(handle_of(model).spec)

    def begin_forward(self, position_ids: torch.Tensor, batch_size: int, attention_mask: torch.Tensor | None) -> None:
        """Note the new tokens' positions and, on the first call, which of them are padding.

        Args:
            position_ids: (B, T) or (1, T).
            attention_mask: what the caller gave the model: None, (B, T_cached + T), or (B, 1, T, T_cached + T).
        """
        cached = self.get_seq_length()
        new = position_ids.to(torch.int32).expand(batch_size, -1)
        if cached == 0:
            self.positions = new.clone()
        elif self.positions.shape[0] != batch_size:
            raise ValueError(f"the cache holds {self.positions.shape[0]} sequences, the call has {batch_size}")
        else:
            # Cut first: an earlier call that failed half-way may have left positions without tokens.
            self.positions = torch.cat([self.positions[:, :cached], new.to(self.positions.device)], dim=1)
        self.token_mask = _token_mask(attention_mask, self.positions.shape) if cached == 0 else None

    def set_rope_table(self, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """cos and sin at every cached and new position, (B, T_cached + T, rotary_dim), for the running call only."""
        self._rope_table = (cos, sin)

    def end_forward(self) -> None:
        self._rope_table = self.token_mask = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, rope=None, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``RotateKVLayer.update``; ``rope`` is the family's function of a tensor, cos and sin."""
        if rope is None or self._rope_table is None:
            raise RuntimeError("a RotateKVCache only works in a model patched with patch_model(model, ...)")
        cos, sin = (table.to(key_states.device) for table in self._rope_table)
        new = key_states.shape[-2]
        keys, values = self.layers[layer_idx].update(
            key_states,
            value_states,
            rope=lambda x: rope(x, cos, sin),
            rope_new=lambda x: rope(x, cos[:, -new:], sin[:, -new:]),
        )
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            keys = _NoGradient.apply(keys, key_states)
            values = _NoGradient.apply(values, value_states)
        return keys, values

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if self.positions is not None:
            length = self.get_seq_length()
            self.positions = self.positions[:, :length].clone() if length else None

    def select_rows(self, rows: torch.Tensor) -> None:
        """Make row ``i`` of the batch what row ``rows[i]`` was, in every layer."""
        for layer in self.layers:
            layer.select_rows(rows)
        if self.positions is not None:
            self.positions = self.positions.index_select(0, rows.to(self.positions.device))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.select_rows(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        indices = torch.as_tensor(indices)
        self.select_rows(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.positions is not None:
            rows = torch.arange(self.positions.shape[0], device=self.positions.device)
            self.select_rows(rows.repeat_interleave(repeats))

    def reset(self) -> None:
        super().reset()
        self.positions = None
        self.end_forward()

    def tensors(self) -> Iterator[torch.Tensor]:
        """Every tensor the cache holds between calls."""
        if self.positions is not None:
            yield self.positions
        for layer in self.layers:
            yield from layer.tensors("keys")
            yield from layer.tensors("values")

    def nbytes(self) -> int:
        """Bytes of all tensors held: codes, scales, zeros, sinks, windows and positions."""
        return sum(_bytes(tensor) for tensor in self.tensors())

    def numbers(self) -> int:
        """How many key and value numbers the cache stands for: 2·B·T·H_kv·D, summed over layers."""
        if self.positions is None:
            return 0
        return 2 * self.positions.numel() * sum(layer.method.layer.channels for layer in self.layers)

    def avg_bits(self) -> dict[str, float]:
        """Measured bits per number for keys (``k``), values (``v``) and both (``total``, positions included)."""
        numbers = self.numbers()
        if not numbers:
            return {"k": 0.0, "v": 0.0, "total": 0.0}
        keys, values = (sum(_bytes(t) for x in self.layers for t in x.tensors(kind)) for kind in ("keys", "values"))
        return {"k": 16 * keys / numbers, "v": 16 * values / numbers, "total": 8 * self.nbytes() / numbers}


class _NoGradient(torch.autograd.Function):
    """Identity whose backward says that gradients stop here, instead of silently training half a model."""

    @staticmethod
    def forward(ctx, cached: torch.Tensor, _projected: torch.Tensor) -> torch.Tensor:
        return cached.view_as(cached)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        raise RuntimeError("no gradients through a quantized KV cache: call unpatch_model(model) before training")


def _append(packed: Packed, new: Packed) -> Packed:
    if not packed:
        return {name: x.contiguous() for name, x in new.items()}
    return {name: torch.cat([packed[name], x], dim=1) for name, x in new.items()}


def _token_mask(attention_mask: torch.Tensor | None, shape: tuple[int, int]) -> torch.Tensor | None:
    """(B, T) bool, True at real tokens, from a 2-D mask or a 4-D mask of any kind."""
    if attention_mask is None:
        return None
    if attention_mask.dim() == 4:
        seen = attention_mask if attention_mask.dtype == torch.bool else attention_mask >= 0
        attention_mask = seen.any(dim=1).any(dim=1)
    return attention_mask[:, : shape[1]].bool().expand(shape)


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
