"""Checks of tensors before their memory is handed to C++."""

from __future__ import annotations

import torch

from rotatekv.kernels.checks import packed_planes
from rotatekv.kernels.cpu.arguments import PackedPointers
from rotatekv.kernels.reference import Packed


def pointer(x: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...], name: str) -> int:
    """Address of a contiguous CPU tensor of just this dtype and shape.

    Raises:
        ValueError: it is another; one line says what is wrong.
    """
    if not isinstance(x, torch.Tensor):
        raise ValueError(f"{name}: a tensor is needed, not {type(x).__name__}")
    if x.device.type != "cpu":
        raise ValueError(f"{name}: it must be on the CPU, not on {x.device}")
    if x.dtype != dtype or tuple(x.shape) != shape:
        raise ValueError(f"{name}: {dtype} {shape} is needed, not {x.dtype} {tuple(x.shape)}")
    if not x.is_contiguous():
        raise ValueError(f"{name}: it must be contiguous")
    return x.data_ptr()


def packed_pointers(packed: Packed, bits: int, batch: int, channels: int, name: str) -> PackedPointers:
    """The addresses of one cache tensor's planes, scales and zeros, (B, N, ...) each."""
    blocks, groups, shapes = packed_planes(packed, bits, batch, channels, name)
    pointers = PackedPointers(blocks=blocks, groups=groups, bits=bits)
    for plane, (dtype, shape) in shapes.items():
        setattr(pointers, plane, pointer(packed[plane], dtype, shape, f"{name}[{plane!r}]"))
    return pointers
