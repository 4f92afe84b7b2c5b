// The exact tokens of a sequence, attention sinks and the recent window, in float32: kTile at a time.
#pragma once

#include "chunk.h"

static ROTATEKV_INLINE float exact_number(const DecodeArguments& a, uint16_t bits) {
    if (!a.exact_is_bfloat16) return half_to_float(bits);
    const uint32_t wide = uint32_t(bits) << 16;
    float x;
    std::memcpy(&x, &wide, 4);
    return x;
}

// kLanes exact tokens from number `from` on, un-rotated; lanes past the last repeat it.
static void read_exact_keys(const Part& part, int64_t from, int plane) {
    const DecodeArguments& a = part.a;
    const int channels = int(part.g.group_channels);
    float* keys = part.keys(plane);
    int64_t positions[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
        const int64_t e = from + lane < part.exact_to ? from + lane : part.exact_to - 1;
        const uint16_t* stored = a.exact_keys + e * part.g.channels + part.group * channels;
        for (int i = 0; i < channels; ++i) keys[i * kLanes + lane] = exact_number(a, stored[i]);
        positions[lane] = a.exact_columns[e] - a.first[part.row];
    }
    inverse_hadamard(part.g.plan, channels, keys, [&](int channel) { return load(keys + channel * kLanes); });
    part.affine.apply(keys, channels);
    if (a.rotary_dim) set_scattered_angles(a, positions, part.angles(plane));
}

static void mask_exact(const Part& part, int64_t from) {
    for (int64_t row = 0; row < part.g.group_rows; ++row) {
        float* scores = part.memory.scores.data() + row * kChunk;
        for (int i = 0; i < kTile; ++i) {
            const bool there = from + i < part.exact_to;
            const int64_t column = there ? part.a.exact_columns[from + i] : 0;
            if (!there || column < part.a.first[part.row] || column >= part.limit(row)) scores[i] = kNever;
        }
    }
}

static void add_exact_values(const Part& part, int64_t from, float* value) {
    const DecodeArguments& a = part.a;
    const int64_t dim = a.head_dim;
    for (int64_t e = from; e < from + kTile && e < part.exact_to; ++e) {
        for (int64_t head = 0; head < part.g.group_heads; ++head) {
            const uint16_t* stored = a.exact_values + e * part.g.channels + (part.group * part.g.group_heads + head) * dim;
            for (int64_t i = 0; i < dim; ++i) value[i] = exact_number(a, stored[i]);
            for (int64_t row = head * part.g.head_rows; row < (head + 1) * part.g.head_rows; ++row) {
                const float weight = part.memory.scores.data()[row * kChunk + e - from];
                float* sums = part.partial(row).sums();
                for (int64_t i = 0; i < dim; i += kLanes) store(sums + i, load(sums + i) + load(value + i) * weight);
            }
        }
    }
}

static void attend_exact(const Part& part) {
    for (int64_t from = part.exact_from; from < part.exact_to; from += kTile) {
        read_exact_keys(part, from, 0);
        read_exact_keys(part, from + kLanes, 1);
        score_tile(part, 0);
        mask_exact(part, from);
        for (int64_t row = 0; row < part.g.group_rows; ++row) {
            const Partial partial = part.partial(row);
            scale_sums(partial, part.a.head_dim,
                       softmax_row(part.memory.scores.data() + row * kChunk, kTile, partial));
        }
        add_exact_values(part, from, part.keys(0));  // the keys have served: their room holds a value
    }
}
