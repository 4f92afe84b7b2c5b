"""Triton kernels for CUDA: the packed cache written, dequantized for prefill, and attended over in decoding.

The layouts are those of ``rotatekv.kernels.layout`` and ``rotatekv.kernels.transform_coding``, as on the CPU, so a
cache can move between devices; ``coded_*.py`` are the kernels of transform-coded tokens, ``grouped_*.py`` those of keys
that meet the query as codes. Importing this package needs
no triton; calling it does. Run on CPU tensors with ``TRITON_INTERPRET=1`` set before triton is imported.

Status: correct under the interpreter; compiled without a GPU (``dry_run.py``) for sm_80, sm_86 and sm_90; not run on
one. docs/gpu.md says what the decode kernels take. Those that read codes spill nothing; the one of the paper's keys
spills up to 56 bytes a thread at W = 512 with Triton 3.9, and for W = 1024, four heads of 256, takes more shared memory
than sm_86 has. A kernel that does not compile for a shape, or does not fit, is replaced by torch with one warning
(``start.py``).
What index tensors hold (``group_of_channel``, ``order``, ``first_seen``, ``origin``, the exact tokens') is not
checked: reading it would make the host wait for the GPU, which it does once for each ``group_of_channel``. A position
past the RoPE tables reads their last row.
"""

from __future__ import annotations

import warnings
from functools import lru_cache

import torch

from rotatekv.compat import check_version
from rotatekv.errors import UserError
from rotatekv.kernels.blocks import dequantize_blocks_reference, quantize_into_blocks_reference
from rotatekv.kernels.checks import shape_of
from rotatekv.kernels.decode_attention import DecodeOptions, ExactTokens, decode_attention_reference
from rotatekv.kernels.frames import Turns, quantize_into_frames_reference
from rotatekv.kernels.layout import Packed
from rotatekv.kernels.transform_coding import Transform, dequantize_components, unpack_components
from rotatekv.kernels.triton.checks import (
    FLOATS,
    check,
    check_decode,
    check_heads,
    check_packed,
    check_planes,
    check_transform,
    check_turns,
    check_unrope,
    check_width,
    refuse_token_groups,
)
from rotatekv.kernels.triton.start import Unusable

__all__ = [
    "ATTENDS_TO_BANDS",
    "READS_HEADS",
    "READS_TOKEN_GROUPS",
    "available",
    "decode_attention",
    "dequantize_blocks",
    "interpreted",
    "needs",
    "quantize_into_blocks",
    "quantize_into_frames",
    "read_components",
    "set_dry",
]

