"""FP16: the identity, in the model's own dtype. Gives the stock model's logits through the same cache."""

from __future__ import annotations

from dataclasses import fields, replace

import torch

from rotatekv.config import QuantConfig, baseline
from rotatekv.errors import UserError
from rotatekv.methods.base import KVMethod, LayerGeometry
from rotatekv.methods.registry import register
from rotatekv.methods.stores import Encoded

_PRESET = baseline("fp16", bits=4)  # its bits mean nothing


@register("fp16", presets={"FP16": _PRESET})
class FP16(KVMethod):
    """Stores post-RoPE keys and values as they are; the baseline of every table."""

    @classmethod
    def check(cls, config: QuantConfig, geometry: LayerGeometry) -> None:
        preset = replace(_PRESET, method=config.method)
        changed = [field.name for field in fields(config) if getattr(config, field.name) != getattr(preset, field.name)]
        if changed:
            raise UserError(f"FP16 quantizes nothing: leave out {', '.join(changed)}")

    def encode_keys(self, channels: torch.Tensor) -> Encoded:
        return {"raw": channels}

    def decode_keys(self, tokens: Encoded) -> torch.Tensor:
        return tokens["raw"]

    encode_values, decode_values = encode_keys, decode_keys
