"""What attention gets in an unpatched model of any family: for calibration, figures and the check of the presets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rotatekv.attention import renamed_config, stock_attention
from rotatekv.cache.layer import RotateKVLayer
from rotatekv.families import attention_modules
from rotatekv.methods import KVMethod
from rotatekv.patching.changes import passing_changes
from rotatekv.patching.patch import layer_ropes
from rotatekv.patching.proof import proven_ropes
from rotatekv.rope import LayerRope, Positions, Tables

NAME = "rotatekv_watched"  # of the attention function
_TAKE = "_rotatekv_take"  # on the config of a watched attention module: what gets what its attention got


@dataclass(frozen=True)
class Attended:
    """What one layer's attention got in one call of a whole text.

    Args:
        layer: its number. module: the attention module.
        hidden_states: (B, T, hidden_size), what came into the decoder layer.
        query: (B, H, T, D), key, value: (B, H_kv, T, D), as attention sees them, after RoPE.
        attention_mask: (B or 1, 1, T, T), bool or to be added; None: causal.
        options: scaling and whatever else the family hands its attention function.
        rope: how the layer turns keys and queries; None: it does not.
    """

    layer: int
    module: nn.Module
    hidden_states: torch.Tensor
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    attention_mask: torch.Tensor | None
    options: dict
    rope: LayerRope | None

    @cached_property
    def positions(self) -> Positions:
        """0 … T − 1."""
        return Positions(torch.arange(self.key.shape[2], dtype=torch.int32, device=self.key.device).unsqueeze(0))

    @property
    def tables(self) -> Tables:
        """Of a layer that turns keys."""
        assert self.rope is not None
        return self.positions.tables(self.rope, 0, self.key.shape[2], self.key.dtype, self.key.device)

    @property
    def sees(self) -> torch.Tensor:
        """(T, T) bool: the tokens that a query of the first sequence sees, in its sliding window or all."""
        if self.attention_mask is None:
            tokens = self.key.shape[2]
            return torch.ones(tokens, tokens, dtype=torch.bool, device=self.key.device).tril()
        mask = self.attention_mask[0, 0]
        return mask if mask.dtype == torch.bool else mask >= 0

    def before_rope(self, heads: torch.Tensor) -> torch.Tensor:
        """Its queries or keys as they were before RoPE, float32."""
        return heads.float() if self.rope is None else self.rope.unturn(heads, self.tables)

    def after_rope(self, heads: torch.Tensor) -> torch.Tensor:
        return heads if self.rope is None else self.rope.turn(heads, self.tables)

    def gradient_before_rope(self, gradient: torch.Tensor) -> torch.Tensor:
        """By the keys before RoPE, from that by the keys after it: RoPE's transpose has −sin."""
        if self.rope is None:
            return gradient
        cos, sin = self.tables
        return self.rope.turn(gradient, (cos, -sin))

    def stored(self, method: KVMethod) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values as attention would see them in a cache of ``method``, (B, H_kv, T, D) each."""
        layer = RotateKVLayer(method, self.rope, self.positions)
        sinks = layer.choose_sinks(self.hidden_states) if method.config.Attention_Sink_Aware else None
        return layer.update(self.key, self.value, sinks=sinks)


Take = Callable[[Attended], None]


@contextmanager
def watching(text_model: nn.Module, take: Take) -> Iterator[None]:
    """While it lasts, ``take`` gets what each layer's attention gets, just before it attends.

    Args:
        text_model: not patched. Layers without attention are passed over.

    Raises:
        UserError: a layer turns its keys in a way that cannot be undone.
    """
    inputs: dict[int, torch.Tensor] = {}

    def note(number: int, layer: nn.Module, args: tuple, kwargs: dict) -> None:
        inputs[number] = args[0] if args else kwargs["hidden_states"]

    def give(number: int, rope: LayerRope | None, module: nn.Module, query, key, value, mask, options: dict) -> None:
        take(Attended(number, module, inputs.pop(number), query, key, value, mask, options, rope))

    ropes = proven_ropes(text_model, layer_ropes(text_model))
    with passing_changes() as changes:
        for number, (attention, rope) in enumerate(zip(attention_modules(text_model), ropes, strict=True)):
            if attention is None:
                continue
            changes.hook(text_model.layers[number], "forward_pre", partial(note, number), with_kwargs=True)
            watched = renamed_config(attention.config, NAME)
            setattr(watched, _TAKE, partial(give, number, rope))
            changes.set(attention, "config", watched)
        yield


def stream_attention(model: nn.Module, text_model: nn.Module, windows: Iterable[torch.Tensor], take: Take) -> None:
    """Run an unpatched model over windows (1, T) of token ids; no gradients, nothing is kept."""
    with torch.no_grad(), watching(text_model, take):
        for window in windows:
            text_model(input_ids=window.to(model.device), use_cache=False)


def _watched_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    getattr(module.config, _TAKE)(module, query, key, value, attention_mask, options)
    return stock_attention(module)(module, query, key, value, attention_mask, **options)


ALL_ATTENTION_FUNCTIONS.register(NAME, _watched_attention)
