// The two formats of scales and zero points, see rotatekv/kernels/quantize.py, and the factors and offsets of whole channels.
#pragma once

#include "arguments.h"
#include "simd.h"

constexpr float kZeroSteps = 8.0f;  // compact zero points of a code's step

// kLanes consecutive scales from index `at` on.
static ROTATEKV_INLINE Vec load_scales(const PackedPointers& packed, int64_t at) {
    if (packed.compact) return load_upper_halves(static_cast<const uint8_t*>(packed.scale) + at);
    return load_halves(static_cast<const uint16_t*>(packed.scale) + at);
}

// kLanes consecutive zero points, in codes.
static ROTATEKV_INLINE Vec load_zeros(const PackedPointers& packed, int64_t at) {
    const Vec zeros = load_bytes(packed.zero + at);
    return packed.compact ? zeros * (1.0f / kZeroSteps) : zeros;
}

// What un-rotated channels are multiplied by, and what is added then; null: nothing.
struct ChannelAffine {
    const float *factor, *offset;

    ChannelAffine from(int64_t channel) const {
        return factor ? ChannelAffine{factor + channel, offset + channel} : *this;
    }
    // x (channels, kLanes), in place.
    void apply(float* x, int64_t channels) const {
        for (int64_t i = 0; factor && i < channels; ++i)
            store(x + i * kLanes, load(x + i * kLanes) * factor[i] + offset[i]);
    }
};
