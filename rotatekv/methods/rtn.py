"""RTN: plain round-to-nearest of post-RoPE keys and values, per token in groups of channels."""

from __future__ import annotations

import torch

from rotatekv.config import QuantConfig
from rotatekv.errors import UserError
from rotatekv.kernels import dequantize, quantize
from rotatekv.methods.base import KVMethod, LayerGeometry, Packed
from rotatekv.stores import BlockStore

_ROTATION_FLAGS = ("Grouped_Head_Key_Rotation", "Outlier_Aware_Key_Rotation", "fuse_weights")


class RTN(KVMethod):
    """Asymmetric per-token group quantization without any transform (the paper's RTN baseline)."""

    rotates = False

    def __init__(self, config: QuantConfig, layer: LayerGeometry, reorder_index: torch.Tensor | None = None):
        super().__init__(config, layer, reorder_index)
        unused = [name for name in _ROTATION_FLAGS if getattr(config, name)]
        if unused and not self.rotates:
            raise UserError(f"RTN rotates nothing: leave out {', '.join(unused)}, or take a RotateKV method")

    def encode_keys(self, channels: torch.Tensor) -> Packed:
        return quantize(channels, self.config.k_bits, self.k_groupsize, self.config.k_clip_ratio)

    def decode_keys(self, tokens: Packed) -> torch.Tensor:
        return dequantize(tokens)

    def encode_values(self, channels: torch.Tensor) -> Packed:
        return quantize(channels, self.config.v_bits, self.v_groupsize, self.config.v_clip_ratio)

    def decode_values(self, tokens: Packed) -> torch.Tensor:
        return dequantize(tokens)

    def key_store(self) -> BlockStore:
        return BlockStore(self.config.k_bits)

    def value_store(self) -> BlockStore:
        return BlockStore(self.config.v_bits)
