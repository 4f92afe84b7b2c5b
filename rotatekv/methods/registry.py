"""What methods there are: a codec's file registers its class and its presets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from typing import TypeVar

from rotatekv.config import PRESETS, QuantConfig
from rotatekv.errors import UserError
from rotatekv.methods.base import KVMethod, LayerGeometry, Statistics

METHODS: dict[str, type[KVMethod]] = {}
Codec = TypeVar("Codec", bound=type[KVMethod])


def register(name: str, presets: Mapping[str, QuantConfig]) -> Callable[[Codec], Codec]:
    """Decorate a codec's class.

    Args:
        name: what ``QuantConfig.method`` calls it.
        presets: what ``--method`` and ``patch_model`` take, by name; their ``method`` is ``name``.
    """

    def add(codec: Codec) -> Codec:
        if taken := [key for key in (name, *presets) if key in METHODS or key in PRESETS]:
            raise ValueError(f"{codec.__name__}: {', '.join(taken)} is registered already")
        METHODS[name] = codec
        PRESETS.update(presets)
        return codec

    return add


def sort_names() -> None:
    """Put methods and presets in alphabetical order, whichever file imports which."""
    tables: tuple[MutableMapping, ...] = (METHODS, PRESETS)
    for names in tables:
        in_order = dict(sorted(names.items()))
        names.clear()
        names.update(in_order)


def method_class(config: QuantConfig) -> type[KVMethod]:
    """The class of a config's codec.

    Raises:
        UserError: an unknown method.
    """
    if config.method not in METHODS:
        raise UserError(f"unknown method {config.method!r}: choose one of {', '.join(METHODS)}")
    return METHODS[config.method]


def build_method(config: QuantConfig, geometry: LayerGeometry, statistics: Statistics | None = None) -> KVMethod:
    """The codec of one layer.

    Args:
        statistics: the layer's calibrated tensors by name, for methods with a ``statistics_kind``.

    Raises:
        UserError: an unknown method, or one that does not fit the layer's shape.
    """
    return method_class(config)(config, geometry, statistics)
