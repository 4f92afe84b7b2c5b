"""RotateKV+: centred, balanced, reordered keys, compact scales, a short recent window, one more bit where it counts.

Ours, not the paper's: docs/beyond.md says what was tried, and what each part is worth.
"""

from __future__ import annotations

from functools import cached_property

import torch

from rotatekv.config import SUPPORTED_BITS, QuantConfig
from rotatekv.errors import UserError
from rotatekv.kernels.hadamard import channels_to_heads, heads_to_channels
from rotatekv.kernels.layout import BLOCK
from rotatekv.methods.base import LayerGeometry, Statistics
from rotatekv.methods.formats import BlockFormat, PerDevice
from rotatekv.methods.registry import register
from rotatekv.methods.rotatekv import RotateKV


def _preset(bits: int) -> QuantConfig:
    clip_ratio = {2: 0.8, 3: 0.9, 4: 0.95}[bits]  # docs/beyond.md: tuned on WikiText-2 validation
    return QuantConfig(
        "rotatekv_plus",
        k_bits=bits,
        v_bits=bits,
        k_clip_ratio=clip_ratio,
        v_clip_ratio=clip_ratio,
        sink_selection="massive",
        residual_length=16,
        extra_bit_share=0.0 if bits == 4 else 0.2,
    )


@register("rotatekv_plus", presets={f"RotateKV{bits}+": _preset(bits) for bits in SUPPORTED_BITS})
class RotateKVPlus(RotateKV):
    """Pre-RoPE Grouped-Head Rotation of keys that calibration has centred and balanced, then reordered by variance.

    Per key channel c before RoPE, calibration gives the mean μ_c and a factor s_c = (E q_c² / Var k_c)^¼. What is
    rotated and quantized is ``H·(s∘(k − μ))``; a read is ``k = (Hᵀ·x̂) / s + μ``, one multiply-add a channel.

    *Centred*: a key's mean is the same for every token, so it needs no bits; it is most of what the paper's reordering
    groups. *Balanced*: the rotation spreads rounding noise evenly over its channels, so channel c of a key gets noise
    in proportion to Σ (s·σ)² / s_c², which costs q_c² of it in the scores; the s above makes the sum of that least.
    *Reordered*: the rotated channels are still of unlike variance, since those of a key are correlated; like ones share
    a scale. The paper's order is by the sum, which is the mean that is gone here.
    *Compact scales*: the range is clipped about its middle, the zero point is kept in eighths and the scale in 8 bits
    (``quantize.quantize_groups``). *One more bit*: of all layers' keys and values, the ``extra_bit_share`` that
    calibration found most sensitive get one more bit than the others.
    *Massive*: a token with a massive activation is kept in 16 bits whenever it comes, not just in the first call: in
    each layer, one whose largest hidden-state entry is above a calibrated threshold.
    Tokens leave the recent window in blocks of 16, so it holds ``residual_length`` … ``residual_length + 15`` of them.
    """

    flags = (*RotateKV.flags, "extra_bit_share")
    sink_selections = (*RotateKV.sink_selections, "massive")
    compact_scales = True
    tokens_per_flush = BLOCK

    def __init__(self, config: QuantConfig, geometry: LayerGeometry, statistics: Statistics | None = None):
        super().__init__(config, geometry, statistics)
        names = "key_mean", "key_scale", "reorder_index", "extra_bit_rank", "sink_threshold"
        mean, scale, _, rank, threshold = self.use_statistics(statistics, *names)
        self.sink_threshold = threshold.item()
        self.key_factor, self.key_offset = PerDevice(1 / scale), PerDevice(mean)
        if rank[0] < config.extra_bit_share:
            self.k_bits, self.k_clip_ratio = self.k_bits + 1, _clip_of_one_more(self.k_clip_ratio)
        if rank[1] < config.extra_bit_share:
            self.v_bits, self.v_clip_ratio = self.v_bits + 1, _clip_of_one_more(self.v_clip_ratio)

    @classmethod
    def check(cls, config: QuantConfig, geometry: LayerGeometry) -> None:
        if not config.Grouped_Head_Key_Rotation:
            raise UserError("rotatekv_plus centres keys before RoPE: leave out --Grouped_Head_Key_Rotation False")
        super().check(config, geometry)
        most = max(config.k_bits, config.v_bits) + 1
        if config.extra_bit_share and most not in SUPPORTED_BITS:
            raise UserError(f"extra_bit_share gives {most} bits where there are 4 at most: set it to 0")

    @classmethod
    def statistics_kind(cls, config: QuantConfig) -> str:
        return "plus"

    @cached_property
    def key_format(self) -> BlockFormat | None:
        affine: dict = {"factor": self.key_factor, "offset": self.key_offset}
        return BlockFormat(self.k_bits, self.geometry.head_dim, self.key_groups, self.key_width, **affine)

    def keys_in(self, keys: torch.Tensor) -> torch.Tensor:
        channels = heads_to_channels(keys).float()
        channels = (channels - self.key_offset.on(keys.device)) / self.key_factor.on(keys.device)
        return self.rotate_key_channels(channels)  # (B, T, H_kv·D)

    def keys_out(self, channels: torch.Tensor) -> torch.Tensor:
        unrotated = self.rotate_key_channels(channels.float(), inverse=True)
        centred = unrotated * self.key_factor.on(channels.device) + self.key_offset.on(channels.device)
        return channels_to_heads(centred, self.geometry.head_dim)  # (B, H_kv, T, D)


def _clip_of_one_more(clip_ratio: float) -> float:
    """With one more bit, half as much is clipped."""
    return (1 + clip_ratio) / 2
