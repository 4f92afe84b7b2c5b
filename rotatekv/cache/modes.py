"""The modes of torch in which a layer of the cache makes and reads its tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec, Protocol, TypeVar

import torch


class _OnDevice(Protocol):
    device: torch.device


_Layer = TypeVar("_Layer", bound=_OnDevice)
_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")
_Method = Callable[Concatenate[_Layer, _Given], _Result]


def storing(method: _Method[_Layer, _Given, _Result]) -> _Method[_Layer, _Given, _Result]:
    """A method of a layer that makes tensors to keep: plain ones, of no graph, and not those of
    ``torch.inference_mode``, which no call outside it could write to."""

    @functools.wraps(method)
    def store(layer: _Layer, *args: _Given.args, **kwargs: _Given.kwargs) -> _Result:
        if not torch.is_inference_mode_enabled() and not torch.is_grad_enabled():
            return method(layer, *args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return method(layer, *args, **kwargs)

    return store


def without_autocast(method: _Method[_Layer, _Given, _Result]) -> _Method[_Layer, _Given, _Result]:
    """A method of a layer that autocast is not to touch: it would round rotations, and cannot join float16 scales."""

    @functools.wraps(method)
    def exact(layer: _Layer, *args: _Given.args, **kwargs: _Given.kwargs) -> _Result:
        kind = layer.device.type
        if not torch.is_autocast_enabled(kind):
            return method(layer, *args, **kwargs)
        with torch.autocast(kind, enabled=False):
            return method(layer, *args, **kwargs)

    return exact
