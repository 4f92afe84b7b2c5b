"""Checks of tensors before their memory is handed to C++."""

from __future__ import annotations

import ctypes
import operator
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TypeVar

import torch

from rotatekv.kernels.checks import packed_planes, rope_planes, shape_of
from rotatekv.kernels.cpu.arguments import CodedPointers, FramePointers, HadamardBase, PackedPointers
from rotatekv.kernels.cpu.coded_tables import FrameTables, bits_of
from rotatekv.kernels.hadamard import base_matrix, hadamard_base
from rotatekv.kernels.layout import BLOCK, Blocks, Packed
from rotatekv.kernels.rope_tables import RopeTables
from rotatekv.kernels.transform_coding import NOISE, STEPS, Transform

_Arguments = TypeVar("_Arguments", bound=ctypes.Structure)


def pointer(x: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...], name: str) -> int:
    """Address of a contiguous CPU tensor of just this dtype and shape.

    Raises:
        ValueError: it is another; one line says what is wrong.
    """
    if not isinstance(x, torch.Tensor):
        raise ValueError(f"{name}: a tensor is needed, not {type(x).__name__}")
    if x.is_cpu and x.dtype == dtype and x.shape == shape and x.is_contiguous():
        return x.data_ptr()
    if not x.is_cpu:
        raise ValueError(f"{name}: it must be on the CPU, not on {x.device}")
    if x.dtype != dtype or x.shape != shape:
        raise ValueError(f"{name}: {dtype} {shape} is needed, not {x.dtype} {tuple(x.shape)}")
    raise ValueError(f"{name}: it must be contiguous")


def strided_pointer(x: torch.Tensor, dtypes: tuple[torch.dtype, ...], name: str) -> tuple[tuple[int, ...], int]:
    """Strides and address of a CPU tensor of one of these dtypes with a dense last dimension (ValueError otherwise)."""
    if not isinstance(x, torch.Tensor) or not x.is_cpu or x.dtype not in dtypes:
        raise ValueError(f"{name}: a tensor on the CPU of {' or '.join(map(str, dtypes))} is needed")
    strides = x.stride()
    if strides[-1] != 1 and x.shape[-1] > 1:
        raise ValueError(f"{name}: the last dimension must be dense")
    return strides, x.data_ptr()


def rope_pointers(rope: RopeTables) -> dict[str, int]:
    """The fields that say where a model's rope tables lie; their shapes are checked once for all calls."""
    rows, half, names = _check_rope(rope)
    addresses = {name: getattr(rope, name).data_ptr() for name in names}
    return {"rotary_dim": 2 * half, "coarse_rows": rows, **addresses}


@lru_cache(maxsize=8)
def _check_rope(rope: RopeTables) -> tuple[int, int, tuple[str, ...]]:
    """Rows of the coarse tables, rotary_dim / 2, and the tables' names."""
    rows, half, shapes = rope_planes(rope)
    for name, shape in shapes.items():
        pointer(getattr(rope, name), torch.float32, shape, name)
    return rows, half, tuple(shapes)


@lru_cache(maxsize=64)
def hadamard_base_pointer(order: int) -> HadamardBase:
    """The dense factor of a Hadamard matrix; nothing for 2^n, 12·2^n and 20·2^n, which have passes of their own."""
    base = hadamard_base(order)
    return HadamardBase() if base in (0, 1, 12, 20) else HadamardBase(base_matrix(base).data_ptr(), base)


def remembered(
    blocks: Packed, name: str, tensors: Sequence[torch.Tensor | None], numbers: tuple, make: Callable[[], _Arguments]
) -> _Arguments:
    """A copy of what ``make`` gives; ``Blocks`` keep it for the next call with the same tensors and numbers.

    Args:
        name: of what is made. tensors: all whose addresses are in it, at least.
    """
    if not isinstance(blocks, Blocks) or not all(x is None or isinstance(x, torch.Tensor) for x in tensors):
        return make()
    # The addresses too: share_memory_, which sending a cache to another process calls, moves a tensor's memory.
    key = numbers, [x if x is None else x.data_ptr() for x in tensors]
    kept = blocks.checked.get(name)
    if kept is None or kept[0] != key or not all(map(operator.is_, kept[1], tensors)):
        kept = blocks.checked[name] = key, tensors, make()
    return type(kept[2]).from_buffer_copy(kept[2])


def packed_pointers(
    packed: Packed, bits: int, batch: int, channels: int, name: str, tokens_per_scale: int = 0
) -> PackedPointers:
    """The addresses of one cache tensor's planes, scales and zeros, (B, ...) each."""
    blocks, groups, shapes = packed_planes(packed, bits, batch, channels, name, tokens_per_scale)
    rows = shapes["scale"][1][1] if tokens_per_scale else 0
    pointers = PackedPointers(
        blocks=blocks, groups=groups, bits=bits, tokens_per_scale=tokens_per_scale, scale_rows=rows
    )
    for plane, (dtype, shape) in shapes.items():
        setattr(pointers, plane, pointer(packed[plane], dtype, shape, f"{name}[{plane!r}]"))
    return pointers


def coded_pointers(packed: Packed, transform: Transform, batch: int, name: str) -> CodedPointers:
    """The addresses of the planes, (B, ...) each, of transform-coded keys or values."""
    if set(packed) != {"pairs", "singles", "scale"}:
        raise ValueError(f"{name}: a transform needs pairs, scale and singles, not {sorted(packed)}")
    blocks = shape_of(packed["scale"], 4, f"{name}['scale']")[1]
    pairs, singles = map(len, transform.planes)
    noise = [n / s**2 for n, s in zip(NOISE, STEPS, strict=True)] if transform.words_of_tokens else NOISE
    pointers = CodedPointers(
        bits=bits_of(transform).data_ptr(), blocks=blocks, pair_planes=pairs, single_planes=singles
    )
    pointers.noise = type(pointers.noise)(*noise)
    for plane, dtype, count in (
        ("pairs", torch.int32, pairs),
        ("singles", torch.int16, singles),
        ("scale", torch.uint8, len(transform.bits)),
    ):
        address = pointer(packed[plane], dtype, (batch, blocks, count, BLOCK), f"{name}[{plane!r}]")
        setattr(pointers, plane, address)
    return pointers


def frame_pointers(tables: FrameTables) -> FramePointers:
    addresses = {name: x.data_ptr() for name, x in vars(tables).items()}
    size, outputs, rank = tables.position_units.shape[1], tables.matrix.shape[2], 2 * tables.positions.shape[1]
    return FramePointers(**addresses, size=size, outputs=outputs, rank=rank)
