"""RotateKVCache: a transformers cache of packed layers, with every token's position kept once."""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from transformers.cache_utils import Cache

from rotatekv.cache.fused_call import FusedCall
from rotatekv.cache.layer import RotateKVLayer
from rotatekv.cache.parts import Parts, SplitLayer
from rotatekv.cache.sinks import ChosenSinks
from rotatekv.cache.spec import CacheSpec, handle_of
from rotatekv.compat import outside_compiled_graphs
from rotatekv.errors import UserError
from rotatekv.kernels.backend import kernels_on
from rotatekv.rope import Positions

_HANDED = "_rotatekv_handed"  # on the keys that ``update`` returns


class Unattended(RuntimeError):
    """Layers of the model have stored nothing, or attended without what they have stored."""

    def __init__(self, layers: list[int]):
        super().__init__(
            f"layers {layers} attended without the cache, in full precision: switch gradient checkpointing off, "
            "unpatch_model(model) before training, and before you exchange its layers"
        )
        self.layers = layers


class RotateKVCache(Cache):
    """The cache of a patched model; make one with ``RotateKVCache.for_model(model)`` or let ``generate`` do it.

    Attributes:
        token_mask: (B, T) bool of the running call's tokens, False at padding; None when there is none.
        mask_is_causal: whether no token of the running call sees a later one; a caller's own 4-D mask may show them.
        fused_call: what a fused kernel needs for the running call; None where the general path is taken.
        parts: the sequences, each in a cache of its own, where padding or packing asks for it; None: all in the layers.
        first_call_is_exact: the running call's queries see its keys and values as they are.
        names_sinks: the running call's layers name tokens that stay unquantized.
    """

    layers: list

    def __init__(self, spec: CacheSpec):
        self._positions = Positions()
        super().__init__(layers=spec.new_layers(self._positions))
        self._spec = spec
        self.config, self.fingerprint = spec.config, spec.fingerprint
        self.token_mask: torch.Tensor | None = None
        self.mask_is_causal, self.first_call_is_exact = True, False
        self.fused_call: FusedCall | None = None
        self.names_sinks = False
        self.parts: Parts | None = None
        self._tokens = 0  # that are stored, but for a running call's
        self._running = False
        self._awaited: set[int] = set()  # layers that have stored the running call's tokens and not attended yet
        self._chosen: dict[int, list[ChosenSinks | None]] = {}  # of the running call, by layer: one of each part
        self._is_spoilt = False  # a failed call may have changed transformers' own layers
        self._ends_failed: bool | None = None  # how the running call ends, once that is known

    def follow(self, spec: CacheSpec) -> None:
        """Take the RoPE of a model whose ``rotary_emb`` is another one by now."""
        if spec.ropes is not self._spec.ropes:
            self._spec = spec
            for cache in self._holders():
                for number, layer in enumerate(cache.layers):
                    if isinstance(layer, RotateKVLayer):
                        layer.set_rope(spec.ropes[number])

    @property
    def positions(self) -> torch.Tensor | None:
        """(B, T) int32, the position of every cached token, kept once for all layers."""
        return self._positions.values

    def _own_layers(self) -> list[RotateKVLayer]:
        return [layer for layer in self.layers if isinstance(layer, RotateKVLayer)]

    @classmethod
    def for_model(cls, model) -> RotateKVCache:
        """An empty cache for a patched model.

        Raises:
            UserError: the model is not patched.
        """
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
        self.settle()
        self._running, self._ends_failed = True, None
        cached = self._tokens
        self.first_call_is_exact = not cached and not self.config.quantize_prefill
        if not cached and (self.parts is not None or self._is_spoilt):
            self._start_again()
        elif self._is_spoilt:
            raise RuntimeError(
                "a call failed half-way, and this model's linear-attention layers cannot be taken back: "
                "start with a new cache"
            )
        elif self.parts is not None and self.parts.is_packed:
            raise UserError(
                "a packed batch (position_ids that restart) filled this cache, it cannot go on: "
                "give the documents as rows of a batch, padded, with an attention_mask"
            )
        new = position_ids.to(torch.int32).expand(batch_size, -1)
        # PAPER: sinks are found at prefill; those of massive activations whenever they come.
        finds_later = self.config.sink_selection == "massive" or self.parts is not None
        self.names_sinks = self.config.Attention_Sink_Aware and (not cached or finds_later)
        self.mask_is_causal = attention_mask is None or attention_mask.dim() == 2
        mask = self.token_mask = _token_mask(attention_mask, cached, (batch_size, cached + new.shape[1]))
        old = self.positions if cached else None
        if old is not None and len(old) != batch_size:
            raise ValueError(f"the cache holds {len(old)} sequences, the call has {batch_size}")
        if self.parts is None and mask is not None and self.mask_is_causal and self._padding_matters(cached, mask):
            self._split(Parts.of_rows(self, batch_size, mask.device))
        if old is not None:
            new = new.to(old.device)
            self._positions.set(torch.cat([old, new], dim=1))
        else:
            self._positions.set(new.clone())
        if documents is not None:
            documents = documents.expand(batch_size, -1)
            parts, owned = Parts.of_documents(documents, lambda: RotateKVCache(self._spec))
            self._split(parts)
            parts.begin_forward(new, owned)
        elif self.parts is not None:
            real = torch.ones_like(new, dtype=torch.bool) if mask is None else mask
            self.parts.begin_forward(new, real)
            for cache in self.parts.caches():
                cache.mask_is_causal = self.mask_is_causal

    def _split(self, parts: Parts) -> None:
        """Keep each sequence's attention layers in its own cache from now on."""
        layers = [
            SplitLayer(parts, number, layer) if isinstance(layer, RotateKVLayer) else layer
            for number, layer in enumerate(self.layers)
        ]
        self.parts, self.layers = parts, layers

    def _start_again(self) -> None:
        """New layers in place of those of an empty cache."""
        records = any(self.is_recording_past(number) for number in range(len(self.layers)))
        self.parts, self.layers, self._is_spoilt = None, self._spec.new_layers(self._positions), False
        if records:
            self.activate_past_recording()

    def _padding_matters(self, cached: int, token_mask: torch.Tensor) -> bool:
        """Whether storing a row's padding with it would change what is stored of its own tokens."""
        if self.config.residual_length or any(layer.method.tokens_per_flush > 1 for layer in self._own_layers()):
            return not bool(token_mask.all())
        return self.config.Attention_Sink_Aware and cached == 0 and not bool(token_mask.any(1).all())

    def end_forward(self, failed: bool = False) -> None:
        """The running call is done; ``failed``: take back what it has stored, so that it may be made again.

        Raises:
            Unattended: some layer of the model has stored nothing, or attended without what it has stored.
        """
        tokens, missing = self._positions.tokens, []
        if self._ends_failed is None:  # else an interrupt came upon the end, which is now made whole
            if self._running and not failed:
                missing = sorted({*self._awaited, *self.incomplete_layers()})
            failed = failed or bool(missing)
            self._ends_failed, self._tokens = failed, self._tokens if failed else tokens
        for layer in self._own_layers():
            layer.end_call(self._ends_failed)
        if self.parts is not None:
            self.parts.end_forward(self._ends_failed)
        self._positions.forget()
        if self._ends_failed:
            self._is_spoilt |= tokens > self._tokens and None in self._spec.methods
            self._cut_positions()
        self.token_mask = self.fused_call = None
        self.first_call_is_exact, self._awaited, self._chosen = False, set(), {}
        self._running, self._ends_failed = False, None
        if missing:
            raise Unattended(missing)

    def incomplete_layers(self) -> list[int]:
        """The attention layers that do not hold all tokens."""
        if self.parts is not None:
            return [number for part in self.parts.running() for number in part.cache.incomplete_layers()]
        tokens = self._positions.tokens
        own = ((number, layer) for number, layer in enumerate(self.layers) if isinstance(layer, RotateKVLayer))
        return [number for number, layer in own if layer.get_seq_length() != tokens]

    def settle(self) -> None:
        """Take back what a call has stored that never came to its end (Ctrl-C)."""
        if self._running:
            self.end_forward(failed=True)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens a row, padding included; a running call's count once it is done."""
        return self._tokens

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        if layer_idx == 0 and not isinstance(self.layers[0], RotateKVLayer | SplitLayer):  # transformers' default
            layer_idx = next(i for i, method in enumerate(self._spec.methods) if method is not None)
        return self.layers[layer_idx].get_mask_sizes(query_length)

    def attends(self, layer_idx: int, query: torch.Tensor) -> bool:
        """Whether a fused kernel attends for this layer in the running call; not under gradients."""
        call = self.fused_call
        if call is None or self.first_call_is_exact or (torch.is_grad_enabled() and query.requires_grad):
            return False
        return self.layers[layer_idx].can_attend(call.kernels(query.device), call)

    @outside_compiled_graphs
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the call's (B, H_kv, T, D) keys, after RoPE, and values; return them for ``attention.attention``,
        which finds this cache by them."""
        if not self._running:
            raise RuntimeError("a RotateKVCache only works in a model patched with patch_model(model, ...)")
        if self.names_sinks and layer_idx not in self._chosen:
            raise RuntimeError(
                f"no attention sinks were named in layer {layer_idx}: unpatch_model(model) before you "
                "exchange its layers, and patch it again"
            )
        device = key_states.device
        kernels = kernels_on(device) if self.fused_call is None else self.fused_call.kernels(device)
        if self.parts is None:
            sinks = self._chosen.get(layer_idx, [None])
            self.layers[layer_idx].write(key_states, value_states, kernels, *sinks)
        else:
            parts = self.parts.running()
            for part, own in zip(parts, self._chosen.get(layer_idx, [None] * len(parts)), strict=True):
                layer = part.cache.layers[layer_idx]
                layer.write(part.of(key_states, 2), part.of(value_states, 2), kernels, own)
        setattr(key_states, _HANDED, (self, layer_idx))
        self._awaited.add(layer_idx)
        return key_states, value_states

    def choose_sinks(self, layer_idx: int, hidden_states: torch.Tensor) -> None:
        """Choose the call's tokens that stay unquantized in a layer, by its (B, T, hidden_size) input."""
        if self.parts is None:
            self._chosen[layer_idx] = [self.layers[layer_idx].choose_sinks(hidden_states, self.token_mask)]
        else:
            self._chosen[layer_idx] = [
                part.cache.layers[layer_idx].choose_sinks(part.of(hidden_states, 1)) for part in self.parts.running()
            ]

    def take(self, layer_idx: int) -> None:
        """The attention function has what ``update`` returned for this layer."""
        self._awaited.discard(layer_idx)

    def crop(self, tokens_to_remove: int) -> None:
        self.settle()
        tokens_to_remove = operator.index(tokens_to_remove)
        self.check_crop(tokens_to_remove)
        for layer in sorted(self.layers, key=lambda layer: isinstance(layer, RotateKVLayer)):
            layer.crop(tokens_to_remove)  # transformers' own first, which may refuse too
        if self.parts is not None:
            self.parts.crop(tokens_to_remove)
        self._tokens = max(self._tokens + tokens_to_remove, 0)
        self._cut_positions()

    def check_crop(self, tokens_to_remove: int) -> None:
        """Raises what a layer's ``crop`` would raise, before any layer has given up a token."""
        for layer in self._own_layers():
            layer.check_crop(tokens_to_remove)
        if self.parts is not None:
            self.parts.check_crop(tokens_to_remove)

    def _cut_positions(self) -> None:
        if self.positions is not None and self._positions.tokens > self._tokens:
            self._positions.set(self.positions[:, : self._tokens].clone() if self._tokens else None)

    def select_rows(self, rows: torch.Tensor) -> None:
        """Make row ``i`` of the batch what row ``rows[i]`` was, in every layer."""
        self.settle()
        for layer in self.layers:
            layer.reorder_cache(rows)
        if self.parts is not None:
            self.parts.select_rows(rows)
        if self.positions is not None:
            self._positions.set(self.positions.index_select(0, rows.to(self.positions.device)))

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
        self.settle()
        if self.parts is not None or self._is_spoilt:
            self._start_again()
        super().reset()
        self._positions.set(None)
        self._tokens = 0

    def __iter__(self) -> Iterator[tuple[torch.Tensor | None, torch.Tensor | None, int | None]]:
        """Each layer's keys, values and sliding window, as of a ``DynamicCache``; see ``RotateKVLayer.keys``."""
        for layer in self.layers:
            yield getattr(layer, "keys", None), getattr(layer, "values", None), getattr(layer, "sliding_window", None)

    def tensors(self) -> Iterator[torch.Tensor]:
        """Every tensor the cache holds between calls."""
        yield from (cache.positions for cache in self._holders() if cache.positions is not None)
        yield from self._tensors_of("keys")
        yield from self._tensors_of("values")

    def _tensors_of(self, kind: str) -> Iterator[torch.Tensor]:
        return (tensor for cache in self._holders() for layer in cache._own_layers() for tensor in layer.tensors(kind))

    def _holders(self) -> list[RotateKVCache]:
        return [self, *(self.parts.caches() if self.parts is not None else ())]

    def nbytes(self) -> int:
        """Bytes of all tensors held: codes, scales, zeros, sinks, windows and positions."""
        return sum(_bytes(tensor) for tensor in self.tensors())

    def numbers(self) -> int:
        """How many key and value numbers the cache holds: 2·B·T·H_kv·D, summed over layers; T counts what sliding
        windows have kept."""
        if self.positions is None:
            return 0
        if self.parts is not None:
            layers = [(layer.method, self.positions.numel()) for layer in self.layers if isinstance(layer, SplitLayer)]
        else:
            rows = self.positions.shape[0]
            layers = [(x.method, rows * (x.get_seq_length() - x.dropped)) for x in self._own_layers()]
        return 2 * sum(method.geometry.channels * tokens for method, tokens in layers)

    def avg_bits(self) -> dict[str, float]:
        """Measured bits per number for keys (``k``), values (``v``) and both (``total``, positions included)."""
        numbers = self.numbers()
        if not numbers:
            return {"k": 0.0, "v": 0.0, "total": 0.0}
        keys, values = (sum(map(_bytes, self._tensors_of(kind))) for kind in ("keys", "values"))
        return {"k": 16 * keys / numbers, "v": 16 * values / numbers, "total": 8 * self.nbytes() / numbers}


_HIDDEN = -1000.0  # or less, added to a score, leaves no weight; a bias such as ALiBi's is nearer to 0 for some query


def handed_over(keys: torch.Tensor) -> tuple[RotateKVCache, int] | None:
    """The cache whose ``update`` returned these keys, and its layer's number; None: no RotateKVCache did."""
    handed = getattr(keys, _HANDED, None)
    if handed is not None:
        handed[0].take(handed[1])
    return handed


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
