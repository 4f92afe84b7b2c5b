"""Checks of tensors before their memory is handed to C++."""

from __future__ import annotations

import torch

from rotatekv.kernels.cpu.arguments import PackedPointers
from rotatekv.kernels.layout import BLOCK, HIGH_PLANE
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


def shape_of(x: torch.Tensor | None, dimensions: int, name: str) -> tuple[int, ...]:
    """The shape of a tensor of so many dimensions."""
    if not isinstance(x, torch.Tensor) or x.dim() != dimensions:
        raise ValueError(f"{name}: a tensor of {dimensions} dimensions is needed")
    return tuple(x.shape)


def packed_pointers(packed: Packed, bits: int, batch: int, channels: int, name: str) -> PackedPointers:
    """The addresses of one cache tensor's planes, scales and zeros, (B, N, ...) each."""
    if bits not in (2, 3, 4):
        raise ValueError(f"{name}: 2, 3 or 4 bits, not {bits}")
    planes = {"low", "scale", "zero"} | ({"high"} if bits in HIGH_PLANE else set())
    if set(packed) != planes:
        raise ValueError(f"{name}: {bits} bits need {sorted(planes)}, not {sorted(packed)}")
    blocks = shape_of(packed["low"], 3, f"{name}['low']")[1]
    groups = shape_of(packed["scale"], 4, f"{name}['scale']")[2]
    pointers = PackedPointers(blocks=blocks, groups=groups, bits=bits)
    shapes = {"low": (torch.int32, (batch, blocks, channels)),
              "scale": (torch.float16, (batch, blocks, groups, BLOCK)),
              "zero": (torch.int8, (batch, blocks, groups, BLOCK))}  # fmt: skip
    if bits in HIGH_PLANE:
        shapes["high"] = (HIGH_PLANE[bits][0], (batch, blocks, channels))
    for plane, (dtype, shape) in shapes.items():
        setattr(pointers, plane, pointer(packed[plane], dtype, shape, f"{name}[{plane!r}]"))
    return pointers
