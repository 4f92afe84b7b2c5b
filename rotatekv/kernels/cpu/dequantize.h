// x̂ = (code − zero)·scale for kLanes tokens of a block, one channel at a time.
#pragma once

#include "arguments.h"
#include "simd.h"

// Whether codes become numbers without a conversion: two bits put at the top of a fraction make 1 + code / 4.
template <int Bits>
constexpr bool codes_as_fraction() {
#if defined(__AVX512F__)
    return Bits == 2;
#else
    return false;
#endif
}

// Factor and offset of kLanes tokens in float32, (groups, 2, kLanes): x̂ = code·scale − zero·scale, or, from a
// fraction, (1 + code / 4)·4·scale − (zero + 4)·scale. All products are exact in float32.
template <int Bits>
static void load_scales(const PackedPointers& packed, int64_t block, int first_lane, float* table) {
    constexpr float kFactor = codes_as_fraction<Bits>() ? 4.0f : 1.0f, kOffset = codes_as_fraction<Bits>() ? 4.0f : 0.0f;
    for (int64_t group = 0; group < packed.groups; ++group) {
        const int64_t at = (block * packed.groups + group) * kBlock + first_lane;
        const Vec scale = load_halves(packed.scale + at);
        store(table + group * 2 * kLanes, scale * kFactor);
        store(table + (group * 2 + 1) * kLanes, -(load_bytes(packed.zero + at) + kOffset) * scale);
    }
}

// Gives channel c of kLanes tokens of one block, dequantized.
template <int Bits>
struct Dequantizer {
    const int32_t* low;       // (channels,) words of this block
    const void* high;         // (channels,)
    const int32_t* group_at;  // (channels,) offset of the channel's group in `table`
    const float* table;       // of load_scales
    WordVec shift;            // bits to shift right so that a token's code is lowest, or to turn left to the fraction
    WordVec shift_one;        // bits to shift right in a plane of one bit a token

    Dequantizer(const PackedPointers& packed, int64_t block, int64_t channels, int64_t channel, int first_lane,
                const int32_t* group_at, float* table)
        : low(packed.low + block * channels + channel), high(nullptr), group_at(group_at + channel), table(table) {
        load_scales<Bits>(packed, block, first_lane, table);
        const WordVec token = lane_numbers() + uint32_t(first_lane);
        shift = codes_as_fraction<Bits>() ? (53u - token * 2) % 32 : token * 2;  // a fraction's top bits are 21 and 22
        shift_one = token;
        if (Bits == 3) high = static_cast<const int16_t*>(packed.high) + block * channels + channel;
        if (Bits == 4) high = static_cast<const int32_t*>(packed.high) + block * channels + channel;
    }

    ROTATEKV_INLINE Vec operator()(int channel) const {
        const float* group = table + group_at[channel];
        return number(channel) * load(group) + load(group + kLanes);
    }

    ROTATEKV_INLINE Vec number(int channel) const {
#if defined(__AVX512F__)
        if (codes_as_fraction<Bits>()) {
            const __m512i turned = _mm512_rolv_epi32(_mm512_set1_epi32(low[channel]), (__m512i)shift);
            const __m512i code_bits = _mm512_set1_epi32(0x00600000), one = _mm512_set1_epi32(0x3f800000);
            return (Vec)_mm512_ternarylogic_epi32(turned, code_bits, one, 0xea);  // (turned & code_bits) | one
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
        return to_float((IntVec)code);
    }
};
