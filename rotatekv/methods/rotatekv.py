"""RotateKV (arXiv 2501.16383): rotate groups of key heads before RoPE, quantize a token in groups of like channels."""

from __future__ import annotations

from functools import cached_property

import torch

from rotatekv.config import SUPPORTED_BITS, QuantConfig
from rotatekv.errors import UserError
from rotatekv.kernels.hadamard import channels_to_heads, head_group_size, heads_to_channels, rotate_channels
from rotatekv.methods.base import LayerGeometry, Statistics
from rotatekv.methods.formats import BlockFormat, ChannelGroups
from rotatekv.methods.grouped import GroupedCodec
from rotatekv.methods.registry import register


def _preset(bits: int) -> QuantConfig:
    clip_ratio = 0.8 if bits == 2 else 1.0
    return QuantConfig("rotatekv", k_bits=bits, v_bits=bits, k_clip_ratio=clip_ratio, v_clip_ratio=clip_ratio)


@register("rotatekv", presets={f"RotateKV{bits}": _preset(bits) for bits in SUPPORTED_BITS})
class RotateKV(GroupedCodec):
    """Round-to-nearest in the rotated space, in groups of like channels.

    Keys, Pre-RoPE Grouped-Head Rotation: the heads are cut into groups of G; the G·D channels of a group
    are multiplied by one Hadamard matrix, before RoPE. Outlier-Aware Rotation: channels of like size share a scale,
    whichever of the layer they are. Values: one Hadamard per head.

    Attributes:
        heads_per_group: G. key_width: G·D.
        order: (C,) int64, the paper's permutation of the rotated key channels; None: there is none.
    """

    # PAPER: the rotations of keys without a bias and of values are folded into the projection weights there. Here they
    # run as tokens are written, inside the kernel, and once on attention's output: the model's weights stay its own.
    flags = (*GroupedCodec.flags, "Grouped_Head_Key_Rotation", "Outlier_Aware_Key_Rotation")

    def __init__(self, config: QuantConfig, geometry: LayerGeometry, statistics: Statistics | None = None):
        super().__init__(config, geometry, statistics)
        self.keys_before_rope = config.Grouped_Head_Key_Rotation
        self.heads_per_group = key_heads_per_group(config, geometry)
        self.key_width = self.heads_per_group * geometry.head_dim
        self.order: torch.Tensor | None = None
        if config.Outlier_Aware_Key_Rotation:
            (self.order,) = self.use_statistics(statistics, "reorder_index")

    @classmethod
    def check(cls, config: QuantConfig, geometry: LayerGeometry) -> None:
        super().check(config, geometry)
        key_heads_per_group(config, geometry)
        if config.Outlier_Aware_Key_Rotation and not config.Grouped_Head_Key_Rotation:
            raise UserError(
                "Outlier_Aware_Key_Rotation reorders the channels of Grouped_Head_Key_Rotation: "
                "switch both off, or both on"
            )

    @classmethod
    def statistics_kind(cls, config: QuantConfig) -> str | None:
        return "reorder" if config.Outlier_Aware_Key_Rotation else None

    @cached_property
    def key_groups(self) -> ChannelGroups:
        if self.order is None:
            return super().key_groups
        # PAPER: permutes the channels. Nothing but their groups depends on it, so here they stay where they are.
        place = torch.argsort(self.order)  # of each channel in the permutation
        return ChannelGroups(place // self.k_groupsize)

    @cached_property
    def key_format(self) -> BlockFormat | None:
        return BlockFormat(self.k_bits, self.geometry.head_dim, self.key_groups, rotation_width=self.key_width)

    @cached_property
    def value_format(self) -> BlockFormat | None:
        head_dim = self.geometry.head_dim
        return BlockFormat(self.v_bits, head_dim, self.value_groups, rotation_width=head_dim)

    def keys_in(self, keys: torch.Tensor) -> torch.Tensor:
        return self.rotate_key_channels(heads_to_channels(keys).float())  # (B, T, H_kv·D)

    def keys_out(self, channels: torch.Tensor) -> torch.Tensor:
        unrotated = self.rotate_key_channels(channels.float(), inverse=True)
        return channels_to_heads(unrotated, self.geometry.head_dim)  # (B, H_kv, T, D)

    def values_in(self, values: torch.Tensor) -> torch.Tensor:
        return rotate_channels(heads_to_channels(values).float(), self.geometry.head_dim)  # (B, T, H_kv·D)

    def values_out(self, channels: torch.Tensor) -> torch.Tensor:
        unrotated = rotate_channels(channels.float(), self.geometry.head_dim, inverse=True)
        return channels_to_heads(unrotated, self.geometry.head_dim)  # (B, H_kv, T, D)

    def rotate_key_channels(self, channels: torch.Tensor, inverse: bool = False) -> torch.Tensor:
        """Pre-RoPE Grouped-Head Rotation of (..., H_kv·D) key channels."""
        return rotate_channels(channels, self.key_width, inverse)


def key_heads_per_group(config: QuantConfig, geometry: LayerGeometry) -> int:
    """G as it is used: 1 for the post-RoPE rotation, otherwise the largest legal one up to ``head_group_num``."""
    requested = config.head_group_num if config.Grouped_Head_Key_Rotation else 1
    return head_group_size(geometry.num_key_value_heads, geometry.head_dim, requested)
