"""Transform-coded keys and values written and read in C++."""

from __future__ import annotations

import ctypes

import torch

from rotatekv.kernels.checks import check_maps, shape_of
from rotatekv.kernels.cpu.arguments import ComponentArguments, FrameWriteArguments
from rotatekv.kernels.cpu.calls import NUMBERS, call_library
from rotatekv.kernels.cpu.checks import coded_pointers, pointer, strided_pointer
from rotatekv.kernels.cpu.coded_tables import read_tables_of, write_tables_of
from rotatekv.kernels.layout import Packed
from rotatekv.kernels.transform_coding import Transform

Turns = tuple[torch.Tensor, ...]  # cos and sin of a frame's position, and cos and sin of a token's place in it


def quantize_into_frames(
    heads: torch.Tensor,
    packed: Packed,
    start: int,
    transform: Transform,
    turns: Turns | None = None,
    threads: int | None = None,
    instruction_set: str | None = None,
) -> None:
    """Map T tokens' keys or values, round them and write them in place into planes, from token ``start`` on.

    Args:
        heads: (B, H_kv, T, D) float32, float16 or bfloat16, keys as attention sees them, or values; a view whose last
            dimension is dense.
        packed: planes in the layout of ``rotatekv.kernels.transform_coding``; start + T ≤ 16·N.
        turns: of keys, without RoPE's factor, cos and sin of the position of each token's frame, and cos and sin of its
            own, counted from there; (B, T, rotary_dim / 2) float32 each, views alike whose last dimension is dense.
            None: values, or keys that are not turned.

    Raises:
        ValueError: a shape, dtype, stride or index is wrong.
        RuntimeError: the kernel is not available, see ``available``.
    """
    batch, kv_heads, tokens, dim = shape_of(heads, 4, "heads")
    check_maps(transform, kv_heads, dim, "heads")
    strides, address = strided_pointer(heads, tuple(NUMBERS), "heads")
    tables = write_tables_of(transform)
    arguments = FrameWriteArguments(
        structure_bytes=ctypes.sizeof(FrameWriteArguments),
        batch=batch,
        kv_heads=kv_heads,
        tokens=tokens,
        head_dim=dim,
        batch_stride=strides[0],
        head_stride=strides[1],
        token_stride=strides[2],
        number=NUMBERS[heads.dtype],
        start=start,
        threads=threads or torch.get_num_threads(),
        coded=coded_pointers(packed, transform, batch, "packed"),
        words_of_tokens=transform.words_of_tokens,
        heads=address,
        **{name: getattr(tables, name).data_ptr() for name in ("map", "mean", "weights", "steps")},
    )
    if turns is not None:
        _set_turns(arguments, turns)
    call_library("frames", arguments, instruction_set)


def read_components(
    packed: Packed,
    tokens: int,
    transform: Transform,
    out: torch.Tensor,
    threads: int | None = None,
    instruction_set: str | None = None,
) -> None:
    """The components of the first ``tokens`` tokens, as they read.

    Args:
        packed: planes in the layout of ``rotatekv.kernels.transform_coding``.
        out: (B, H_kv, T, D) float32, contiguous, with room for T ≥ ``tokens`` tokens; later ones stay as they are.

    Raises:
        ValueError: a shape, dtype, stride or index is wrong.
        RuntimeError: the kernel is not available, see ``available``.
    """
    arguments = _component_arguments(packed, tokens, transform, out, threads)
    call_library("components", arguments, instruction_set)


def read_heads(
    packed: Packed,
    tokens: int,
    transform: Transform,
    out: torch.Tensor,
    turns: Turns | None = None,
    threads: int | None = None,
    instruction_set: str | None = None,
) -> None:
    """The first ``tokens`` tokens as attention sees them: ``read_components``, the inverse map, the mean and RoPE.

    Args:
        packed, out: as of ``read_components``. turns: of keys, as of ``quantize_into_frames``.

    Raises:
        ValueError: a shape, dtype, stride or index is wrong.
        RuntimeError: the kernel is not available, see ``available``.
    """
    arguments = _component_arguments(packed, tokens, transform, out, threads)
    arguments.map, arguments.mean = (x.data_ptr() for x in read_tables_of(transform))
    if turns is not None:
        _set_turns(arguments, turns)
    call_library("components", arguments, instruction_set)


def _component_arguments(
    packed: Packed, tokens: int, transform: Transform, out: torch.Tensor, threads: int | None
) -> ComponentArguments:
    batch, kv_heads, room, dim = shape_of(out, 4, "out")
    check_maps(transform, kv_heads, dim, "out")
    return ComponentArguments(
        structure_bytes=ctypes.sizeof(ComponentArguments),
        batch=batch,
        kv_heads=kv_heads,
        head_dim=dim,
        tokens=tokens,
        output_tokens=room,
        words_of_tokens=transform.words_of_tokens,
        threads=threads or torch.get_num_threads(),
        coded=coded_pointers(packed, transform, batch, "packed"),
        output=pointer(out, torch.float32, tuple(out.shape), "out"),
    )


def _set_turns(arguments: FrameWriteArguments | ComponentArguments, turns: Turns) -> None:
    shape, strides = shape_of(turns[0], 3, "cos"), turns[0].stride()
    if shape[:2] != (arguments.batch, arguments.tokens):
        raise ValueError("cos and sin: (B, T, rotary_dim / 2) as the heads have it are needed")
    for name, x in zip(("origin_cos", "origin_sin", "place_cos", "place_sin"), turns, strict=True):
        found, address = strided_pointer(x, (torch.float32,), name)
        if x.shape != shape or found != strides:
            raise ValueError(f"{name}: the shape and strides of the others are needed")
        setattr(arguments, name, address)
    arguments.rotary_dim = 2 * shape[2]
    arguments.turn_batch_stride, arguments.turn_token_stride, _ = strides
