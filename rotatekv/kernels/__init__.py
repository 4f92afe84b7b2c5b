"""Quantize and its inverse. ``reference.py`` is the specification in plain torch."""

from rotatekv.kernels.quantize import Packed, dequantize, quantize

__all__ = ["Packed", "dequantize", "quantize"]
