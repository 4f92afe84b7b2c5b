// Tokens lie in the lanes of the vectors of their channels; here they become rows of memory.
#pragma once

#include <utility>

#include "simd.h"

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

// x (channels, kLanes) ← rows (tokens, …), `stride` floats apart, for `channels` ≤ kLanes channels; 0 in further lanes.
static ROTATEKV_INLINE void load_tokens(const float* rows, int tokens, int64_t stride, float* x, int channels) {
    Vec tile[kLanes] = {};
#pragma GCC unroll 16
    for (int token = 0; token < kLanes; ++token) {
        if (token >= tokens) break;
        if (channels == kLanes) tile[token] = load(rows + token * stride);
        else std::memcpy(&tile[token], rows + token * stride, sizeof(float) * channels);
    }
    transpose(tile);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i)
        if (i < channels) store(x + i * kLanes, tile[i]);
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
