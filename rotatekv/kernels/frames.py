"""Transform-coded tokens written in plain torch, with the fused kernels' arguments: what these must compute."""

from __future__ import annotations

import torch

from rotatekv.kernels.layout import BLOCK, Packed
from rotatekv.kernels.rope_tables import turn_halves
from rotatekv.kernels.transform_coding import Transform, pack_components, quantize_components, unpack_components

Turns = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def quantize_into_frames_reference(
    heads: torch.Tensor, packed: Packed, start: int, transform: Transform, turns: Turns | None = None
) -> None:
    """Map (B, H_kv, T, D) heads less their mean, round them and write them into planes, from token ``start`` on.

    Args:
        turns: of keys, cos and sin of the position of each token's frame, that they are turned back by, and of its own,
            counted from there, that the mean is turned by; (B, T, rotary_dim / 2) float32 each. None: values, or keys
            that are not turned.
    """
    tokens = heads.shape[2]
    if not tokens:
        return
    transform = transform.on(heads.device)
    heads = heads.float()
    mean = transform.mean[None, :, None].expand_as(heads)
    if turns is not None:
        cos, sin, place_cos, place_sin = (x.unsqueeze(1) for x in turns)  # (B, 1, T, rotary_dim / 2)
        heads, mean = turn_halves(heads, cos, -sin), turn_halves(mean, place_cos, place_sin)
    new = quantize_components(((heads - mean) @ transform.maps.mT).transpose(1, 2), transform)
    first, last = start // BLOCK, -(-(start + tokens) // BLOCK)
    touched = {name: plane[:, first:last] for name, plane in packed.items()}
    both = unpack_components(touched, (last - first) * BLOCK, transform)
    before = start - first * BLOCK
    for old, x in zip(both, new, strict=True):
        old[:, before : before + tokens] = x
    for name, plane in pack_components(*both, transform).items():
        touched[name].copy_(plane)
