"""QuaRot (arXiv 2404.00456): one Hadamard per head on post-RoPE keys and on values, then plain rounding."""

from __future__ import annotations

from rotatekv.config import SUPPORTED_BITS, QuantConfig, baseline
from rotatekv.methods.grouped import GroupedCodec
from rotatekv.methods.registry import register
from rotatekv.methods.rotatekv import RotateKV


def _preset(bits: int) -> QuantConfig:
    return baseline("quarot", bits, k_clip_ratio=0.95, v_clip_ratio=0.95)  # its experimental setup


@register("quarot", presets={f"QuaRot{bits}": _preset(bits) for bits in SUPPORTED_BITS})
class QuaRot(RotateKV):
    """Its KV-cache quantization alone: RotateKV without grouped heads, reordering and sinks.

    Keys are rotated head by head after RoPE, values head by head (stage 2c), then each token
    is quantized asymmetrically in groups of head_dim, 128 in the paper, with a clip ratio of 0.95 (experimental setup).
    """

    # PAPER: queries are rotated as well and keys stay so; here keys are rotated back on read, which gives the same
    # scores. Weights and activations stay as they are: the rotation of the residual stream changes no key or value.
    flags = GroupedCodec.flags
