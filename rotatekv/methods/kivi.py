"""KIVI (arXiv 2402.02750): keys per channel in groups of tokens, values per token in groups of channels."""

from __future__ import annotations

from functools import cached_property

import torch

from rotatekv.config import QuantConfig, baseline
from rotatekv.kernels.layout import BLOCK
from rotatekv.kernels.quantize import dequantize_groups, quantize_groups
from rotatekv.methods.base import LayerGeometry, Statistics
from rotatekv.methods.formats import BlockFormat
from rotatekv.methods.grouped import GroupedCodec
from rotatekv.methods.registry import register
from rotatekv.methods.stores import Encoded, PlaneStore

DEFAULT_GROUP = 32  # tokens


def _preset(bits: int) -> QuantConfig:
    return baseline("kivi", bits, k_groupsize=32, v_groupsize=32, residual_length=128)  # its experimental settings


@register("kivi", presets={f"KIVI{bits}": _preset(bits) for bits in (2, 4)})
class KIVI(GroupedCodec):
    """Asymmetric rounding of post-RoPE keys per channel and of values per token (its algorithm 1).

    A channel of ``k_groupsize`` consecutive tokens shares a scale and a zero point, so that a channel that is large
    for every token costs the others nothing. The last ``residual_length`` tokens wait in 16 bits, and leave that
    window in whole groups: it holds ``residual_length`` … ``residual_length + k_groupsize − 1`` tokens of a long text.

    Keys are kept in a ``PlaneStore``, T a multiple of g = ``k_groupsize``, C = H_kv·D, N = ceil(T / 16):

        low, high  (B, N, C)              codes in blocks of 16 tokens (kernels/layout.py); head h has h·D … h·D + D − 1
        scale      (B, T / g, C) float16  of tokens g·r … g·r + g − 1 of the channel
        zero       (B, T / g, C) int8     ``x̂[t, c] = (code[t, c] − zero[t // g, c])·scale[t // g, c]``

    Groups count from a sequence's first token: rows of a padded batch are kept each alone (rotatekv/cache/parts.py).
    Where 16 divides g, the CPU's kernels decode and read them as they lie.
    """

    # AUTHORS: they keep T mod R keys (R = residual_length) in 16 bits and flush all R when they are full, but always
    # the last R values; here keys and values leave together, k_groupsize at a time, and never fewer than R stay.
    # AUTHORS: groups count from the left padding, so that a padded row is another one than alone.
    # AUTHORS: they store a group's minimum in 16 bits; here the zero point is an int8, as for every method, which
    # widens the scale of a group that lies further from 0 than 127 / (2^bits − 1) times its range.
    def __init__(self, config: QuantConfig, geometry: LayerGeometry, statistics: Statistics | None = None):
        super().__init__(config, geometry, statistics)
        self.tokens_per_flush = self.k_groupsize = config.k_groupsize or DEFAULT_GROUP

    @classmethod
    def check_key_groups(cls, config: QuantConfig, geometry: LayerGeometry) -> None:
        """Any number of tokens makes a group."""

    @cached_property
    def key_format(self) -> BlockFormat | None:
        if self.k_groupsize % BLOCK or self.geometry.channels % 16:  # a kernel wants one scale for a block's tokens
            return None
        return BlockFormat(self.k_bits, self.geometry.head_dim, groups=None, tokens_per_scale=self.k_groupsize)

    def key_store(self) -> PlaneStore:
        return PlaneStore(self.k_bits, self.tokens_per_flush)

    def encode_keys(self, channels: torch.Tensor) -> Encoded:
        """(B, T, C), T a multiple of g → ``codes`` (B, T, C), ``scale`` and ``zero`` (B, T / g, C)."""
        groups = channels.unflatten(1, (-1, self.k_groupsize)).transpose(2, 3)  # (B, T / g, C, g)
        codes, scale, zero = quantize_groups(groups, self.k_bits, self.k_groupsize, self.k_clip_ratio)
        codes = codes.transpose(2, 3).flatten(1, 2)  # (B, T, C)
        return {"codes": codes, "scale": scale.squeeze(-1), "zero": zero.squeeze(-1)}

    def decode_keys(self, tokens: Encoded) -> torch.Tensor:
        codes = tokens["codes"].unflatten(1, (-1, self.k_groupsize)).transpose(2, 3)  # (B, T / g, C, g)
        scale, zero = (tokens[name].unsqueeze(-1) for name in ("scale", "zero"))  # (B, T / g, C, 1)
        return dequantize_groups(codes, scale, zero).transpose(2, 3).flatten(1, 2)  # (B, T, C)
