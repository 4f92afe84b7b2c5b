// Rotary position embedding of keys held as (channels, kLanes): channel i turns with channel i + rotary_dim / 2.
#pragma once

#include "arguments.h"
#include "simd.h"

constexpr int kCoarseStep = 16, kFinePositions = 32;  // positions; see rope_tables.py

// cos and sin of kLanes tokens by angle addition, (rotary_dim / 2, 2, kLanes).
struct RopeAngles {
    float* table;
    int half;  // rotary_dim / 2

    ROTATEKV_INLINE const float* at(int frequency) const { return table + frequency * 2 * kLanes; }
};

// kLanes numbers from `offset` on; the first one in place of those before it.
static ROTATEKV_INLINE Vec load_clamped(const float* from, int64_t offset) {
    if (offset >= 0) return load(from + offset);
    Vec x;
    for (int64_t lane = 0; lane < kLanes; ++lane) x[lane] = from[lane + offset < 0 ? 0 : lane + offset];
    return x;
}

// kLanes tokens at consecutive positions from `position` on. Those below 0 no query sees: their angles do not matter.
static void set_angles(const DecodeArguments& a, int64_t position, const RopeAngles& angles) {
    const int64_t row = position < 0 ? 0 : position / kCoarseStep, offset = position - row * kCoarseStep;
    const float* coarse_cos = a.coarse_cos + row * angles.half;
    const float* coarse_sin = a.coarse_sin + row * angles.half;
    for (int i = 0; i < angles.half; ++i) {
        const Vec fine_cos = load_clamped(a.fine_cos + i * kFinePositions, offset);
        const Vec fine_sin = load_clamped(a.fine_sin + i * kFinePositions, offset);
        const Vec cos = broadcast(coarse_cos[i]), sin = broadcast(coarse_sin[i]);
        store(angles.table + i * 2 * kLanes, cos * fine_cos - sin * fine_sin);
        store(angles.table + (i * 2 + 1) * kLanes, sin * fine_cos + cos * fine_sin);
    }
}

struct Pair {
    Vec low, high;
};

// Channels `frequency` and `frequency + half` of one head, turned.
static ROTATEKV_INLINE Pair turn(const float* head, int frequency, const RopeAngles& angles) {
    const Vec low = load(head + frequency * kLanes), high = load(head + (frequency + angles.half) * kLanes);
    const Vec cos = load(angles.at(frequency)), sin = load(angles.at(frequency) + kLanes);
    return {low * cos - high * sin, high * cos + low * sin};
}

static void turn_in_place(float* head, const RopeAngles& angles) {
    for (int i = 0; i < angles.half; ++i) {
        const Pair turned = turn(head, i, angles);
        store(head + i * kLanes, turned.low);
        store(head + (i + angles.half) * kLanes, turned.high);
    }
}
