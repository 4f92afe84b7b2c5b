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

// cos and sin of one position's angle in frequency i.
static ROTATEKV_INLINE void angle_at(const DecodeArguments& a, int64_t position, int64_t i, float* cos, float* sin) {
    const int64_t half = a.rotary_dim / 2, row = position / kCoarseStep, offset = position % kCoarseStep;
    const float coarse_cos = a.coarse_cos[row * half + i], coarse_sin = a.coarse_sin[row * half + i];
    const float fine_cos = a.fine_cos[i * kFinePositions + offset], fine_sin = a.fine_sin[i * kFinePositions + offset];
    *cos = coarse_cos * fine_cos - coarse_sin * fine_sin;
    *sin = coarse_sin * fine_cos + coarse_cos * fine_sin;
}

// Tokens at any positions, (kLanes,). Below 0 they are padding, whose angle does not matter.
static void set_scattered_angles(const DecodeArguments& a, const int64_t* positions, const RopeAngles& angles) {
    for (int lane = 0; lane < kLanes; ++lane) {
        const int64_t position = positions[lane] < 0 ? 0 : positions[lane];
        for (int i = 0; i < angles.half; ++i) {
            float* at = angles.table + i * 2 * kLanes + lane;
            angle_at(a, position, i, at, at + kLanes);
        }
    }
}

// Tokens at consecutive positions from `position` on.
static void set_consecutive_angles(const DecodeArguments& a, int64_t position, const RopeAngles& angles) {
    if (position < 0) {  // padding, and maybe the sequence's first tokens after it
        int64_t positions[kLanes];
        for (int lane = 0; lane < kLanes; ++lane) positions[lane] = position + lane;
        return set_scattered_angles(a, positions, angles);
    }
    const int64_t row = position / kCoarseStep, offset = position % kCoarseStep;
    const float* coarse_cos = a.coarse_cos + row * angles.half;
    const float* coarse_sin = a.coarse_sin + row * angles.half;
    for (int i = 0; i < angles.half; ++i) {
        const Vec fine_cos = load(a.fine_cos + i * kFinePositions + offset);
        const Vec fine_sin = load(a.fine_sin + i * kFinePositions + offset);
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
