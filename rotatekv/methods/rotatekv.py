"""RotateKV (arXiv 2501.16383): rotate groups of key heads before RoPE, reorder the channels, quantize per token."""

from __future__ import annotations

import torch

from rotatekv.config import QuantConfig
from rotatekv.errors import UserError
from rotatekv.methods.base import LayerGeometry, Statistics
from rotatekv.methods.rtn import RTN
from rotatekv.stores import Constant, StoredOrder
from rotatekv.transforms import (
    channels_to_heads,
    head_group_size,
    heads_to_channels,
    rotate_channels,
)


class RotateKV(RTN):
    """Round-to-nearest in the rotated and reordered space.

    Keys, Pre-RoPE Grouped-Head Rotation: the heads are cut into groups of G; the G·D channels of a group
    are multiplied by one Hadamard matrix, before RoPE. Outlier-Aware Rotation: the layer's channels are
    then permuted so that channels of like size share a scale. Values: one Hadamard per head.
    What is folded into the projection weights is skipped on write (values: on read as well, ``o_proj`` undoes it).
    """

    rotates = True
    unused_flags = ()

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
            # Blocks hold keys in Hadamard order, so that a kernel reads without an inverse permutation
            # (kernels/layout.py); a stored channel's group is then that of its reordered place.
            self.stored_order = StoredOrder.of(self.order)
            self.group_of_channel = Constant(self.stored_order.stored(self.group_of_channel.tensor))

    @classmethod
    def statistics_kind(cls, config: QuantConfig) -> str | None:
        return "reorder" if config.Outlier_Aware_Key_Rotation else None

    def keys_in(self, keys: torch.Tensor) -> torch.Tensor:
        channels = heads_to_channels(keys)  # (B, T, H_kv·D)
        if self.layer.keys_folded:
            return channels
        return self.transform_key_channels(self.centre_key_channels(channels.float()))

    def keys_out(self, channels: torch.Tensor) -> torch.Tensor:
        if self.stored_order is not None:
            channels = self.stored_order.stored(channels)
        rotated = rotate_channels(channels.float(), self.key_width, inverse=True)  # (B, T, H_kv·D)
        return channels_to_heads(self.uncentre_key_channels(rotated), self.layer.head_dim)  # (B, H_kv, T, D)

    def values_in(self, values: torch.Tensor) -> torch.Tensor:
        channels = heads_to_channels(values)  # (B, T, H_kv·D)
        return channels if self.layer.values_folded else self.transform_value_channels(channels.float())

    def values_out(self, channels: torch.Tensor) -> torch.Tensor:
        if self.unrotates_values:
            channels = rotate_channels(channels.float(), self.layer.head_dim, inverse=True)
        return channels_to_heads(channels, self.layer.head_dim)  # (B, H_kv, T, D)

    def rotate_key_channels(self, channels: torch.Tensor) -> torch.Tensor:
        """Pre-RoPE Grouped-Head Rotation of (..., H_kv·D) key channels."""
        return rotate_channels(channels, self.key_width)

    def centre_key_channels(self, channels: torch.Tensor) -> torch.Tensor:
        """What comes before ``transform_key_channels`` and is not linear: here nothing."""
        return channels

    def uncentre_key_channels(self, channels: torch.Tensor) -> torch.Tensor:
        """What a read does to (..., H_kv·D) un-rotated key channels: here nothing."""
        return channels

    def transform_key_channels(self, channels: torch.Tensor) -> torch.Tensor:
        """Rotation then reorder of (..., H_kv·D) key channels; what ``fuse_weights`` folds into ``k_proj``."""
        rotated = self.rotate_key_channels(channels)
        return rotated if self.stored_order is None else self.stored_order.quantized(rotated)

    def transform_value_channels(self, channels: torch.Tensor) -> torch.Tensor:
        """Per-head rotation of (..., n·D) channels; folded into ``v_proj``'s rows and ``o_proj``'s columns."""
        return rotate_channels(channels, self.layer.head_dim)


def key_heads_per_group(config: QuantConfig, layer: LayerGeometry) -> int:
    """G as it is used: 1 for the post-RoPE rotation, otherwise the largest legal one up to ``head_group_num``."""
    requested = config.head_group_num if config.Grouped_Head_Key_Rotation else 1
    return head_group_size(layer.num_key_value_heads, layer.head_dim, requested)
