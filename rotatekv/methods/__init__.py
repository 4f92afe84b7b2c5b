"""One file per method. ``build_method`` makes the codec of one attention layer from a config."""

from __future__ import annotations

import torch

from rotatekv.config import QuantConfig
from rotatekv.errors import UserError
from rotatekv.methods.base import KVMethod, LayerGeometry
from rotatekv.methods.fp16 import FP16
from rotatekv.methods.kivi import KIVI
from rotatekv.methods.quarot import QuaRot
from rotatekv.methods.rotatekv import RotateKV
from rotatekv.methods.rtn import RTN
from rotatekv.methods.turboquant import TurboQuant

METHODS: dict[str, type[KVMethod]] = {
    "fp16": FP16,
    "rtn": RTN,
    "kivi": KIVI,
    "quarot": QuaRot,
    "turboquant": TurboQuant,
    "rotatekv": RotateKV,
}


def build_method(config: QuantConfig, layer: LayerGeometry, reorder_index: torch.Tensor | None = None) -> KVMethod:
    """The codec of one layer.

    Args:
        reorder_index: (H_kv·D,) int64 permutation of the rotated key channels, for methods that reorder.

    Raises:
        UserError: an unknown method, or one that does not fit the layer's shape.
    """
    if config.method not in METHODS:
        raise UserError(f"unknown method {config.method!r}: choose one of {', '.join(METHODS)}")
    return METHODS[config.method](config, layer, reorder_index)


__all__ = ["METHODS", "KVMethod", "LayerGeometry", "build_method"]
