// Tokens lie in the lanes of the vectors of their channels; here they become rows of memory.
#pragma once

#include <utility>

#include "simd.h"

// Where the lanes of a transposed pair come from: kLanes … are the second vector's lanes.
template <int Step, int... Lanes>
static ROTATEKV_INLINE IntVec first_of_pair(std::integer_sequence<int, Lanes...>) {
    return IntVec{(Lanes & Step ? kLanes + (Lanes ^ Step) : Lanes)...};
}

template <int Step, int... Lanes>
static ROTATEKV_INLINE IntVec second_of_pair(std::integer_sequence<int, Lanes...>) {
    return IntVec{(Lanes & Step ? kLanes + Lanes : Lanes ^ Step)...};
}

// Swaps the off-diagonal squares of Step × Step numbers, then the smaller ones within each square.
template <int Step = kLanes / 2>
static ROTATEKV_INLINE void transpose(Vec* x) {
    if constexpr (Step > 0) {
        const auto lanes = std::make_integer_sequence<int, kLanes>{};
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
            if (i & Step) continue;
            const Vec a = x[i], b = x[i + Step];
            x[i] = __builtin_shuffle(a, b, first_of_pair<Step>(lanes));
            x[i + Step] = __builtin_shuffle(a, b, second_of_pair<Step>(lanes));
        }
        transpose<Step / 2>(x);
    }
}

// rows (tokens, …) ← factor·x, for `channels` ≤ kLanes channels x (channels, kLanes); rows are `stride` floats apart.
static ROTATEKV_INLINE void store_tokens(const float* x, int channels, float factor, float* rows, int tokens,
                                         int64_t stride) {
    Vec tile[kLanes] = {};
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i)
        if (i < channels) tile[i] = load(x + i * kLanes) * factor;
    transpose(tile);
#pragma GCC unroll 16
    for (int token = 0; token < kLanes; ++token) {
        if (token >= tokens) break;
        if (channels == kLanes) store(rows + token * stride, tile[token]);
        else std::memcpy(rows + token * stride, &tile[token], sizeof(float) * channels);
    }
}
