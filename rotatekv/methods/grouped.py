"""Asymmetric rounding of each token in groups of channels: what RTN is, and what rotations come before in its heirs."""

from __future__ import annotations

from functools import cached_property

import torch

from rotatekv.config import QuantConfig
from rotatekv.errors import UserError
from rotatekv.kernels.quantize import dequantize, quantize
from rotatekv.methods.base import KVMethod, LayerGeometry, Statistics
from rotatekv.methods.formats import BlockFormat, ChannelGroups
from rotatekv.methods.stores import BlockStore, Encoded, Store


class GroupedCodec(KVMethod):
    """The channels of a group share a token's scale and zero point (kernels/quantize.py).

    An heir says what keys and values go through before (``keys_in``, ``values_in``), how a kernel undoes it
    (``key_format``, ``value_format``), and which channels make a group (``key_groups``).
    """

    flags: tuple[str, ...] = ("k_groupsize", "v_groupsize", "k_clip_ratio", "v_clip_ratio")

    def __init__(self, config: QuantConfig, geometry: LayerGeometry, statistics: Statistics | None = None):
        super().__init__(config, geometry, statistics)
        self.k_groupsize = config.k_groupsize or geometry.head_dim
        self.v_groupsize = config.v_groupsize or geometry.head_dim
        self.k_clip_ratio, self.v_clip_ratio = config.k_clip_ratio, config.v_clip_ratio

    @classmethod
    def check(cls, config: QuantConfig, geometry: LayerGeometry) -> None:
        super().check(config, geometry)
        cls.check_key_groups(config, geometry)
        if config.v_groupsize and geometry.head_dim % config.v_groupsize:
            fits = _largest_divisor(geometry.head_dim, config.v_groupsize)
            raise UserError(
                f"v_groupsize {config.v_groupsize} does not divide head_dim {geometry.head_dim}: "
                f"--v_groupsize {fits} does"
            )

    @classmethod
    def check_key_groups(cls, config: QuantConfig, geometry: LayerGeometry) -> None:
        if config.k_groupsize and geometry.channels % config.k_groupsize:
            fits = _largest_divisor(geometry.channels, config.k_groupsize)
            raise UserError(
                f"k_groupsize {config.k_groupsize} does not divide the {geometry.channels} key channels "
                f"({geometry.num_key_value_heads} heads × {geometry.head_dim}): --k_groupsize {fits} does"
            )

    @cached_property
    def key_groups(self) -> ChannelGroups:
        return ChannelGroups.consecutive(self.geometry.channels, self.k_groupsize)

    @cached_property
    def value_groups(self) -> ChannelGroups:
        return ChannelGroups.consecutive(self.geometry.channels, self.v_groupsize)

    @cached_property
    def key_format(self) -> BlockFormat | None:
        return BlockFormat(self.k_bits, self.geometry.head_dim, self.key_groups)

    @cached_property
    def value_format(self) -> BlockFormat | None:
        return BlockFormat(self.v_bits, self.geometry.head_dim, self.value_groups)

    def encode_keys(self, channels: torch.Tensor) -> Encoded:
        groups = self.key_groups.of_channel.on(channels.device)
        return quantize(channels, self.k_bits, self.k_groupsize, groups, self.k_clip_ratio)

    def decode_keys(self, tokens: Encoded) -> torch.Tensor:
        return dequantize(**tokens, group_of_channel=self.key_groups.of_channel.on(tokens["codes"].device))

    def encode_values(self, channels: torch.Tensor) -> Encoded:
        groups = self.value_groups.of_channel.on(channels.device)
        return quantize(channels, self.v_bits, self.v_groupsize, groups, self.v_clip_ratio)

    def decode_values(self, tokens: Encoded) -> torch.Tensor:
        return dequantize(**tokens, group_of_channel=self.value_groups.of_channel.on(tokens["codes"].device))

    def key_store(self) -> Store:
        return BlockStore(self.k_bits, self.key_groups, self.k_clip_ratio)

    def value_store(self) -> Store:
        return BlockStore(self.v_bits, self.value_groups, self.v_clip_ratio)


def _largest_divisor(n: int, most: int) -> int:
    """The largest divisor of n up to ``most``."""
    return next(size for size in range(min(n, most), 0, -1) if n % size == 0)