ATTENDS_TO_BANDS = READS_HEADS = READS_TOKEN_GROUPS = False
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
    group_of_channel: torch.Tensor | None,
    first_seen: torch.Tensor,
    origin: torch.Tensor,
    packed_tokens: int,
    total_tokens: int,
    options: DecodeOptions,
    exact: ExactTokens | None = None,
    dropped: int = 0,
    splits: int | None = None,
) -> torch.Tensor:
    """Attention of the last T_q ≤ 16 tokens over a packed cache of ``total_tokens`` tokens, these included.

    Letters: B batch, H query heads, H_kv key/value heads, D head_dim, C = H_kv·D, N blocks of 16 tokens (at least
    ceil(packed_tokens / 16)). All tensors are contiguous, on one device; rope tables too.

    Args:
        queries: (B, H, T_q, D) after RoPE, float32, or float16 or bfloat16 of a model in 16 bits, for which products
            are about 2^-11 exact. Query i sees the tokens up to total_tokens − T_q + i, with
            ``options.sliding_window`` that many of them. ``options.key_tokens_per_scale`` must be 0.
        keys, values: blocks (B, N, C) in the layout of ``rotatekv.kernels.layout``. Keys in Hadamard order; values'
            quantization groups are consecutive channels. With ``options.key_transform`` and
            ``options.value_transform``, both or none: planes in the layout of ``rotatekv.kernels.transform_coding``.
        group_of_channel: (C,) int32, the quantization group of each key channel; None where keys are transform-coded.
        first_seen: (B,) int32, the first token of each sequence that is seen: earlier ones are padding.
        origin: (B,) int32, the RoPE position of token 0; negative positions count as 0.
        packed_tokens: tokens read from the blocks; later ones must be among ``exact``.
        exact: each (batch_index, token_index) named once, batch_index ascending.
        dropped: tokens before token 0, a multiple of 16, that are not kept any more: token c of transform-coded keys
            has the place c + dropped, which decides its frame.
        splits: programs that share a sequence's blocks; None: two programs per multiprocessor in all.

    Returns:
        (B, H, T_q, D) of the queries' dtype; zeros for a query that sees no token.

    Raises:
        ValueError: a shape, dtype, stride or device is wrong.
        ImportError: triton is not installed.
    """
    step = (queries, keys, values, group_of_channel, first_seen, origin, packed_tokens, total_tokens, options)
    check_decode(*step, exact, dropped)
    if exact is not None and not len(exact.batch_index):
        exact = None
    from rotatekv.kernels.triton.coded_launch import launch_coded_decode
    from rotatekv.kernels.triton.grouped_launch import launch_grouped_decode, meets_codes
    from rotatekv.kernels.triton.launch import launch_decode

    try:
        if group_of_channel is not None and options.key_transform is None:
            if not meets_codes(keys, values, group_of_channel, options):
                return launch_decode(*step, exact, splits)
            return launch_grouped_decode(
                queries, keys, values, first_seen, packed_tokens, total_tokens, options, exact, splits
            )
        return launch_coded_decode(
            queries, keys, values, first_seen, origin, packed_tokens, total_tokens, options, exact, dropped, splits
        )
    except Unusable:
        return decode_attention_reference(*step, exact, dropped).to(queries.dtype)


