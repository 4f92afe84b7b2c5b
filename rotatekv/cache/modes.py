"""The modes of torch in which a layer of the cache makes and reads its tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch


def storing(method: Callable) -> Callable:
    """A method of a layer that makes tensors to keep: plain ones, of no graph, and not those of
    ``torch.inference_mode``, which no call outside it could write to."""

    @functools.wraps(method)
    def store(layer, *args, **kwargs):
        if not torch.is_inference_mode_enabled() and not torch.is_grad_enabled():
            return method(layer, *args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return method(layer, *args, **kwargs)

    return store


def without_autocast(method: Callable) -> Callable:
    """A method of a layer that autocast is not to touch: it would round rotations, and cannot join float16 scales."""

    @functools.wraps(method)
    def exact(layer, *args, **kwargs):
        kind = layer.device.type
        if not torch.is_autocast_enabled(kind):
            return method(layer, *args, **kwargs)
        with torch.autocast(kind, enabled=False):
            return method(layer, *args, **kwargs)

    return exact
