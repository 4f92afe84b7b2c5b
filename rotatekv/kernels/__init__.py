"""Quantize-and-pack and its inverse. ``reference.py`` is the specification in plain torch."""

from rotatekv.kernels.reference import Packed, quantize_and_pack, unpack_and_dequantize

__all__ = ["Packed", "quantize_and_pack", "unpack_and_dequantize"]
