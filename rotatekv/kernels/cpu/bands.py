"""Attention of blocks of queries to the last tokens before them, in C++."""

from __future__ import annotations

import ctypes

import torch

from rotatekv.kernels.attention_parts import Attended, Bands
from rotatekv.kernels.checks import shape_of
from rotatekv.kernels.cpu.arguments import BandArguments, HeadPointers
from rotatekv.kernels.cpu.calls import NUMBERS, call_library
from rotatekv.kernels.cpu.checks import pointer, strided_pointer


def attend_to_bands(
    query: torch.Tensor,
    heads: tuple[torch.Tensor, torch.Tensor],
    flushed: tuple[torch.Tensor, torch.Tensor],
    bands: Bands,
    scaling: float,
    older: Attended | None,
    output: torch.Tensor,
    threads: int | None = None,
    instruction_set: str | None = None,
) -> None:
    """As ``attend_to_bands_reference`` of ``rotatekv.kernels.attention_parts``; D is a multiple of 16.

    Args:
        query, heads: float32, float16 or bfloat16, alike; ``flushed`` and ``older.output`` may be others of these.
            Views whose last dimension is dense, as is that of ``output`` (B, N·Q, H, D) float32.

    Raises:
        ValueError: a shape, dtype, stride or index is wrong.
        RuntimeError: the kernel is not available, see ``available``.
    """
    batch, query_heads, queries, dim = shape_of(query, 4, "query")
    (blocks, columns), width = shape_of(bands.columns, 2, "columns"), shape_of(bands.is_seen, 3, "is_seen")[2]
    kv_heads, tokens, flushed_tokens = heads[0].shape[1], heads[0].shape[2], flushed[0].shape[2]
    if queries % max(blocks, 1):
        raise ValueError(f"{queries} queries are not {blocks} blocks")
    arguments = BandArguments(
        structure_bytes=ctypes.sizeof(BandArguments),
        batch=batch,
        heads=query_heads,
        kv_heads=kv_heads,
        head_dim=dim,
        blocks=blocks,
        queries=queries // max(blocks, 1),
        columns=columns,
        tokens=tokens,
        flushed_tokens=flushed_tokens,
        first_with_older=queries,
        seen_width=width,
        threads=threads or torch.get_num_threads(),
        number=_number(query, "query"),
        flushed_number=_number(flushed[0], "flushed_keys"),
        query=_heads(query, query.shape, query.dtype, "query"),
        output=_heads(output.transpose(1, 2), query.shape, torch.float32, "output"),
        column_index=pointer(bands.columns, torch.int32, (blocks, columns), "columns"),
        is_seen=pointer(bands.is_seen, torch.bool, (blocks, columns, width), "is_seen"),
        softmax_scale=scaling,
    )
    for prefix, pair, count in (("", heads, tokens), ("flushed_", flushed, flushed_tokens)):
        for kind, x in zip(("keys", "values"), pair, strict=True):
            dtype = flushed[0].dtype if prefix else query.dtype
            setattr(arguments, prefix + kind, _heads(x, (batch, kv_heads, count, dim), dtype, prefix + kind))
    if older is not None:
        shape = batch, query_heads, older.output.shape[1]
        arguments.first_with_older = queries - shape[2]
        arguments.older_number = _number(older.output, "older")
        arguments.older = _heads(older.output.transpose(1, 2), (*shape, dim), older.output.dtype, "older")
        logsumexp = older.logsumexp.transpose(1, 2).unsqueeze(-1)
        arguments.older_logsumexp = _heads(logsumexp, (*shape, 1), torch.float32, "older's logsumexp")
    call_library("bands", arguments, instruction_set)


def _heads(x: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, name: str) -> HeadPointers:
    """Of (B, heads, tokens, ·)."""
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name}: {tuple(shape)} is needed, not {tuple(x.shape)}")
    strides, address = strided_pointer(x, (dtype,), name)
    return HeadPointers(address, *strides[:3])


def _number(x: torch.Tensor, name: str) -> int:
    if x.dtype not in NUMBERS:
        raise ValueError(f"{name}: {x.dtype} is not read")
    return NUMBERS[x.dtype]
