"""QuaRot (arXiv 2404.00456): one Hadamard per head on post-RoPE keys and on values, then plain rounding."""

from __future__ import annotations

from rotatekv.methods.rotatekv import RotateKV


class QuaRot(RotateKV):
    """Its KV-cache quantization alone: RotateKV without grouped heads, reordering and sinks.

    Keys are rotated head by head after RoPE, values head by head (stage 2c), then each token
    is quantized asymmetrically in groups of head_dim, 128 in the paper, with a clip ratio of 0.95 (experimental setup).
    """

    # PAPER: queries are rotated as well and keys stay so; here keys are rotated back on read, which gives the same
    # scores. Weights and activations stay as they are: the rotation of the residual stream changes no key or value.
    unused_flags = ("Grouped_Head_Key_Rotation", "Outlier_Aware_Key_Rotation")
