"""Triton kernels for CUDA: the packed cache written, dequantized for prefill, and attended over in decoding.

The layout is that of ``rotatekv.kernels.layout``, as on the CPU, so a cache can move between devices. Importing this
package needs no triton; calling it does. Run on CPU tensors with ``TRITON_INTERPRET=1`` set before triton is imported.

Status: correct under the interpreter; compiled without a GPU (``dry_run.py``) for sm_80, sm_86 and sm_90, within the
99 KB of shared memory that the smallest has and with at most 144 bytes of spills a thread (order 512); not run on a
GPU. A kernel that does not compile for a shape, or does not fit, is replaced by torch with one warning (``start.py``).
What index tensors hold (``group_of_channel``, ``order``, ``first``, exact rows and columns) is not checked: reading it
would make the host wait for the GPU.
"""

from __future__ import annotations

import warnings
from functools import lru_cache

import torch

from rotatekv.compat import check_version
from rotatekv.errors import UserError
from rotatekv.kernels.affine import Affine
from rotatekv.kernels.checks import shape_of
from rotatekv.kernels.reference import Packed
from rotatekv.kernels.reference_attention import DecodeOptions, ExactTokens, decode_attention_reference
from rotatekv.kernels.reference_blocks import dequantize_blocks_reference, quantize_into_blocks_reference
from rotatekv.kernels.rope_tables import RopeTables
from rotatekv.kernels.triton.checks import (
    check,
    check_affine,
    check_decode,
    check_packed,
    check_rope,
    refuse_token_groups,
)
from rotatekv.kernels.triton.start import Unusable
from rotatekv.transforms import channels_to_heads

__all__ = [
    "READS_TOKEN_GROUPS", "available", "decode_attention", "dequantize_blocks", "interpreted", "needs",
    "quantize_into_blocks", "set_dry",
]  # fmt: skip

READS_TOKEN_GROUPS = False
_OLDEST_GPU = 8  # compute capability


def available(device: torch.device | str = "cuda") -> bool:
    """Whether the kernels can run on tensors of ``device``: triton is there, and a GPU of sm_80 or later or its
    interpreter."""
    return _available(torch.device(device))


def needs() -> str:
    """What the kernels need, for an error's line."""
    return f"triton and a GPU of sm_{10 * _OLDEST_GPU} or later, or TRITON_INTERPRET=1 for tensors on the CPU"


@lru_cache(maxsize=64)
def _available(device: torch.device) -> bool:
    try:
        import triton

        check_version("triton", triton.__version__)
    except ImportError:
        return False
    except UserError as error:
        warnings.warn(f"RotateKV's Triton kernels are not used, torch is: {error}", RuntimeWarning, stacklevel=2)
        return False
    if device.type == "cuda":
        return torch.cuda.is_available() and torch.cuda.get_device_capability(device)[0] >= _OLDEST_GPU
    return device.type == "cpu" and (_dry or interpreted())


_dry = False


def set_dry(dry: bool) -> None:
    """Whether kernels take CPU tensors because nothing is launched: ``dry_run.py``."""
    global _dry
    _dry = dry
    _available.cache_clear()


def interpreted() -> bool:
    """Whether triton's interpreter is on, so that kernels take CPU tensors."""
    from triton import knobs

    return knobs.runtime.interpret


def decode_attention(
    queries: torch.Tensor,
    keys: Packed,
    values: Packed,
    group_of_channel: torch.Tensor,
    first: torch.Tensor,
    packed_tokens: int,
    total_tokens: int,
    options: DecodeOptions,
    exact: ExactTokens | None = None,
    splits: int | None = None,
) -> torch.Tensor:
    """Attention of the last T_q ≤ 16 tokens over a packed cache of ``total_tokens`` tokens, these included.

    Letters: B batch, H query heads, H_kv key/value heads, D head_dim, C = H_kv·D, N blocks of 16 tokens (at least
    ceil(packed_tokens / 16)). All tensors are contiguous, on one device; rope tables too.

    Args:
        queries: (B, H, T_q, D) float32, before RoPE if ``options.rope`` is there. Query i sees the tokens up to
            total_tokens − T_q + i. ``options.key_tokens_per_scale`` must be 0.
        keys, values: blocks (B, N, C) in the layout of ``rotatekv.kernels.layout``. Keys in Hadamard order; values
            rotated per head, quantization groups of consecutive channels.
        group_of_channel: (C,) int32, the quantization group of each key channel.
        first: (B,) int32, the first token of each sequence that is not padding; its position is 0.
        packed_tokens: tokens read from the blocks; later ones must be among ``exact``.
        exact: each (row, column) named once, rows ascending.
        splits: programs that share a sequence's blocks; None: two programs per multiprocessor in all.

    Returns:
        (B, H, T_q, D) float32; zeros for a query that sees no token.

    Raises:
        ValueError: a shape, dtype, stride or device is wrong.
        ImportError: triton is not installed.
    """
    check_decode(queries, keys, values, group_of_channel, first, packed_tokens, total_tokens, options, exact)
    from rotatekv.kernels.triton.launch import launch_decode

    step = (queries, keys, values, group_of_channel, first, packed_tokens, total_tokens, options, exact)
    try:
        return launch_decode(*step, splits)
    except Unusable:
        return decode_attention_reference(*step)


