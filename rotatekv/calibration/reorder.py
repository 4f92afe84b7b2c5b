"""Reorder indices from a calibration text."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from rotatekv.errors import UserError
from rotatekv.kernels.hadamard import heads_to_channels, rotate_channels
from rotatekv.patching.patch import first_geometry
from rotatekv.patching.watching import Attended, stream_attention


def collect_key_sums(model: nn.Module, text_model: nn.Module, windows: Iterable[torch.Tensor]) -> torch.Tensor:
    """Sum the pre-RoPE keys over all tokens, per layer and channel, in one streamed pass.

    Memory does not grow with the text: rotation is linear, so the sum of rotated keys is the rotated sum.

    Args:
        model: not patched.
        windows: token ids, (1, T) each.

    Returns:
        (num_hidden_layers, H_kv·D) float64; zeros for a layer without attention.
    """
    shape = len(text_model.layers), first_geometry(text_model).channels
    sums, calls = torch.zeros(shape, dtype=torch.float64, device="cpu"), 0

    def add_keys(attended: Attended) -> None:
        nonlocal calls
        sums[attended.layer] += heads_to_channels(attended.before_rope(attended.key)).double().sum(dim=(0, 1)).cpu()
        calls += 1

    stream_attention(model, text_model, windows, add_keys)
    if not calls:
        raise UserError("the calibration text has no window to read")
    return sums


def indices_from_key_sums(key_sums: torch.Tensor, width: int) -> torch.Tensor:
    """argsort over channels of the signed sum of the rotated keys (ascending, ties in channel order).

    Args:
        key_sums: (num_hidden_layers, H_kv·D).
        width: channels per rotation group, G·D.

    Returns:
        (num_hidden_layers, H_kv·D) int64.
    """
    return torch.argsort(rotate_channels(key_sums.double(), width), dim=-1, stable=True)
