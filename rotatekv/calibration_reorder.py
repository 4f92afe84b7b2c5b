"""Reorder indices from a calibration text, and the streamed pass that all kinds of statistics share."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from rotatekv.attention import project_qkv
from rotatekv.errors import UserError
from rotatekv.transforms import heads_to_channels, rotate_channels


def collect_key_sums(model: nn.Module, text_model: nn.Module, windows: Iterable[torch.Tensor]) -> torch.Tensor:
    """Sum the pre-RoPE keys over all tokens, per layer and channel, in one streamed pass.

    Memory does not grow with the text: rotation is linear, so the sum of rotated keys is the rotated sum.

    Args:
        model: not patched.
        windows: token ids, (1, T) each.

    Returns:
        (num_hidden_layers, H_kv·D) float64.
    """
    sums: list[torch.Tensor | None] = [None] * len(text_model.layers)

    def add_keys(number: int, keys: torch.Tensor) -> None:
        total = keys.double().sum(dim=(0, 1))
        sums[number] = total if sums[number] is None else sums[number] + total

    stream_keys(model, text_model, windows, add_keys)
    if sums[0] is None:
        raise UserError("the calibration text has no window to read")
    return torch.stack([total.cpu() for total in sums])


def stream_keys(
    model: nn.Module,
    text_model: nn.Module,
    windows: Iterable[torch.Tensor],
    take: Callable[[int, torch.Tensor], None],
) -> None:
    """Run an unpatched model over windows (1, T) of token ids; no gradients, nothing is kept.

    Args:
        take: gets the layer's number and its pre-RoPE keys, (B, T, H_kv·D), for every window.
    """

    def take_keys(attention: nn.Module, hidden_states: torch.Tensor) -> None:
        take(attention.layer_idx, heads_to_channels(project_qkv(attention, hidden_states)[1]))

    stream_modules(model, text_model, windows, [layer.self_attn for layer in text_model.layers], take_keys)


def stream_modules(
    model: nn.Module,
    text_model: nn.Module,
    windows: Iterable[torch.Tensor],
    modules: Iterable[nn.Module],
    take: Callable[[nn.Module, torch.Tensor], None],
) -> None:
    """The same with what comes into some modules: ``take`` gets the module and its (B, T, hidden_size)."""

    def give(module: nn.Module, args: tuple, kwargs: dict) -> None:
        take(module, args[0] if args else kwargs["hidden_states"])

    hooks = [module.register_forward_pre_hook(give, with_kwargs=True) for module in modules]
    try:
        with torch.no_grad():
            for window in windows:
                text_model(input_ids=window.to(model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()


def indices_from_key_sums(key_sums: torch.Tensor, width: int) -> torch.Tensor:
    """argsort over channels of the signed sum of the rotated keys (ascending, ties in channel order).

    Args:
        key_sums: (num_hidden_layers, H_kv·D).
        width: channels per rotation group, G·D.

    Returns:
        (num_hidden_layers, H_kv·D) int64.
    """
    return torch.argsort(rotate_channels(key_sums.double(), width), dim=-1, stable=True)
