// Σ over tokens of weight·value for a chunk of packed tokens, in the values' rotated space, by byte dot products.
//
// The weight of a token, softmax weight · scale, is rounded to 14 bits of the chunk's largest: weight ≈ unit·(128·high
// + low) with high and low in 0 … 127. Codes are bytes as well, so the sums are exact integers, and
// Σ weight·x̂ = unit·(128·Σ high·code + Σ low·code − Σ (128·high + low)·zero).
#pragma once

#include "scales.h"

constexpr int kChunk = 256;                   // tokens that share one softmax step
constexpr int kChunkBlocks = kChunk / kBlock;
constexpr float kLargestWeight = 16383.0f;    // 128·127 + 127

// A chunk's rounded weights for one query row and one quantization group, a block's tokens as store_bytes orders them.
struct ByteWeights {
    int32_t words[kChunkBlocks][8];  // 4 words of high, then 4 of low
    float unit;
    float zero_sum;  // Σ (128·high + low)·zero
};

// probabilities (kChunk,), 0 past the chunk's tokens; `scale` and `zero` of `group` from block `first_block` on.
static void round_weights(const float* probabilities, const PackedPointers& packed, int64_t first_block, int blocks,
                          int64_t group, ByteWeights* out) {
    float weights[kChunk];
    Vec top = {};
    for (int block = 0; block < blocks; ++block) {
        const int64_t scale = ((first_block + block) * packed.groups + group) * kBlock;
        for (int lane = 0; lane < kBlock; lane += kLanes) {
            const int at = block * kBlock + lane;
            const Vec weight = load(probabilities + at) * load_scales(packed, scale + lane);
            store(weights + at, weight);
            top = max(top, weight);
        }
    }
    const float largest = max_lanes(top);
    out->unit = largest / kLargestWeight;
    // Below it (a chunk of next to no weight) the quotient would overflow; nothing is lost by 0.
    const float inverse = largest > 1e-30f ? kLargestWeight / largest : 0.0f;
    const Vec rounding = broadcast(12582912.0f);  // 1.5·2^23: adding it rounds to an integer
    Vec zero_sum = {};
    for (int block = 0; block < blocks; ++block) {
        const int64_t zero = ((first_block + block) * packed.groups + group) * kBlock;
        IntVec high[kBlock / kLanes], low[kBlock / kLanes];
        for (int part = 0; part < kBlock / kLanes; ++part) {
            const Vec shifted = load(weights + block * kBlock + part * kLanes) * inverse + rounding;
            high[part] = ((IntVec)shifted & 0x3fff) >> 7;
            low[part] = (IntVec)shifted & 127;
            zero_sum += (shifted - rounding) * load_zeros(packed, zero + part * kLanes);
        }
        store_bytes(high, out->words[block]);
        store_bytes(low, out->words[block] + 4);
    }
    out->zero_sum = sum_lanes(zero_sum);
}

// Words of kLanes channels whose four bytes are, after a shift by j, the codes of tokens j, 4 + j, 8 + j, 12 + j.
template <int Bits>
struct ValueCodes {
    WordVec low, high;

    ROTATEKV_INLINE void read(const PackedPointers& packed, int64_t at) {
        low = load_words(packed.low + at);
        if (Bits == 3) {
            high = load_short_words(static_cast<const int16_t*>(packed.high) + at);
            high = (high | high << 8) & 0x00ff00ffu;  // one byte of tokens in every two
            high = (high | high << 4) & 0x0f0f0f0fu;  // four tokens a byte
        }
        if (Bits == 4) high = load_words(static_cast<const int32_t*>(packed.high) + at);
    }

    ROTATEKV_INLINE WordVec bytes(int j) const {
        WordVec codes = low >> (2 * j) & 0x03030303u;
        if (Bits == 3) codes |= (high >> j & 0x01010101u) << 2;
        if (Bits == 4) codes |= (high >> (2 * j) & 0x03030303u) << 2;
        return codes;
    }
};

// sums (Rows, D) += the chunk's part for `Vectors`·kLanes channels from `channel` on, all of one quantization group.
template <int Bits, int Rows, int Vectors>
static void add_values_of(const PackedPointers& packed, int64_t channels, int64_t channel, int64_t first_block,
                          int blocks, const ByteWeights* weights, int64_t weights_stride, float* sums,
                          int64_t sums_stride) {
    IntVec high[Rows][Vectors] = {}, low[Rows][Vectors] = {};
    for (int block = 0; block < blocks; ++block) {
        const int64_t at = (first_block + block) * channels + channel;
        ValueCodes<Bits> codes[Vectors];
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) codes[v].read(packed, at + v * kLanes);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            WordVec bytes[Vectors];
#pragma GCC unroll 4
            for (int v = 0; v < Vectors; ++v) bytes[v] = codes[v].bytes(j);
#pragma GCC unroll 4
            for (int row = 0; row < Rows; ++row) {
                const int32_t* words = weights[row * weights_stride].words[block];
                const WordVec high_word = broadcast_word(uint32_t(words[j]));
#pragma GCC unroll 4
                for (int v = 0; v < Vectors; ++v) high[row][v] = dot_bytes(high[row][v], bytes[v], high_word);
                const WordVec low_word = broadcast_word(uint32_t(words[4 + j]));
#pragma GCC unroll 4
                for (int v = 0; v < Vectors; ++v) low[row][v] = dot_bytes(low[row][v], bytes[v], low_word);
            }
        }
    }
    for (int row = 0; row < Rows; ++row) {
        const ByteWeights& w = weights[row * weights_stride];
        for (int v = 0; v < Vectors; ++v) {
            float* to = sums + row * sums_stride + v * kLanes;
            const Vec total = to_float(high[row][v]) * 128.0f + to_float(low[row][v]) - w.zero_sum;
            store(to, load(to) + total * w.unit);
        }
    }
}

template <int Bits, int Rows>
static void add_values(const PackedPointers& packed, int64_t channels, int64_t channel, int group_size,
                       int64_t first_block, int blocks, const ByteWeights* weights, int64_t weights_stride, float* sums,
                       int64_t sums_stride) {
    int done = 0;
    for (; done + 2 * kLanes <= group_size; done += 2 * kLanes)
        add_values_of<Bits, Rows, 2>(packed, channels, channel + done, first_block, blocks, weights, weights_stride,
                                     sums + done, sums_stride);
    for (; done < group_size; done += kLanes)
        add_values_of<Bits, Rows, 1>(packed, channels, channel + done, first_block, blocks, weights, weights_stride,
                                     sums + done, sums_stride);
}
