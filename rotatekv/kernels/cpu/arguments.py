"""The structures of ``arguments.h``, field by field."""

from __future__ import annotations

import ctypes


class PackedPointers(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("low", "high", "scale", "zero")] + [
        (name, ctypes.c_int64) for name in ("blocks", "groups", "bits", "tokens_per_scale", "scale_rows")
    ]


class CodedPointers(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("pairs", "singles", "scale", "bits")),
        *((name, ctypes.c_int64) for name in ("blocks", "pair_planes", "single_planes")),
        ("noise", ctypes.c_float * 6),
    ]


class FramePointers(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("channel_factor", "matrix", "units", "positions", "position_units")),
        *((name, ctypes.c_int64) for name in ("size", "outputs", "rank")),
    ]


class HadamardBase(ctypes.Structure):
    _fields_ = [("matrix", ctypes.c_void_p), ("order", ctypes.c_int64)]


_TURNS = ["origin_cos", "origin_sin", "place_cos", "place_sin"]
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
    "dropped",
    "threads",
]
_DECODE_POINTERS = [
    "group_of_channel",
    "value_map",
    "value_mean",
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
_FRAME_WRITE_SIZES = [
    "structure_bytes",
    "batch",
    "kv_heads",
    "tokens",
    "head_dim",
    "batch_stride",
    "head_stride",
    "token_stride",
    "turn_batch_stride",
    "turn_token_stride",
    "number",
    "start",
    "rotary_dim",
    "threads",
    "words_of_tokens",
]
_COMPONENT_SIZES = [
    "structure_bytes",
    "batch",
    "kv_heads",
    "head_dim",
    "tokens",
    "output_tokens",
    "words_of_tokens",
    "threads",
    "rotary_dim",
    "turn_batch_stride",
    "turn_token_stride",
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
_BAND_SIZES = [
    "structure_bytes",
    "batch",
    "heads",
    "kv_heads",
    "head_dim",
    "blocks",
    "queries",
    "columns",
    "tokens",
    "flushed_tokens",
    "first_with_older",
    "seen_width",
    "number",
    "flushed_number",
    "older_number",
    "threads",
]
_BAND_HEADS = ["query", "keys", "values", "flushed_keys", "flushed_values", "older", "older_logsumexp", "output"]


class DecodeArguments(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in _DECODE_SIZES),
        ("softmax_scale", ctypes.c_float),
        ("attention_scaling", ctypes.c_float),
        ("keys", PackedPointers),
        ("values", PackedPointers),
        ("coded_keys", CodedPointers),
        ("coded_values", CodedPointers),
        ("frames", FramePointers),
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
        *((name, ctypes.c_void_p) for name in ("heads", "order", "cos", "sin")),
    ]


class DequantizeArguments(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in _DEQUANTIZE_SIZES),
        ("blocks", PackedPointers),
        ("base", HadamardBase),
        *((name, ctypes.c_void_p) for name in ("group_of_channel", "output")),
    ]


class FrameWriteArguments(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in _FRAME_WRITE_SIZES),
        ("coded", CodedPointers),
        *((name, ctypes.c_void_p) for name in ("heads", "map", "weights", "steps", "mean", *_TURNS)),
    ]


class ComponentArguments(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in _COMPONENT_SIZES),
        ("coded", CodedPointers),
        *((name, ctypes.c_void_p) for name in ("output", "map", "mean", *_TURNS)),
    ]


class HeadPointers(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("batch_stride", "head_stride", "token_stride")),
    ]


class BandArguments(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in _BAND_SIZES),
        *((name, HeadPointers) for name in _BAND_HEADS),
        ("column_index", ctypes.c_void_p),
        ("is_seen", ctypes.c_void_p),
        ("softmax_scale", ctypes.c_float),
    ]
