// x̂ = (code − zero)·scale for kLanes tokens of a block, one channel at a time.
#pragma once

#include "scales.h"

// Whether codes become numbers without a conversion: two bits put at the top of a fraction make 1 + code / 4.
template <int Bits>
constexpr bool codes_as_fraction() {
#if defined(__AVX512F__)
    return Bits == 2;
#else
    return false;
#endif
}

// What a number of Codes is multiplied by, in units of the scale, and what is then taken away, in the same units, beside
// the zero point: x̂ = code·scale − zero·scale, or, from a fraction, (1 + code / 4)·4·scale − (zero + 4)·scale. All
// products are exact in float32.
template <int Bits>
constexpr float kFactor = codes_as_fraction<Bits>() ? 4.0f : 1.0f;
template <int Bits>
constexpr float kOffset = codes_as_fraction<Bits>() ? 4.0f : 0.0f;

// Which numbers of a packed tensor are read: kLanes tokens of one block, and `count` of its C channels.
struct Place {
    int64_t row, block;  // sequence, block of it
    int first_lane;      // token of the block
    int64_t channel, count, channels;  // first channel, their number, C

    int64_t word(const PackedPointers& packed) const { return (row * packed.blocks + block) * channels + channel; }
};

// Floats of the table of factors and offsets that a reader of `channels` channels needs.
static int64_t scale_table_floats(const PackedPointers& packed, int64_t channels) {
    return 2 * (packed.tokens_per_scale ? channels : packed.groups * kLanes);
}

// The codes of kLanes tokens as numbers, one channel at a time.
template <int Bits>
struct Codes {
    const int32_t* low;  // (count,) words of this block
    const void* high;    // (count,)
    WordVec shift;       // bits to shift right so that a token's code is lowest, or to turn left to the fraction
    WordVec shift_one;   // bits to shift right in a plane of one bit a token

    Codes(const PackedPointers& packed, const Place& place) : low(packed.low + place.word(packed)), high(nullptr) {
        const WordVec token = lane_numbers() + uint32_t(place.first_lane);
        shift = codes_as_fraction<Bits>() ? (53u - token * 2) % 32 : token * 2;  // a fraction's top bits are 21 and 22
        shift_one = token;
        if (Bits == 3) high = static_cast<const int16_t*>(packed.high) + place.word(packed);
        if (Bits == 4) high = static_cast<const int32_t*>(packed.high) + place.word(packed);
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

// A scale and zero point per token and quantization group.
template <int Bits>
struct TokenScales {
    const Codes<Bits> codes;
    const int32_t* group_at;  // (count,) offset of the channel's group in `table`
    float* table;             // (groups, 2, kLanes) factor and offset

    TokenScales(const PackedPointers& packed, const Place& place, const int32_t* group_at, float* table)
        : codes(packed, place), group_at(group_at + place.channel), table(table) {
        for (int64_t group = 0; group < packed.groups; ++group) {
            const int64_t block = place.row * packed.blocks + place.block;
            const int64_t at = (block * packed.groups + group) * kBlock + place.first_lane;
            const Vec scale = load_scales(packed, at);
            store(table + group * 2 * kLanes, scale * kFactor<Bits>);
            store(table + (group * 2 + 1) * kLanes, -(load_zeros(packed, at) + kOffset<Bits>) * scale);
        }
    }

    ROTATEKV_INLINE Vec operator()(int channel) const {
        const float* group = table + group_at[channel];
        return codes.number(channel) * load(group) + load(group + kLanes);
    }
};

// A scale and zero point per channel, the same for all tokens of a block. `count` is a multiple of 16.
template <int Bits>
struct ChannelScales {
    const Codes<Bits> codes;
    float* factor;  // (count,)
    float* offset;  // (count,)

    ChannelScales(const PackedPointers& packed, const Place& place, float* table)
        : codes(packed, place), factor(table), offset(table + place.count) {
        const int64_t scale_row = place.row * packed.scale_rows + place.block * kBlock / packed.tokens_per_scale;
        const int64_t at = scale_row * place.channels + place.channel;
        for (int64_t i = 0; i < place.count; i += kLanes) {
            const Vec scale = load_scales(packed, at + i);
            store(factor + i, scale * kFactor<Bits>);
            store(offset + i, -(load_zeros(packed, at + i) + kOffset<Bits>) * scale);
        }
    }

    ROTATEKV_INLINE Vec operator()(int channel) const {
        return codes.number(channel) * broadcast(factor[channel]) + broadcast(offset[channel]);
    }
};

template <int Bits, class Use>
static void read_bits(const PackedPointers& packed, const Place& place, const int32_t* group_at, float* table,
                      const Use& use) {
    if (packed.tokens_per_scale) use(ChannelScales<Bits>(packed, place, table));
    else use(TokenScales<Bits>(packed, place, group_at, table));
}

// Calls use(read) once: read(i) is channel place.channel + i of the place's kLanes tokens, dequantized. `group_at` (C,)
// is the offset of each channel's group in a table of scales per token; not read where scales are per channel.
template <class Use>
static void read_lanes(const PackedPointers& packed, const Place& place, const int32_t* group_at, float* table,
                       const Use& use) {
    if (packed.bits == 2) read_bits<2>(packed, place, group_at, table, use);
    if (packed.bits == 3) read_bits<3>(packed, place, group_at, table, use);
    if (packed.bits == 4) read_bits<4>(packed, place, group_at, table, use);
}
