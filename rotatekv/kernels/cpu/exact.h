// The exact tokens of a sequence, attention sinks and the recent window: 16-bit numbers as attention sees them.
#pragma once

#include "chunk.h"

// x (D,) ← a head of 16-bit numbers.
static void read_exact(const DecodeArguments& a, const uint16_t* head, float* x) {
    for (int64_t i = 0; i < a.head_dim; i += kLanes)
        store(x + i, a.exact_is_bfloat16 ? load_bfloats(head + i) : load_halves(head + i));
}

static ROTATEKV_INLINE float dot(const float* a, const float* b, int64_t count) {
    Vec sum = load(a) * load(b);
    for (int64_t i = kLanes; i < count; i += kLanes) sum += load(a + i) * load(b + i);
    return sum_lanes(sum);
}

// Calls use(row, x) for each query row: x (D,) is what its head has at exact token e in `tokens` (S, H_kv, D).
template <class Use>
static void for_exact_rows(const Part& part, const uint16_t* tokens, int64_t e, const Use& use) {
    const Geometry& g = part.g;
    float* x = part.keys(0);
    for (int64_t head = 0; head < g.group_heads; ++head) {
        read_exact(part.a, tokens + e * g.channels + (part.group * g.group_heads + head) * part.a.head_dim, x);
        for (int64_t row = head * g.head_rows; row < (head + 1) * g.head_rows; ++row) use(row, x);
    }
}

// The exact tokens from number `from` to `to` − 1, at most kChunk.
static void attend_exact_chunk(const Part& part, int64_t from, int64_t to) {
    const DecodeArguments& a = part.a;
    const int count = int(to - from + kLanes - 1) / kLanes * kLanes;
    float* scores = part.memory.scores.data();
    for (int64_t row = 0; row < part.g.group_rows; ++row)
        std::fill(scores + row * kChunk, scores + row * kChunk + count, kNever);
    for (int64_t e = from; e < to; ++e) {
        const int64_t column = a.exact_token_index[e];
        for_exact_rows(part, a.exact_keys, e, [&](int64_t row, const float* key) {
            if (column < part.lowest(row) || column >= part.limit(row)) return;
            const float score = dot(part.queries + row * a.head_dim, key, a.head_dim);
            scores[row * kChunk + e - from] = score * (a.softmax_scale * kLog2E);
        });
    }
    for (int64_t row = 0; row < part.g.group_rows; ++row)
        scale_sums(part.partial(row), a.head_dim, softmax_row<false>(scores + row * kChunk, count, part.partial(row)));
    for (int64_t e = from; e < to; ++e) {
        for_exact_rows(part, a.exact_values, e, [&](int64_t row, const float* value) {
            const float weight = scores[row * kChunk + e - from];
            float* sums = part.partial(row).sums();
            for (int64_t i = 0; i < a.head_dim; i += kLanes) store(sums + i, load(sums + i) + load(value + i) * weight);
        });
    }
}

static void attend_exact(const Part& part) {
    for (int64_t from = part.exact_from; from < part.exact_to; from += kChunk)
        attend_exact_chunk(part, from, std::min<int64_t>(from + kChunk, part.exact_to));
}
