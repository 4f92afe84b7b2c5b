"""RTN: plain round-to-nearest of post-RoPE keys and values, per token in groups of channels."""

from __future__ import annotations

import torch

from rotatekv.kernels import quantize_and_pack, unpack_and_dequantize
from rotatekv.methods.base import KVMethod, Packed


class RTN(KVMethod):
    """Asymmetric per-token group quantization without any transform (the paper's RTN baseline)."""

    def encode_keys(self, channels: torch.Tensor) -> Packed:
        return quantize_and_pack(channels, self.config.k_bits, self.k_groupsize, self.config.k_clip_ratio)

    def decode_keys(self, packed: Packed) -> torch.Tensor:
        return unpack_and_dequantize(packed, self.config.k_bits)

    def encode_values(self, channels: torch.Tensor) -> Packed:
        return quantize_and_pack(channels, self.config.v_bits, self.v_groupsize, self.config.v_clip_ratio)

    def decode_values(self, packed: Packed) -> torch.Tensor:
        return unpack_and_dequantize(packed, self.config.v_bits)
