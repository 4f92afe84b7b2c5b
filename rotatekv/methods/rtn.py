"""RTN: plain round-to-nearest of post-RoPE keys and values, per token in groups of channels."""

from __future__ import annotations

from functools import cached_property

import torch

from rotatekv.config import QuantConfig
from rotatekv.kernels import dequantize, quantize
from rotatekv.kernels.decode_attention import DecodeOptions
from rotatekv.kernels.rope_tables import RopeTables
from rotatekv.methods.base import KVMethod, LayerGeometry, Packed, Statistics
from rotatekv.methods.stores import BlockStore, ChannelGroups, HeadForm

ROTATION_FLAGS = ("Grouped_Head_Key_Rotation", "Outlier_Aware_Key_Rotation")


class RTN(KVMethod):
    """Asymmetric per-token group quantization without any transform (the paper's RTN baseline)."""

    rotates = False
    fine = False  # the format of scales and zero points: quantize.quantize_groups
    unused_flags = ROTATION_FLAGS

    def __init__(self, config: QuantConfig, layer: LayerGeometry, statistics: Statistics | None = None):
        super().__init__(config, layer, statistics)
        self.k_clip_ratio, self.v_clip_ratio = config.k_clip_ratio, config.v_clip_ratio
        self.key_width = 0  # channels rotated together
        self._options: dict[tuple, DecodeOptions] = {}
        self.key_factor = self.key_offset = None  # what keys lack after the inverse rotation, (C,) Constants
        self.key_groups: ChannelGroups | None = ChannelGroups.consecutive(layer.channels, self.k_groupsize)
        self.value_groups = ChannelGroups.consecutive(layer.channels, self.v_groupsize)

    def encode_keys(self, channels: torch.Tensor) -> Packed:
        groups = self.key_groups.of_channel.on(channels.device)
        return quantize(channels, self.k_bits, self.k_groupsize, groups, self.k_clip_ratio, self.fine)

    def decode_keys(self, tokens: Packed) -> torch.Tensor:
        return dequantize(**tokens, group_of_channel=self.key_groups.of_channel.on(tokens["codes"].device))

    def encode_values(self, channels: torch.Tensor) -> Packed:
        groups = self.value_groups.of_channel.on(channels.device)
        return quantize(channels, self.v_bits, self.v_groupsize, groups, self.v_clip_ratio, self.fine)

    def decode_values(self, tokens: Packed) -> torch.Tensor:
        return dequantize(**tokens, group_of_channel=self.value_groups.of_channel.on(tokens["codes"].device))

    @cached_property
    def key_form(self) -> HeadForm:
        return HeadForm(
            self.layer.head_dim,
            self.key_groups,
            self.key_width,
            self.key_tokens_per_scale,
            self.key_factor,
            self.key_offset,
        )

    @cached_property
    def value_form(self) -> HeadForm:
        width = self.layer.head_dim if self.rotates else 0
        return HeadForm(self.layer.head_dim, self.value_groups, width)

    @property
    def can_fuse(self) -> bool:
        return self.layer.head_dim % 16 == 0 and self.v_groupsize % 16 == 0

    def decode_options(
        self, softmax_scale: float, rope: RopeTables | None, device: torch.device, sliding_window: int = 0
    ) -> DecodeOptions:
        """What the fused decode kernel must know of this layer; made once for the same arguments."""
        key = softmax_scale, rope, device, sliding_window
        if key not in self._options:
            self._options = {key: self._decode_options(*key)}
        return self._options[key]

    def _decode_options(
        self, softmax_scale: float, rope: RopeTables | None, device: torch.device, sliding_window: int
    ) -> DecodeOptions:
        return DecodeOptions(
            head_dim=self.layer.head_dim,
            key_bits=self.k_bits,
            value_bits=self.v_bits,
            softmax_scale=softmax_scale,
            rotation_width=self.key_width,
            rope=rope,
            unrotate_values=self.rotates,
            key_tokens_per_scale=self.key_tokens_per_scale,
            key_affine=self.key_form.affine_on(device),
            sliding_window=sliding_window,
        )

    def key_store(self) -> BlockStore:
        return BlockStore(self.k_bits, self.key_groups, self.k_clip_ratio, self.fine)

    def value_store(self) -> BlockStore:
        return BlockStore(self.v_bits, self.value_groups, self.v_clip_ratio, self.fine)
