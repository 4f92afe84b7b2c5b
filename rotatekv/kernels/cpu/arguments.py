"""The structures of ``arguments.h``, field by field."""

from __future__ import annotations

import ctypes


class PackedPointers(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("low", "high", "scale", "zero")] + [
        (name, ctypes.c_int64) for name in ("blocks", "groups", "bits", "tokens_per_scale", "scale_rows", "compact")
    ]


class HadamardBase(ctypes.Structure):
    _fields_ = [("matrix", ctypes.c_void_p), ("order", ctypes.c_int64)]


_DECODE_SIZES = [
    "structure_bytes",
    "batch",
    "query_heads",
    "kv_heads",
    "head_dim",
    "query_tokens",
    "packed_tokens",
    "total_tokens",
    "rotation_width",
    "rotary_dim",
    "coarse_rows",
    "exact_tokens",
    "exact_is_bfloat16",
    "unrotate_values",
    "sliding_window",
    "threads",
]
_DECODE_POINTERS = [
    "group_of_channel",
    "key_factor",
    "key_offset",
    "queries",
    "first_seen",
    "origin",
    "coarse_cos",
    "coarse_sin",
    "fine_cos",
    "fine_sin",
    "exact_batch_index",
    "exact_token_index",
    "exact_keys",
    "exact_values",
    "output",
]
_QUANTIZE_SIZES = [
    "structure_bytes",
    "batch",
    "kv_heads",
    "tokens",
    "head_dim",
    "batch_stride",
    "head_stride",
    "token_stride",
    "unrope_batch_stride",
    "unrope_token_stride",
    "number",
    "start",
    "rotation_width",
    "rotary_dim",
    "threads",
]
_DEQUANTIZE_SIZES = [
    "structure_bytes",
    "batch",
    "kv_heads",
    "head_dim",
    "tokens",
    "output_tokens",
    "rotation_width",
    "threads",
]


class DecodeArguments(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in _DECODE_SIZES),
        ("softmax_scale", ctypes.c_float),
        ("attention_scaling", ctypes.c_float),
        ("keys", PackedPointers),
        ("values", PackedPointers),
        ("key_base", HadamardBase),
        ("value_base", HadamardBase),
        *((name, ctypes.c_void_p) for name in _DECODE_POINTERS),
    ]


class QuantizeArguments(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in _QUANTIZE_SIZES),
        ("clip_ratio", ctypes.c_float),
        ("blocks", PackedPointers),
        ("base", HadamardBase),
        *((name, ctypes.c_void_p) for name in ("heads", "order", "factor", "offset", "cos", "sin")),
    ]


class DequantizeArguments(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in _DEQUANTIZE_SIZES),
        ("blocks", PackedPointers),
        ("base", HadamardBase),
        *((name, ctypes.c_void_p) for name in ("group_of_channel", "factor", "offset", "output")),
    ]