def quantize_into_blocks(
    x: torch.Tensor,
    packed: Packed,
    start: int,
    bits: int,
    group_size: int,
    clip_ratio: float = 1.0,
    order: torch.Tensor | None = None,
) -> None:
    """Quantize T tokens and write them in place into blocks, from token ``start`` on.

    Args:
        x: (B, T, C) float32, contiguous, in the space where ``group_size`` consecutive channels share a scale.
        packed: blocks (B, N, C) in the layout of ``rotatekv.kernels.layout``; start + T ≤ 16·N.
        order: (C,) int32, a permutation: channel j of ``x`` is stored as channel ``order[j]``. None: the same place.

    Raises:
        ValueError: a shape, dtype, stride or device is wrong.
        ImportError: triton is not installed.
    """
    batch, tokens, channels = shape_of(x, 3, "x")
    check(x, torch.float32, (batch, tokens, channels), x.device, "x")
    groups = check_packed(packed, bits, batch, channels, start + tokens, x.device, "packed")
    if group_size < 1 or group_size * groups != channels:
        raise ValueError(f"groups of {group_size} do not cut {channels} channels into {groups}")
    if start < 0 or not clip_ratio > 0:
        raise ValueError(f"start {start} and clip_ratio {clip_ratio}: need start ≥ 0 and clip_ratio > 0")
    if order is not None:
        check(order, torch.int32, (channels,), x.device, "order")
    from rotatekv.kernels.triton.quantize import launch_quantize

    try:
        launch_quantize(x, packed, start, bits, group_size, clip_ratio, order)
    except Unusable:
        quantize_into_blocks_reference(x, packed, start, bits, group_size, clip_ratio, order)


def dequantize_blocks(
    packed: Packed,
    tokens: int,
    bits: int,
    group_of_channel: torch.Tensor,
    head_dim: int,
    rotation_width: int = 0,
    rope: RopeTables | None = None,
    first: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    out: torch.Tensor | None = None,
    tokens_per_scale: int = 0,
    affine: Affine | None = None,
) -> torch.Tensor:
    """The first ``tokens`` tokens as heads of plain numbers, un-rotated.

    Args:
        packed: blocks (B, N, C); for keys in Hadamard order.
        group_of_channel: (C,) int32, the quantization group of each stored channel.
        rotation_width: W of the Hadamard matrix that is undone: G·D for keys, D for values, 0 for none.
        rope: turn each head at its position t − first, counted from 0; None: no turn.
        first: (B,) int32, the first token of each sequence that is not padding; None: 0.
        dtype: float32, float16 or bfloat16.
        out: (B, H_kv, T, D) with room for T ≥ ``tokens`` tokens, which the result is copied into.
        tokens_per_scale: must be 0: scales are per token.
        affine: applied to the channels after the inverse Hadamard; not together with ``rope``.

    Returns:
        (B, H_kv, T, D), ``out`` where that is given; with ``rope``, padding tokens hold numbers without meaning.

    Raises:
        ValueError: a shape, dtype, stride or device is wrong.
        ImportError: triton is not installed.
    """
    refuse_token_groups(tokens_per_scale)
    batch, _, channels = shape_of(packed.get("low"), 3, "packed['low']")
    device = packed["low"].device
    check_packed(packed, bits, batch, channels, tokens, device, "packed")
    check(group_of_channel, torch.int32, (channels,), device, "group_of_channel")
    if head_dim < 1 or channels % head_dim or rotation_width < 0 or (rotation_width and channels % rotation_width):
        raise ValueError(f"{channels} channels: no heads of {head_dim} or no rotation_width {rotation_width}")
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"dtype {dtype}: float32, float16 or bfloat16 is needed")
    first = torch.zeros(batch, dtype=torch.int32, device=device) if first is None else first
    check(first, torch.int32, (batch,), device, "first")
    check_rope(rope, head_dim, tokens, device)
    check_affine(affine, channels, device)
    if affine is not None and rope is not None:
        raise ValueError("affine and rope: channels with factors and offsets are read before RoPE")
    from rotatekv.kernels.triton.dequantize import launch_dequantize

    form = (packed, tokens, bits, group_of_channel, head_dim, rotation_width, rope, first, dtype)
    try:
        heads = channels_to_heads(launch_dequantize(*form, affine), head_dim)
    except Unusable:
        return dequantize_blocks_reference(*form, out, affine)
    if out is None:
        return heads
    out[:, :, :tokens] = heads
    return out