def quantize_into_blocks(
    heads: torch.Tensor,
    packed: Packed,
    start: int,
    bits: int,
    group_size: int,
    clip_ratio: float = 1.0,
    order: torch.Tensor | None = None,
    rotation_width: int = 0,
    unrope: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """Quantize T tokens and write them in place into blocks, from token ``start`` on; see
    ``blocks.quantize_into_blocks_reference`` for what comes before rounding.

    Args:
        heads: (B, H_kv, T, D) float32, float16 or bfloat16, of any strides but the last, which is 1.
        packed: blocks (B, N, C) in the layout of ``rotatekv.kernels.layout``; start + T ≤ 16·N.
        order: (C,) int32, a permutation: quantized channel j is channel ``order[j]``, and is stored there. None: the
            same place.
        rotation_width: W of the Hadamard matrix, whole heads; 0: none.
        unrope: cos and sin (B, T, rotary_dim / 2) float32, each row contiguous.

    Raises:
        ValueError: a shape, dtype, stride or device is wrong.
        ImportError: triton is not installed.
    """
    batch, count, tokens, dim = check_heads(heads)
    channels = count * dim
    groups = check_packed(packed, bits, batch, channels, start + tokens, heads.device, "packed")
    if group_size < 1 or group_size * groups != channels:
        raise ValueError(f"groups of {group_size} do not cut {channels} channels into {groups}")
    if start < 0 or not clip_ratio > 0:
        raise ValueError(f"start {start} and clip_ratio {clip_ratio}: need start ≥ 0 and clip_ratio > 0")
    if order is not None:
        check(order, torch.int32, (channels,), heads.device, "order")
    check_width(rotation_width, channels, dim)
    check_unrope(unrope, batch, tokens, dim, heads.device)
    from rotatekv.kernels.triton.quantize import launch_quantize

    step = (heads, packed, start, bits, group_size, clip_ratio, order, rotation_width, unrope)
    try:
        launch_quantize(*step)
    except Unusable:
        quantize_into_blocks_reference(*step)


def quantize_into_frames(
    heads: torch.Tensor, packed: Packed, start: int, transform: Transform, turns: Turns | None = None
) -> None:
    """Map T tokens' keys or values, round them and write them in place into planes, from token ``start`` on.

    Args:
        heads: (B, H_kv, T, D) float32, float16 or bfloat16, of any strides but the last, which is 1.
        packed: planes in the layout of ``rotatekv.kernels.transform_coding``; start + T ≤ 16·N.
        turns: of keys, without RoPE's factor, cos and sin of the position of each token's frame, and cos and sin of its
            own, counted from there: (B, T, rotary_dim / 2) float32, of the same strides, each row contiguous. None:
            values, or keys that are not turned.

    Raises:
        ValueError: a shape, dtype, stride or device is wrong.
        ImportError: triton is not installed.
    """
    batch, count, tokens, dim = check_heads(heads)
    check_transform(transform, count, dim, transform.words_of_tokens, "heads")
    check_planes(packed, transform, batch, start + tokens, heads.device, "packed")
    if start < 0:
        raise ValueError(f"start {start}: need start ≥ 0")
    check_turns(turns, batch, tokens, dim, heads.device)
    from rotatekv.kernels.triton.coded_write import launch_coded_write

    try:
        launch_coded_write(heads, packed, start, transform, turns)
    except Unusable:
        quantize_into_frames_reference(heads, packed, start, transform, turns)


def read_components(packed: Packed, tokens: int, transform: Transform, out: torch.Tensor) -> None:
    """The components of the first ``tokens`` tokens, as they read.

    Args:
        packed: planes in the layout of ``rotatekv.kernels.transform_coding``.
        out: (B, H_kv, T, D) float32, contiguous, with room for T ≥ ``tokens`` tokens; later ones stay as they are.

    Raises:
        ValueError: a shape, dtype, stride or device is wrong.
        ImportError: triton is not installed.
    """
    batch, count, room, dim = shape_of(out, 4, "out")
    check(out, torch.float32, (batch, count, max(room, tokens), dim), out.device, "out")
    check_transform(transform, count, dim, transform.words_of_tokens, "out")
    check_planes(packed, transform, batch, tokens, out.device, "packed")
    from rotatekv.kernels.triton.coded_read import launch_coded_read

    try:
        launch_coded_read(packed, tokens, transform, out)
    except Unusable:
        x = dequantize_components(*unpack_components(packed, tokens, transform), transform)  # (B, T, H_kv, D)
        out[:, :, :tokens] = x.transpose(1, 2)


def dequantize_blocks(
    packed: Packed,
    tokens: int,
    bits: int,
    group_of_channel: torch.Tensor,
    head_dim: int,
    rotation_width: int = 0,
    out: torch.Tensor | None = None,
    tokens_per_scale: int = 0,
) -> torch.Tensor:
    """The first ``tokens`` tokens as heads of plain numbers, un-rotated.

    Args:
        packed: blocks (B, N, C); for keys in Hadamard order.
        group_of_channel: (C,) int32, the quantization group of each stored channel.
        rotation_width: W of the Hadamard matrix that is undone, whole heads; 0: none.
        out: (B, H_kv, T, D) float32, float16 or bfloat16, contiguous, with room for T ≥ ``tokens`` tokens; later ones
            stay as they are. None: a new one of just ``tokens``, float32.
        tokens_per_scale: must be 0: scales are per token.

    Returns:
        (B, H_kv, T, D), ``out`` where that is given.

    Raises:
        ValueError: a shape, dtype, stride or device is wrong.
        ImportError: triton is not installed.
    """
    refuse_token_groups(tokens_per_scale)
    batch, _, channels = shape_of(packed.get("low"), 3, "packed['low']")
    device = packed["low"].device
    check_packed(packed, bits, batch, channels, tokens, device, "packed")
    check(group_of_channel, torch.int32, (channels,), device, "group_of_channel")
    check_width(rotation_width, channels, head_dim)
    shape = batch, channels // head_dim, tokens, head_dim
    if out is None:
        out = torch.empty(shape, dtype=torch.float32, device=device)
    room = shape_of(out, 4, "out")[2]
    check(out, FLOATS, (*shape[:2], max(room, tokens), head_dim), device, "out")
    from rotatekv.kernels.triton.dequantize import launch_dequantize

    try:
        launch_dequantize(packed, tokens, bits, group_of_channel, rotation_width, out)
    except Unusable:
        form = (packed, tokens, bits, group_of_channel, head_dim, rotation_width)
        out[:, :, :tokens] = dequantize_blocks_reference(*form)
    return out
