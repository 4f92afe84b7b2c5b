"""RotateKV+: centred, balanced and reordered keys, fine scales, a short recent window, and a bit more where it counts.

Ours, not the paper's: docs/beyond.md says what was tried, and what each part is worth.
"""

from __future__ import annotations

import torch

from rotatekv.config import SUPPORTED_BITS, QuantConfig
from rotatekv.errors import UserError
from rotatekv.kernels.layout import BLOCK
from rotatekv.methods.base import LayerGeometry, Statistics
from rotatekv.methods.rotatekv import RotateKV
from rotatekv.methods.stores import Constant


class RotateKVPlus(RotateKV):
    """Pre-RoPE Grouped-Head Rotation of keys that calibration has centred and balanced, then reordered by variance.

    Per key channel c before RoPE, calibration gives the mean μ_c and a factor s_c = (E q_c² / Var k_c)^¼. What is
    rotated and quantized is ``H·(s∘(k − μ))``; a read is ``k = (Hᵀ·x̂) / s + μ``, one multiply-add a channel.

    *Centred*: a key's mean is the same for every token, so it needs no bits; it is most of what the paper's reordering
    groups. *Balanced*: the rotation spreads rounding noise evenly over its channels, so channel c of a key gets noise
    in proportion to Σ (s·σ)² / s_c², which costs q_c² of it in the scores; the s above makes the sum of that least.
    *Reordered*: the rotated channels are still of unlike variance, since those of a key are correlated; like ones share
    a scale. The paper's order is by the sum, which is the mean that is gone here.
    *Fine*: the range is clipped about its middle, the zero point is kept in eighths and the scale in 8 bits
    (``quantize.quantize_groups``). *A bit more*: of all layers' keys and values, the ``extra_bit_share`` that
    calibration found most sensitive get a bit more than the others.
    *Massive*: a token with a massive activation is kept in 16 bits whenever it comes, not just in the first call: in
    each layer, one whose largest hidden-state entry is above a calibrated threshold.
    Tokens leave the recent window in blocks of 16, so it holds ``residual_length`` … ``residual_length + 15`` of them.
    """

    fine = True
    tokens_per_flush = BLOCK
    gives_extra_bits = finds_massive_tokens = True

    def __init__(self, config: QuantConfig, layer: LayerGeometry, statistics: Statistics | None = None):
        if not config.Grouped_Head_Key_Rotation:
            raise UserError("rotatekv_plus centres keys before RoPE: leave out --Grouped_Head_Key_Rotation False")
        super().__init__(config, layer, statistics)
        names = "key_mean", "key_scale", "reorder_index", "extra_bit_rank", "sink_threshold"
        mean, scale, _, rank, threshold = self.use_statistics(statistics, *names)
        self.sink_threshold = threshold.item()
        self.key_factor, self.key_offset = Constant(1 / scale), Constant(mean)
        if rank[0] < config.extra_bit_share:
            self.k_bits, self.k_clip_ratio = self._one_more(self.k_bits), _clip_of_one_more(self.k_clip_ratio)
        if rank[1] < config.extra_bit_share:
            self.v_bits, self.v_clip_ratio = self._one_more(self.v_bits), _clip_of_one_more(self.v_clip_ratio)

    @classmethod
    def statistics_kind(cls, config: QuantConfig) -> str:
        return "plus"

    def centre_key_channels(self, channels: torch.Tensor) -> torch.Tensor:
        return (channels - self.key_offset.on(channels.device)) / self.key_factor.on(channels.device)

    def uncentre_key_channels(self, channels: torch.Tensor) -> torch.Tensor:
        return self.key_form.affine_on(channels.device)(channels)

    @staticmethod
    def _one_more(bits: int) -> int:
        if bits + 1 not in SUPPORTED_BITS:
            raise UserError(f"extra_bit_share gives {bits + 1} bits where there are 4 at most: set it to 0")
        return bits + 1


def _clip_of_one_more(clip_ratio: float) -> float:
    """With a bit more, half as much is clipped."""
    return (1 + clip_ratio) / 2
