"""RotateKVCache: a transformers cache of packed layers, with every token's position kept once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache

from rotatekv.cache_layer import RotateKVLayer, rope_from
from rotatekv.config import QuantConfig
from rotatekv.decode import FusedCall
from rotatekv.errors import UserError
from rotatekv.methods import KVMethod
from rotatekv.parts import Parts
from rotatekv.window import FlushedTokens


@dataclass(frozen=True)
class CacheSpec:
    """What a patched model and its caches must agree on.

    Args:
        methods: one codec per layer.
        fingerprint: of the config, the model's shape and weights, and the calibrated statistics.
    """

    config: QuantConfig
    methods: tuple[KVMethod, ...]
    fingerprint: str


class RotateKVCache(Cache):
    """The cache of a patched model; make one with ``RotateKVCache.for_model(model)`` or let ``generate`` do it.

    Attributes:
        positions: (B, T) int32, the position of every cached token, kept once for all layers.
        token_mask: (B, T) bool of the running call's tokens, False at padding; None when there is none.
        mask_is_causal: whether no token of the running call sees a later one; a caller's own 4-D mask may show them.
        fused_call: what a fused kernel needs for the running call; None where the general path is taken.
        parts: the sequences, each in a cache of its own, where padding or packing asks for it; None: all in the layers.
    """

    def __init__(self, spec: CacheSpec):
        super().__init__(layers=[RotateKVLayer(method) for method in spec.methods])
        self._spec = spec
        self.config, self.fingerprint = spec.config, spec.fingerprint
        self.positions: torch.Tensor | None = None
        self.token_mask: torch.Tensor | None = None
        self.mask_is_causal = True
        self.fused_call: FusedCall | None = None
        self.parts: Parts | None = None
        self._running = False
        self._rope_table: Callable[[], tuple[torch.Tensor, torch.Tensor]] | None = None

    @classmethod
    def for_model(cls, model) -> RotateKVCache:
        """An empty cache for a patched model.

        Raises:
            UserError: the model is not patched.
        """
        from rotatekv.patch import handle_of  # patch imports attention, which imports this file

        return cls(handle_of(model).spec)

    def begin_forward(
        self,
        position_ids: torch.Tensor,
        batch_size: int,
        attention_mask: torch.Tensor | None,
        documents: torch.Tensor | None = None,
    ) -> None:
        """Note the new tokens' positions, which of them are padding, and whose they are.

        Args:
            position_ids: (B, T) or (1, T).
            attention_mask: what the caller gave the model: None, (B, T_cached + T), or (B, 1, T, T_cached + T).
            documents: of a packed batch, (B or 1, T); see ``find_documents``.

        Raises:
            UserError: a packed batch filled the cache.
        """
        # AUTHORS: positions count the left padding there; here every token keeps the position the model gave it.
        if self._running:  # an earlier call never came to its end
            self.end_forward(failed=True)
        self._running = True
        cached = self.get_seq_length()
        if not cached:
            self.parts = None
        elif self.parts is not None and self.parts.is_packed:
            raise UserError(
                "a packed batch (position_ids that restart) filled this cache, it cannot go on: "
                "give the documents as rows of a batch, padded, with an attention_mask"
            )
        new = position_ids.to(torch.int32).expand(batch_size, -1)
        self.mask_is_causal = attention_mask is None or attention_mask.dim() == 2
        self.token_mask = _token_mask(attention_mask, cached, (batch_size, cached + new.shape[1]))
        if self.parts is None and self._padding_matters(cached, attention_mask):
            self.parts = Parts.of_rows(self, batch_size)
            for layer in self.layers:
                layer.reset()
        if cached == 0:
            self.positions = new.clone()
        elif self.positions.shape[0] != batch_size:
            raise ValueError(f"the cache holds {self.positions.shape[0]} sequences, the call has {batch_size}")
        else:
            self.positions = torch.cat([self.positions, new.to(self.positions.device)], dim=1)
        if documents is not None:
            documents = documents.expand(batch_size, -1)
            self.parts, owned = Parts.of_documents(documents, lambda: RotateKVCache(self._spec))
            self.parts.begin_forward(new, owned)
        elif self.parts is not None:
            real = torch.ones_like(new, dtype=torch.bool) if self.token_mask is None else self.token_mask
            self.parts.begin_forward(new, real)
            for cache in self.parts.caches():
                cache.mask_is_causal = self.mask_is_causal

    def set_rope_table(self, make: Callable[[], tuple[torch.Tensor, torch.Tensor]]) -> None:
        """How to make cos and sin at all positions, (B, T_cached + T, rotary_dim), if the call needs them."""
        self._rope_table = functools.cache(make)

    def _padding_matters(self, cached: int, attention_mask: torch.Tensor | None) -> bool:
        """Whether a row would be another one than alone if its padding were stored with it."""
        if attention_mask is None or attention_mask.dim() != 2:
            return False
        if any(layer.method.tokens_per_flush > 1 for layer in self.layers):
            return not bool(self.token_mask.all())
        return self.config.Attention_Sink_Aware and cached == 0 and not bool(self.token_mask.any(1).all())

    def end_forward(self, failed: bool = False) -> None:
        """The running call is done; ``failed``: take back what it has stored, so that it may be made again."""
        self._rope_table = self.token_mask = self.fused_call = None
        for layer in self.layers:
            layer.end_call(failed)
        if self.parts is not None:
            self.parts.end_forward(failed)
        if failed:
            self._cut_positions()
        self._running = False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return super().get_seq_length(layer_idx) if self.parts is None else self.parts.tokens

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.get_seq_length(layer_idx) + query_length, 0

    def activate_past_recording(self) -> None:
        for cache in self._holders():
            for layer in cache.layers:
                layer.activate_past_recording()

    def attends(self, layer_idx: int, query: torch.Tensor) -> bool:
        """Whether a fused kernel attends for this layer in the running call; not under gradients."""
        needs_gradient = torch.is_grad_enabled() and query.requires_grad
        call = self.fused_call
        if call is None or needs_gradient:
            return False
        return self.layers[layer_idx].can_attend(call.kernels(query.device), query.shape[2])

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer_idx: int, scaling: float, rope_new
    ) -> torch.Tensor:
        """Store the new tokens and attend to all, without ever unpacking the cache; see ``RotateKVLayer.attend``."""
        return self.layers[layer_idx].attend(query, key, value, scaling, rope_new, self.fused_call)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, rope=None, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor, FlushedTokens | None]:
        """See ``RotateKVLayer.update``; ``rope`` is the family's function of a tensor, cos and sin."""
        if rope is None or self._rope_table is None:
            raise RuntimeError("a RotateKVCache only works in a model patched with patch_model(model, ...)")
        cos, sin = (table.to(key_states.device) for table in self._rope_table())
        layer = self.layers[layer_idx]
        keys, values, flushed = layer.update(key_states, value_states, rope_from(rope, cos, sin))
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            keys = _NoGradient.apply(keys, key_states)
            values = _NoGradient.apply(values, value_states)
        return keys, values, flushed

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if self.parts is not None:
            self.parts.crop(tokens_to_remove)
        self._cut_positions()

    def _cut_positions(self) -> None:
        length = self.get_seq_length()
        if self.positions is not None and self.positions.shape[1] > length:
            self.positions = self.positions[:, :length].clone() if length else None

    def select_rows(self, rows: torch.Tensor) -> None:
        """Make row ``i`` of the batch what row ``rows[i]`` was, in every layer."""
        for layer in self.layers:
            layer.select_rows(rows)
        if self.parts is not None:
            self.parts.select_rows(rows)
        if self.positions is not None:
            self.positions = self.positions.index_select(0, rows.to(self.positions.device))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.select_rows(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if not isinstance(indices, torch.Tensor):
            indices = torch.tensor(indices, device=self.positions.device if self.positions is not None else "cpu")
        self.select_rows(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.positions is not None:
            rows = torch.arange(self.positions.shape[0], dtype=torch.int64, device=self.positions.device)
            self.select_rows(rows.repeat_interleave(repeats))

    def reset(self) -> None:
        super().reset()
        self.positions = self.parts = None
        self.end_forward()

    def __iter__(self) -> Iterator[tuple[torch.Tensor | None, torch.Tensor | None, None]]:
        """Each layer's keys, values and sliding window (none), as of a ``DynamicCache``; see ``RotateKVLayer.keys``."""
        return ((layer.keys, layer.values, None) for layer in self.layers)

    def tensors(self) -> Iterator[torch.Tensor]:
        """Every tensor the cache holds between calls."""
        yield from (cache.positions for cache in self._holders() if cache.positions is not None)
        yield from self._tensors_of("keys")
        yield from self._tensors_of("values")

    def _tensors_of(self, kind: str) -> Iterator[torch.Tensor]:
        return (tensor for cache in self._holders() for layer in cache.layers for tensor in layer.tensors(kind))

    def _holders(self) -> list[RotateKVCache]:
        return [self, *(self.parts.caches() if self.parts is not None else ())]

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
        keys, values = (sum(map(_bytes, self._tensors_of(kind))) for kind in ("keys", "values"))
        return {"k": 16 * keys / numbers, "v": 16 * values / numbers, "total": 8 * self.nbytes() / numbers}


_HIDDEN = -1000.0  # or less, added to a score, leaves no weight; a bias such as ALiBi's is nearer to 0 for some query


class _NoGradient(torch.autograd.Function):
    """Identity whose backward says that gradients stop here, instead of silently training half a model."""

    @staticmethod
    def forward(ctx, cached: torch.Tensor, _projected: torch.Tensor) -> torch.Tensor:
        return cached.view_as(cached)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        raise RuntimeError("no gradients through a quantized KV cache: call unpatch_model(model) before training")


def _token_mask(attention_mask: torch.Tensor | None, cached: int, shape: tuple[int, int]) -> torch.Tensor | None:
    """(B, T) bool, True at real tokens of the call, from a 2-D mask or a 4-D mask of any kind for all of ``shape``."""
    if attention_mask is None:
        return None
    if attention_mask.dim() == 4:
        seen = attention_mask if attention_mask.dtype == torch.bool else attention_mask > _HIDDEN
        attention_mask = seen.any(dim=1).any(dim=1)
    new = attention_mask[:, cached : shape[1]].bool()
    # Tokens that a short mask does not name are padding, as in Hugging Face's own masks.
    new = torch.nn.functional.pad(new, (0, shape[1] - cached - new.shape[1]))
    return new.expand(shape[0], -1)


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
