"""What a patched model and its caches must agree on, and where a patched model keeps it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import DynamicCache, PretrainedConfig

from rotatekv.cache.layer import RotateKVLayer
from rotatekv.config import QuantConfig
from rotatekv.errors import UserError
from rotatekv.families import find_text_model
from rotatekv.methods import KVMethod
from rotatekv.rope import LayerRope, Positions

HANDLE = "_rotatekv_handle"  # on a patched text model: what ``patch_model`` left there, its ``spec`` among it


def is_patched(model: nn.Module) -> bool:
    return _find_handle(model) is not None


def handle_of(model: nn.Module) -> Any:
    """The handle of a patched model, or of one with a patched model inside (UserError if it is not)."""
    handle = _find_handle(model)
    if handle is None:
        raise UserError("the model is not patched: call patch_model(model, ...) first")
    return handle


def _find_handle(model: nn.Module) -> Any:
    found = getattr(model, HANDLE, None)
    if found is not None or not isinstance(model, nn.Module):
        return found
    try:
        return getattr(find_text_model(model), HANDLE, None)
    except UserError:  # no decoder
        return None


@dataclass(frozen=True)
class CacheSpec:
    """What a patched model and its caches must agree on.

    Args:
        methods: one codec per layer; None for a layer that keeps transformers' own cache (linear attention).
        fingerprint: of the config, the model's shape and weights, and the calibrated statistics.
        ropes: how each layer's keys are turned; None: they are not.
        text_config: of the text model: its sliding windows and linear-attention layers.
    """

    config: QuantConfig
    methods: tuple[KVMethod | None, ...]
    fingerprint: str
    ropes: tuple[LayerRope | None, ...] = field(repr=False)
    text_config: PretrainedConfig = field(repr=False)

    def __deepcopy__(self, memo: dict) -> CacheSpec:
        return self

    def new_layers(self, positions: Positions) -> list:
        """Empty layers of a cache: ours where tokens are stored, transformers' own elsewhere."""
        stock = DynamicCache(config=self.text_config).layers
        return [
            layer if method is None else RotateKVLayer(method, rope, positions, getattr(layer, "sliding_window", None))
            for layer, method, rope in zip(stock, self.methods, self.ropes, strict=True)
        ]
