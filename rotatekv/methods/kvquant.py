"""KVQuant (arXiv 2401.18079): calibrated non-uniform levels, keys per channel before RoPE, 1 % outliers kept exact."""

from __future__ import annotations

import math

import torch

from rotatekv.config import SUPPORTED_BITS, QuantConfig, baseline
from rotatekv.errors import UserError
from rotatekv.methods.base import KVMethod, LayerGeometry, Statistics
from rotatekv.methods.nonuniform import nearest_level, split_values
from rotatekv.methods.registry import register
from rotatekv.methods.stores import Encoded, PlaneStore

OUTLIER_SHARE = 0.01  # of all numbers (Dense-and-Sparse Quantization)
_MOST_CHANNELS = 2**15  # int16 names an outlier's channel


def _preset(bits: int) -> QuantConfig:
    sinks = {"Attention_Sink_Aware": True, "sink_selection": "first", "num_sink_entries": 1}
    return baseline("kvquant", bits, **sinks)


@register("kvquant", presets={f"KVQuant{bits}": _preset(bits) for bits in SUPPORTED_BITS})
class KVQuant(KVMethod):
    """Dense-and-sparse quantization to non-uniform levels ("nuq").

    Keys: before RoPE, each channel is shifted and scaled to [-1, 1] by its calibrated range. Values: each token, all
    heads together, by its own range, found as it is written. Both are rounded to the nearest of 2^bits levels of the
    layer (nuqX), one set for keys and one for values.

    Outliers (dense-and-sparse): the ceil(1 % of H_kv·D) numbers of a token farthest outside their channel's range
    (keys) or from the token's median (values, left out of its range) are stored in float16 with their channel, and
    replace the decoded numbers.
    The first token stays in 16 bits (attention-sink-aware): the presets' ``sink_selection``.

    A token stores, per kind, ``codes`` (C,), ``outliers`` (n,) float16 and ``outlier_channels`` (n,) int16, and for
    values ``offset`` and ``scale`` (1,) float16. The statistics belong to the codec:
    ``key_offset``, ``key_scale`` (C,), ``key_levels<bits>``, ``value_levels<bits>`` (2^bits,), all float32.
    """

    # PAPER: outliers lie in a sparse matrix of any size per token. AUTHORS: their deployed kernels cap them per token,
    # at ⌊0.5 %⌋ + 1 above and as many below, float32 with an int32 channel, unused places zero
    # (SqueezeAILab/KVQuant, deployment/transformers/.../modeling_llama.py, QuantK); here the cap is 1 % in all, in
    # 32 bits a number, and every place is used.
    # PAPER: Q-Norm of its first versions is left out, as its last version does.

    keys_before_rope = True

    def __init__(self, config: QuantConfig, geometry: LayerGeometry, statistics: Statistics | None = None):
        super().__init__(config, geometry, statistics)
        self.outliers = outliers_per_token(geometry.channels)
        names = "key_offset", "key_scale", f"key_levels{config.k_bits}", f"value_levels{config.v_bits}"
        self.key_offset, self.key_scale, self.key_levels, self.value_levels = self.use_statistics(statistics, *names)

    @classmethod
    def check(cls, config: QuantConfig, geometry: LayerGeometry) -> None:
        super().check(config, geometry)
        if not 1 < geometry.channels <= _MOST_CHANNELS:
            raise UserError(f"KVQuant takes 2 to {_MOST_CHANNELS} key channels a layer, not {geometry.channels}")

    @classmethod
    def statistics_kind(cls, config: QuantConfig) -> str:
        return "kvquant"

    def encode_keys(self, channels: torch.Tensor) -> Encoded:
        channels = channels.float()
        offset, scale, levels = self._key_tables(channels.device)
        scaled = (channels - offset) / scale
        where = scaled.abs().topk(self.outliers, dim=-1).indices  # (B, T, n)
        return {"codes": nearest_level(scaled, levels), **_sparse(channels, where)}

    def decode_keys(self, tokens: Encoded) -> torch.Tensor:
        offset, scale, levels = self._key_tables(tokens["codes"].device)
        return _restore(levels[tokens["codes"].long()].mul_(scale).add_(offset), tokens)

    def encode_values(self, channels: torch.Tensor) -> Encoded:
        channels = channels.float()
        where, offset, scale = split_values(channels, self.outliers)
        levels = self.value_levels.to(channels.device)
        codes = nearest_level((channels - offset.float()) / scale.float(), levels)
        return {"codes": codes, "offset": offset, "scale": scale, **_sparse(channels, where)}

    def decode_values(self, tokens: Encoded) -> torch.Tensor:
        levels = self.value_levels.to(tokens["codes"].device)
        dense = levels[tokens["codes"].long()].mul_(tokens["scale"].float()).add_(tokens["offset"].float())
        return _restore(dense, tokens)

    def key_store(self) -> PlaneStore:
        return PlaneStore(self.k_bits)

    def value_store(self) -> PlaneStore:
        return PlaneStore(self.v_bits)

    def _key_tables(self, device: torch.device) -> tuple[torch.Tensor, ...]:
        return tuple(x.to(device) for x in (self.key_offset, self.key_scale, self.key_levels))


def outliers_per_token(channels: int) -> int:
    """How many of a token's ``channels`` keys, and of its values, are stored exactly."""
    return math.ceil(OUTLIER_SHARE * channels)


def _sparse(channels: torch.Tensor, where: torch.Tensor) -> Encoded:
    limit = torch.finfo(torch.float16).max
    values = channels.gather(-1, where).clamp(-limit, limit).half()
    return {"outliers": values, "outlier_channels": where.to(torch.int16)}


def _restore(dense: torch.Tensor, tokens: Encoded) -> torch.Tensor:
    """Put the exact outliers into decoded (B, T, C) numbers."""
    return dense.scatter_(-1, tokens["outlier_channels"].long(), tokens["outliers"].to(dense.dtype))
