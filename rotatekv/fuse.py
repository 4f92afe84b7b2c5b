"""Fold the write-side transforms into the projection weights, and take them out again bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from rotatekv.errors import UserError
from rotatekv.methods.rotatekv import RotateKV

Transform = Callable[[torch.Tensor], torch.Tensor]


def can_fold_keys(attention: nn.Module) -> bool:
    """Keys normalised after their projection (qwen3, olmo2) are rotated online instead."""
    return getattr(attention, "k_norm", None) is None


def check_foldable(attention: nn.Module) -> None:
    """Raises UserError where a projection is not a plain, loaded ``nn.Linear`` (bitsandbytes, offloaded, LoRA)."""
    for name in ("qkv_proj", "k_proj", "v_proj", "o_proj"):
        projection = getattr(attention, name, None)
        if projection is None:
            continue
        plain = type(projection) is nn.Linear and projection.weight.is_floating_point()
        if not plain or projection.weight.is_meta:
            raise UserError(
                f"{name} is not a plain loaded nn.Linear, nothing can be folded into it: --fuse_weights False"
            )


def fuse_weights(
    attention: nn.Module, method: RotateKV, saved: list[tuple[nn.Linear, str, nn.Parameter | None]]
) -> None:
    """Fold one layer's key rotation and reorder into ``k_proj`` and the value rotation into ``v_proj`` and ``o_proj``.

    The products are computed in float32 and stored in the weight's dtype. What ``method.layer`` says is folded is.

    Args:
        saved: gets (module, parameter name, original parameter or None) for ``restore_weights`` before each is
            replaced; the originals wait in host memory.
    """
    key_rows, value_rows = _rows(attention)
    if method.layer.keys_folded:
        _fold_outputs(*key_rows, method.transform_key_channels, saved, method.centre_key_channels)
    if method.layer.values_folded:
        _fold_outputs(*value_rows, method.transform_value_channels, saved)
        # o_proj reads rotated values: W·x = (W·Hᵀ)·(H·x), head by head along its input channels.
        _replace(attention.o_proj, "weight", lambda w: method.transform_value_channels(w), saved)


def restore_weights(saved: list[tuple[nn.Linear, str, nn.Parameter | None]]) -> None:
    """Put the original parameters back, the very same objects, where and in the dtype the model is by now."""
    for module, name, original in reversed(saved):
        if original is None:  # a bias that was not there
            setattr(module, name, None)
            continue
        folded = getattr(module, name)
        original.data = original.data.to(device=folded.device, dtype=folded.dtype)
        setattr(module, name, original)


def _rows(attention: nn.Module) -> tuple[tuple[nn.Linear, slice], tuple[nn.Linear, slice]]:
    """(projection, its output channels) of the keys and of the values."""
    if not hasattr(attention, "qkv_proj"):
        return (attention.k_proj, slice(None)), (attention.v_proj, slice(None))
    config, head_dim = attention.config, attention.head_dim
    start, width = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    return (
        (attention.qkv_proj, slice(start, start + width)),
        (attention.qkv_proj, slice(start + width, start + 2 * width)),
    )


def _fold_outputs(
    projection: nn.Linear, rows: slice, transform: Transform, saved: list, centre: Transform | None = None
) -> None:
    """Make ``projection`` yield transformed channels: its weight's rows and, not to be forgotten, its bias.

    Args:
        transform: linear. centre: comes before it and takes off a constant, which the bias does; it may be a new one.
    """
    # AUTHORS: projection biases are not rotated there, which breaks qwen2.

    def fold_weight(weight: torch.Tensor) -> torch.Tensor:
        weight[rows] = transform(weight[rows].T.contiguous()).T
        return weight

    def fold_bias(bias: torch.Tensor) -> torch.Tensor:
        bias[rows] = transform(bias[rows] if centre is None else centre(bias[rows]))
        return bias

    _replace(projection, "weight", fold_weight, saved)
    nothing = projection.weight.new_zeros(projection.weight.shape[0])
    if projection.bias is not None or fold_bias(nothing.float()).any():
        _replace(projection, "bias", fold_bias, saved)


def _replace(module: nn.Linear, name: str, fold: Transform, saved: list) -> None:
    original = getattr(module, name)
    weight = module.weight
    before = weight.new_zeros(weight.shape[0]) if original is None else original
    folded = fold(before.detach().float().clone()).to(weight.dtype)
    is_first = not any(kept is module and kept_name == name for kept, kept_name, _ in saved)
    if is_first:
        saved.append((module, name, original))
    setattr(module, name, nn.Parameter(folded, requires_grad=before.requires_grad))
    if is_first and original is not None:
        original.data = original.data.cpu()
