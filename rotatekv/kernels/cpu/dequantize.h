// x̂ = (code − zero)·scale for kLanes tokens of a block, one channel at a time.
#pragma once

#include "arguments.h"
#include "simd.h"

// scale and −zero·scale of kLanes tokens in float32, (groups, 2, kLanes). Both products are exact in float32.
static void load_scales(const PackedPointers& packed, int64_t block, int first_lane, float* table) {
    for (int64_t group = 0; group < packed.groups; ++group) {
        const int64_t at = (block * packed.groups + group) * kBlock + first_lane;
        const Vec scale = load_halves(packed.scale + at);
        store(table + group * 2 * kLanes, scale);
        store(table + (group * 2 + 1) * kLanes, -load_bytes(packed.zero + at) * scale);
    }
}

// Gives channel c of kLanes tokens of one block, dequantized.
template <int Bits>
struct Dequantizer {
    const int32_t* low;       // (channels,) words of this block
    const void* high;         // (channels,)
    const int32_t* group_at;  // (channels,) offset of the channel's group in `table`
    const float* table;       // of load_scales
    WordVec shift;            // bits to shift so that a token's code is lowest: 2·token
    WordVec shift_one;        // the same for one bit a token

    Dequantizer(const PackedPointers& packed, int64_t block, int64_t channels, int64_t channel, int first_lane,
                const int32_t* group_at, const float* table)
        : low(packed.low + block * channels + channel), high(nullptr), group_at(group_at + channel), table(table),
          shift((lane_numbers() + uint32_t(first_lane)) * 2), shift_one(lane_numbers() + uint32_t(first_lane)) {
        if (Bits == 3) high = static_cast<const int16_t*>(packed.high) + block * channels + channel;
        if (Bits == 4) high = static_cast<const int32_t*>(packed.high) + block * channels + channel;
    }

    ROTATEKV_INLINE Vec operator()(int channel) const {
        const float* group = table + group_at[channel];
#if defined(__AVX512F__)
        if (Bits == 2) {  // a lookup by the four lowest bits drops the next token's code and converts, in one step
            const __m512 numbers = _mm512_setr_ps(0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3);
            const WordVec shifted = broadcast_word(uint32_t(low[channel])) >> shift;
            return (Vec)_mm512_permutexvar_ps((__m512i)shifted, numbers) * load(group) + load(group + kLanes);
        }
#endif
        WordVec code = broadcast_word(uint32_t(low[channel])) >> shift & 3u;
        if (Bits == 3) {
            const uint32_t word = static_cast<const uint16_t*>(high)[channel];
            code |= (broadcast_word(word) >> shift_one & 1u) << 2;
        }
        if (Bits == 4) {
            const uint32_t word = static_cast<const uint32_t*>(high)[channel];
            code |= (broadcast_word(word) >> shift & 3u) << 2;
        }
        return to_float((IntVec)code) * load(group) + load(group + kLanes);
    }
};
