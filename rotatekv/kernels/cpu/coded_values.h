// Σ over tokens of weight·component for a chunk of packed tokens, transform-coded values, by byte dot products.
//
// The weight of a token, softmax weight · scale, is rounded to 16 bits of the chunk's largest: weight ≈ unit·(256·high
// + low) with high and low in 0 … 255. Codes are bytes as well, so the sums are exact integers, and
// Σ weight·x̂ = unit·(256·Σ high·code + Σ low·code + (½ − 2^(bits − 1))·Σ (256·high + low)).
// Where no few tokens have most of the weight, eight bits are far below the noise of rounding values: low is 0 then.
#pragma once

#include "coded_layout.h"
#include "values.h"

constexpr float kLargestHigh = 255.0f;
constexpr float kLeastValueRatio = 30.0f;  // of the noise of rounding values to the error of leaving low bytes away

// kLanes components of a head's values, of one group: where they lie in a block's planes.
struct ValueVector {
    int64_t component;  // of the head, the first one
    int bits;
    float middle;  // ½ − 2^(bits − 1)
    int64_t pair, single;
};

// A head's stored components.
struct CodedValues {
    std::vector<ValueVector> vectors;
    float noise = 0.0f;  // the least mean square of a component's rounding error, of variance 1

    CodedValues(const std::vector<CodedGroup>& groups) {
        for (const CodedGroup& group : groups) {
            for (int at = 0; at < kGroup; at += kLanes)
                vectors.push_back({group.index * kGroup + at, group.bits, group.middle, group.pair * kBlock + at,
                                   group.single * kBlock + at});
            noise = noise > 0.0f ? std::min(noise, group.noise) : group.noise;
        }
    }
};

// A chunk's rounded weights for one query row, a block's tokens as store_bytes orders them.
struct CodedWeights {
    int32_t words[kChunkBlocks][8];  // 4 words of high, then 4 of low
    float unit;
    float sum;   // Σ (256·high + low)
    bool exact;  // low is there
};

// The words of weights times `inverse`, 0 … 255; their sum.
template <bool Exact>
static float round_weights_to(const float* weights, float inverse, int blocks, CodedWeights* out) {
    Vec sum = {};
    for (int block = 0; block < blocks; ++block) {
        IntVec high[kBlock / kLanes], low[kBlock / kLanes];
        for (int part = 0; part < kBlock / kLanes; ++part) {
            const Vec weight = load(weights + block * kBlock + part * kLanes) * inverse;
            high[part] = to_nearest(Exact ? weight * 256.0f : weight);
            sum += to_float(high[part]);
            if (!Exact) continue;
            low[part] = high[part] & 255;
            high[part] >>= 8;
        }
        store_bytes(high, out->words[block]);
        if (Exact) store_bytes(low, out->words[block] + 4);
    }
    return sum_lanes(sum) * (Exact ? 1.0f : 256.0f);
}

// scales (kChunk,) of a head's tokens, from the chunk's first block on; blocks are `step` apart.
static void read_scales(const uint8_t* stored, int64_t step, int blocks, float* scales) {
    for (int block = 0; block < blocks; ++block)
        for (int lane = 0; lane < kBlock; lane += kLanes)
            store(scales + block * kBlock + lane, load_frame_scales(stored + block * step + lane));
}

// weights (kChunk,), softmax weight · scale; `noise` of CodedValues.
static void round_coded_weights(const float* weights, int blocks, float noise, CodedWeights* out) {
    Vec top = {}, squares = {};
    for (int i = 0; i < blocks * kBlock; i += kLanes) {
        const Vec weight = load(weights + i);
        top = max(top, weight);
        squares += weight * weight;
    }
    const float largest = max_lanes(top), rough = largest / kLargestHigh;
    const float lost = rough * rough / 12.0f * float(blocks * kBlock) * (kLeastValueRatio * kLeastValueRatio);
    out->exact = lost > sum_lanes(squares) * noise;
    out->unit = rough / 256.0f;
    // Below it (a chunk of next to no weight) the quotient would overflow; nothing is lost by 0.
    const float inverse = largest > 1e-30f ? kLargestHigh / largest : 0.0f;
    out->sum = out->exact ? round_weights_to<true>(weights, inverse, blocks, out)
                          : round_weights_to<false>(weights, inverse, blocks, out);
}

// Where a chunk's values lie: their planes from its first block on.
struct ValueChunk {
    const int32_t* pairs;
    const int16_t* singles;
    int64_t pair_step, single_step;  // from block to block
    int blocks;
};

