// The orthonormal Hadamard matrix of order W, or its inverse, times rows of W numbers in memory.
#pragma once

#include <cmath>

#include "hadamard.h"
#include "transpose.h"

// Up to kLanes rows (count, W), each in a lane, in place; `room` (W, kLanes).
template <bool Forward>
static void rotate_lanes(const HadamardPlan& plan, float* rows, int64_t count, float* room) {
    const int width = plan.width;
    for (int64_t row = 0; row < kLanes; ++row)
        for (int i = 0; i < width; ++i) room[i * kLanes + row] = row < count ? rows[row * width + i] : 0.0f;
    hadamard<Forward>(plan, width, room, [&](int channel) { return load(room + channel * kLanes); });
    const float norm = 1.0f / std::sqrt(float(width));
    for (int64_t row = 0; row < count; ++row)
        for (int i = 0; i < width; ++i) rows[row * width + i] = room[i * kLanes + row] * norm;
}

// Sylvester's order kLanes on the lanes of a vector.
template <int Step, int... Lanes>
static ROTATEKV_INLINE Vec rotate_within(Vec x, std::integer_sequence<int, Lanes...> lanes) {
    if constexpr (Step == kLanes) {
        return x;
    } else {
        const IntVec minus = {(Lanes & Step ? INT32_MIN : 0)...};  // the sign bits of the lanes that are taken away
        const Vec sum = shuffle<(Lanes ^ Step)...>(x, x) + (Vec)((IntVec)x ^ minus);
        return rotate_within<2 * Step>(sum, lanes);
    }
}

// One row x (W,) ← y; W is a multiple of kLanes, and `plan` that of the order W / kLanes: H_W is its product with
// Sylvester's matrix of order kLanes.
static void rotate_row(const HadamardPlan& plan, const float* y, float* x) {
    constexpr auto kAllLanes = std::make_integer_sequence<int, kLanes>{};
    hadamard<true>(plan, plan.width, x, [&](int i) { return rotate_within<1>(load(y + i * kLanes), kAllLanes); });
    const float norm = 1.0f / std::sqrt(float(plan.width * kLanes));
    for (int i = 0; i < plan.width * kLanes; ++i) x[i] *= norm;
}
