"""RTN: plain round-to-nearest of post-RoPE keys and values, per token in groups of channels."""

from __future__ import annotations

from rotatekv.config import SUPPORTED_BITS, baseline
from rotatekv.methods.grouped import GroupedCodec
from rotatekv.methods.registry import register


@register("rtn", presets={f"RTN{bits}": baseline("rtn", bits) for bits in SUPPORTED_BITS})
class RTN(GroupedCodec):
    """The paper's RTN baseline: a ``GroupedCodec`` of keys and values as they are."""