// sums (Rows, D) += the chunk's part, `Vectors` vectors of components of the same number of bits.
template <int Bits, int Rows, int Vectors, bool Exact>
static void add_value_vectors(const ValueChunk& chunk, const ValueVector* vectors, const CodedWeights* weights,
                              float* sums, int64_t sums_stride) {
    IntVec high[Rows][Vectors] = {}, low[Rows][Vectors] = {};
    for (int block = 0; block < chunk.blocks; ++block) {
        CodedWords<Bits> codes[Vectors] = {};
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v)
            codes[v].read(chunk.pairs + block * chunk.pair_step + vectors[v].pair,
                          chunk.singles + block * chunk.single_step + vectors[v].single);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            WordVec bytes[Vectors];
#pragma GCC unroll 4
            for (int v = 0; v < Vectors; ++v) bytes[v] = codes[v].bytes(j);
#pragma GCC unroll 4
            for (int row = 0; row < Rows; ++row) {
                const int32_t* words = weights[row].words[block];
                const WordVec high_word = broadcast_word(uint32_t(words[j]));
#pragma GCC unroll 4
                for (int v = 0; v < Vectors; ++v) high[row][v] = dot_bytes(high[row][v], high_word, bytes[v]);
                if (!Exact) continue;
                const WordVec low_word = broadcast_word(uint32_t(words[4 + j]));
#pragma GCC unroll 4
                for (int v = 0; v < Vectors; ++v) low[row][v] = dot_bytes(low[row][v], low_word, bytes[v]);
            }
        }
    }
    for (int row = 0; row < Rows; ++row)
        for (int v = 0; v < Vectors; ++v) {
            float* to = sums + row * sums_stride + vectors[v].component;
            const Vec total = to_float(high[row][v]) * 256.0f + to_float(low[row][v]);
            store(to, load(to) + (total + weights[row].sum * vectors[v].middle) * weights[row].unit);
        }
}

template <int Rows, int Vectors, bool Exact>
static void add_value_bits(const ValueChunk& chunk, const ValueVector* vectors, const CodedWeights* weights,
                           float* sums, int64_t stride) {
    switch (vectors->bits) {
        case 1: return add_value_vectors<1, Rows, Vectors, Exact>(chunk, vectors, weights, sums, stride);
        case 2: return add_value_vectors<2, Rows, Vectors, Exact>(chunk, vectors, weights, sums, stride);
        case 3: return add_value_vectors<3, Rows, Vectors, Exact>(chunk, vectors, weights, sums, stride);
        case 4: return add_value_vectors<4, Rows, Vectors, Exact>(chunk, vectors, weights, sums, stride);
        default: return add_value_vectors<5, Rows, Vectors, Exact>(chunk, vectors, weights, sums, stride);
    }
}

// All components of a head for `Rows` query rows.
template <int Rows, bool Exact>
static void add_coded_values(const ValueChunk& chunk, const std::vector<ValueVector>& vectors,
                             const CodedWeights* weights, float* sums, int64_t stride) {
    const ValueVector *at = vectors.data(), *end = at + vectors.size();
    while (at < end) {
        const bool two = at + 1 < end && at[1].bits == at->bits;
        if (two) add_value_bits<Rows, 2, Exact>(chunk, at, weights, sums, stride);
        else add_value_bits<Rows, 1, Exact>(chunk, at, weights, sums, stride);
        at += two ? 2 : 1;
    }
}

// The same for 1 … 4 rows; exact if any row is: the others' low bytes are 0 then.
static void add_coded_rows(int64_t rows, const ValueChunk& chunk, const std::vector<ValueVector>& vectors,
                           CodedWeights* weights, float* sums, int64_t stride) {
    bool exact = false;
    for (int64_t row = 0; row < rows; ++row) exact |= weights[row].exact;
    for (int64_t row = 0; row < rows && exact; ++row)
        for (int block = 0; block < chunk.blocks && !weights[row].exact; ++block)
            std::fill(weights[row].words[block] + 4, weights[row].words[block] + 8, 0);
    const auto add = [&](auto plain, auto all) { (exact ? all : plain)(chunk, vectors, weights, sums, stride); };
    switch (rows) {
        case 1: return add(add_coded_values<1, false>, add_coded_values<1, true>);
        case 2: return add(add_coded_values<2, false>, add_coded_values<2, true>);
        case 3: return add(add_coded_values<3, false>, add_coded_values<3, true>);
        default: return add(add_coded_values<4, false>, add_coded_values<4, true>);
    }
}
