// Stored scales and zero points, see rotatekv/kernels/quantize.py.
#pragma once

#include "arguments.h"
#include "simd.h"

// kLanes consecutive scales from index `at` on.
static ROTATEKV_INLINE Vec load_scales(const PackedPointers& packed, int64_t at) {
    return load_halves(static_cast<const uint16_t*>(packed.scale) + at);
}

// kLanes consecutive zero points, in codes.
static ROTATEKV_INLINE Vec load_zeros(const PackedPointers& packed, int64_t at) {
    return load_bytes(packed.zero + at);
}
