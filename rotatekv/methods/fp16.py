"""FP16: the identity, in the model's own dtype. Gives the stock model's logits through the same cache."""

from __future__ import annotations

from dataclasses import fields, replace

import torch

from rotatekv.config import PRESETS, QuantConfig
from rotatekv.errors import UserError
from rotatekv.methods.base import KVMethod, LayerGeometry, Packed, Statistics


class FP16(KVMethod):
    """Stores post-RoPE keys and values as they are; the baseline of every table."""

    quantizes = False

    def __init__(self, config: QuantConfig, layer: LayerGeometry, statistics: Statistics | None = None):
        super().__init__(config, layer, statistics)
        preset = replace(PRESETS["FP16"], method=config.method)
        changed = [field.name for field in fields(config) if getattr(config, field.name) != getattr(preset, field.name)]
        if changed:
            raise UserError(f"FP16 quantizes nothing: leave out {', '.join(changed)}")

    def encode_keys(self, channels: torch.Tensor) -> Packed:
        return {"raw": channels}

    def decode_keys(self, tokens: Packed) -> torch.Tensor:
        return tokens["raw"]

    encode_values, decode_values = encode_keys, decode_keys
