"""One file per method. ``build_method`` makes the codec of one attention layer from a config."""

from __future__ import annotations

from rotatekv.config import QuantConfig
from rotatekv.errors import UserError
from rotatekv.methods.base import KVMethod, LayerGeometry, Statistics
from rotatekv.methods.fp16 import FP16
from rotatekv.methods.kivi import KIVI
from rotatekv.methods.kvquant import KVQuant
from rotatekv.methods.quarot import QuaRot
from rotatekv.methods.rotatekv import RotateKV
from rotatekv.methods.rotatekv_plus import RotateKVPlus
from rotatekv.methods.rtn import RTN
from rotatekv.methods.turboquant import TurboQuant

METHODS: dict[str, type[KVMethod]] = {
    "fp16": FP16,
    "rtn": RTN,
    "kivi": KIVI,
    "quarot": QuaRot,
    "turboquant": TurboQuant,
    "kvquant": KVQuant,
    "rotatekv": RotateKV,
    "rotatekv_plus": RotateKVPlus,
}


def method_class(config: QuantConfig) -> type[KVMethod]:
    """The class of a config's codec.

    Raises:
        UserError: an unknown method.
    """
    if config.method not in METHODS:
        raise UserError(f"unknown method {config.method!r}: choose one of {', '.join(METHODS)}")
    return METHODS[config.method]


def build_method(config: QuantConfig, layer: LayerGeometry, statistics: Statistics | None = None) -> KVMethod:
    """The codec of one layer.

    Args:
        statistics: the layer's calibrated tensors by name, for methods with a ``statistics_kind``.

    Raises:
        UserError: an unknown method, or one that does not fit the layer's shape.
    """
    return method_class(config)(config, layer, statistics)


__all__ = ["METHODS", "KVMethod", "LayerGeometry", "Statistics", "build_method", "method_class"]
