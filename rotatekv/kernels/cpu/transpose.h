// Tokens lie in the lanes of the vectors of their channels; here they become rows of memory.
#pragma once

#include <utility>

#include "simd.h"

// Lane i is lane From[i] of a; kLanes … are b's.
template <int... From>
static ROTATEKV_INLINE Vec shuffle(Vec a, Vec b) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, From...);
#else  // GCC has the other since version 12
    return __builtin_shuffle(a, b, IntVec{From...});
#endif
}

template <int Step, int... Lanes>
static ROTATEKV_INLINE void swap_squares(Vec& x, Vec& y, std::integer_sequence<int, Lanes...>) {
    const Vec a = x, b = y;
    x = shuffle<(Lanes & Step ? kLanes + (Lanes ^ Step) : Lanes)...>(a, b);
    y = shuffle<(Lanes & Step ? kLanes + Lanes : Lanes ^ Step)...>(a, b);
}

// Swaps the off-diagonal squares of Step × Step numbers, then the smaller ones within each square.
template <int Step = kLanes / 2>
static ROTATEKV_INLINE void transpose(Vec* x) {
    if constexpr (Step > 0) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
            if (!(i & Step)) swap_squares<Step>(x[i], x[i + Step], std::make_integer_sequence<int, kLanes>{});
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
