"""RotateKV (arXiv 2501.16383): rotate groups of key heads before RoPE, quantize a token in groups of like channels."""

from __future__ import annotations

import torch

from rotatekv.config import QuantConfig
from rotatekv.errors import UserError
from rotatekv.kernels.hadamard import channels_to_heads, head_group_size, heads_to_channels, rotate_channels
from rotatekv.methods.base import LayerGeometry, Statistics
from rotatekv.methods.rtn import RTN
from rotatekv.methods.stores import ChannelGroups


class RotateKV(RTN):
    """Round-to-nearest in the rotated space, in groups of like channels.

    Keys, Pre-RoPE Grouped-Head Rotation: the heads are cut into groups of G; the G·D channels of a group
    are multiplied by one Hadamard matrix, before RoPE. Outlier-Aware Rotation: channels of like size share a scale,
    whichever of the layer they are. Values: one Hadamard per head.
    """

    rotates = True
    unused_flags = ()
    # PAPER: the rotations of keys without a bias and of values are folded into the projection weights there. Here they
    # run as tokens are written, inside the kernel, and once on attention's output: the model's weights stay its own.

    def __init__(self, config: QuantConfig, layer: LayerGeometry, statistics: Statistics | None = None):
        super().__init__(config, layer, statistics)
        self.keys_before_rope = config.Grouped_Head_Key_Rotation
        self.heads_per_group = key_heads_per_group(config, layer)
        self.key_width = self.heads_per_group * layer.head_dim
        self.order = None
        if config.Outlier_Aware_Key_Rotation:
            if not config.Grouped_Head_Key_Rotation:
                raise UserError(
                    "Outlier_Aware_Key_Rotation reorders the channels of Grouped_Head_Key_Rotation: "
                    "switch both off, or both on"
                )
            (self.order,) = self.use_statistics(statistics, "reorder_index")
            # PAPER: permutes the channels. Nothing but their groups depends on it, so here they stay where they are.
            place = torch.argsort(self.order)  # of each channel in the permutation
            self.key_groups = ChannelGroups(place // self.k_groupsize)

    @classmethod
    def statistics_kind(cls, config: QuantConfig) -> str | None:
        return "reorder" if config.Outlier_Aware_Key_Rotation else None

    def keys_in(self, keys: torch.Tensor) -> torch.Tensor:
        return self.rotate_key_channels(self.centre_key_channels(heads_to_channels(keys).float()))  # (B, T, H_kv·D)

    def keys_out(self, channels: torch.Tensor) -> torch.Tensor:
        rotated = rotate_channels(channels.float(), self.key_width, inverse=True)  # (B, T, H_kv·D)
        return channels_to_heads(self.uncentre_key_channels(rotated), self.layer.head_dim)  # (B, H_kv, T, D)

    def values_in(self, values: torch.Tensor) -> torch.Tensor:
        return rotate_channels(heads_to_channels(values).float(), self.layer.head_dim)  # (B, T, H_kv·D)

    def values_out(self, channels: torch.Tensor) -> torch.Tensor:
        unrotated = rotate_channels(channels.float(), self.layer.head_dim, inverse=True)
        return channels_to_heads(unrotated, self.layer.head_dim)  # (B, H_kv, T, D)

    def rotate_key_channels(self, channels: torch.Tensor) -> torch.Tensor:
        """Pre-RoPE Grouped-Head Rotation of (..., H_kv·D) key channels."""
        return rotate_channels(channels, self.key_width)

    def centre_key_channels(self, channels: torch.Tensor) -> torch.Tensor:
        """What a write does to (..., H_kv·D) key channels before it rotates them: here nothing."""
        return channels

    def uncentre_key_channels(self, channels: torch.Tensor) -> torch.Tensor:
        """What a read does to (..., H_kv·D) un-rotated key channels: here nothing."""
        return channels


def key_heads_per_group(config: QuantConfig, layer: LayerGeometry) -> int:
    """G as it is used: 1 for the post-RoPE rotation, otherwise the largest legal one up to ``head_group_num``."""
    requested = config.head_group_num if config.Grouped_Head_Key_Rotation else 1
    return head_group_size(layer.num_key_value_heads, layer.head_dim, requested)
