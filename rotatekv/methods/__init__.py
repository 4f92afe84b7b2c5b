"""One file per method. Each is imported here, and registers its codec and its presets; nothing else names it."""

from importlib import import_module
from pkgutil import iter_modules

from rotatekv.methods.base import KVMethod, LayerGeometry, Statistics
from rotatekv.methods.registry import METHODS, build_method, method_class, register, sort_names


def find_methods() -> None:
    """Import every file of this folder."""
    for module in iter_modules(__path__):
        import_module(f"{__name__}.{module.name}")
    sort_names()


find_methods()

__all__ = ["METHODS", "KVMethod", "LayerGeometry", "Statistics", "build_method", "method_class", "register"]
