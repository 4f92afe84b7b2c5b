// One chunk of tokens against the query rows of one rotation group: scores, online softmax, values.
#pragma once

#include <cmath>

#include "dequantize.h"
#include "fused.h"
#include "workspace.h"

constexpr float kNever = -INFINITY;
constexpr float kLog2E = 1.44269504088896341f;

// What all chunks of one part share.
struct Part {
    const DecodeArguments& a;
    const Geometry& g;
    ThreadMemory& memory;
    const float* queries;      // (group rows, D), for packed tokens times all constant factors of a score
    ChannelAffine affine;      // of the rotation group's keys, times sqrt(W) as they are
    const int32_t* group_at;   // (C,) offset of each key channel's group in the table of scales; null: see read_lanes
    float* partials;           // (group rows, D + 2)
    int64_t row, group;        // sequence and rotation group
    int64_t exact_from, exact_to;  // the sequence's exact tokens

    Partial partial(int64_t query_row) const { return {partials + query_row * g.row_floats(a)}; }
    RopeAngles angles(int plane) const {
        return {memory.angles.data() + plane * a.rotary_dim * kLanes, int(a.rotary_dim / 2)};
    }
    float* keys(int plane) const { return memory.keys.data() + plane * g.group_channels * kLanes; }
    // Tokens the query row sees are lowest … limit − 1: causal among the last query_tokens tokens.
    int64_t limit(int64_t query_row) const {
        return a.total_tokens - a.query_tokens + query_row % a.query_tokens + 1;
    }
    int64_t lowest(int64_t query_row) const {
        return std::max<int64_t>(a.first_seen[row], a.sliding_window ? limit(query_row) - a.sliding_window : 0);
    }
};

// kLanes tokens from `token` on, dequantized and after the first pass of the inverse Hadamard. Past the last block that
// one repeats; the mask hides it.
static void read_keys(const Part& part, int64_t token, float* keys, const RopeAngles& angles) {
    const DecodeArguments& a = part.a;
    const int64_t last = (a.packed_tokens - 1) / kBlock;
    if (token / kBlock > last) token = last * kBlock;
    const int64_t channels = part.g.group_channels;
    const Place place{part.row, token / kBlock, int(token % kBlock), part.group * channels, channels, part.g.channels};
    read_lanes(a.keys, place, part.group_at, part.memory.key_scales.data(),
               [&](const auto& read) { first_pass(part.g.plan, int(channels), keys, read); });
    if (a.rotary_dim) set_angles(a, token + a.origin[part.row], angles);
}

// Scores of the two planes of keys against all rows, to column `column` of the chunk.
static void score_tile(const Part& part, int64_t column) {
    const int64_t dim = part.a.head_dim, plane = part.g.group_channels * kLanes;
    const RopeAngles angles[2] = {part.angles(0), part.angles(1)};
    for (int64_t head = 0; head < part.g.group_heads; ++head) {
        const int64_t row = head * part.g.head_rows;
        score_head(int(part.g.head_rows), part.keys(0) + head * dim * kLanes, plane, angles, part.queries + row * dim,
                   int(dim), part.memory.scores.data() + row * kChunk + column, kChunk);
    }
}

// Scores of kTile packed tokens from `token` on.
static void score_packed_tile(const Part& part, int64_t token, int64_t column) {
    const Geometry& g = part.g;
    for (int plane = 0; plane < 2; ++plane) {
        float* keys = part.keys(g.fused == Fused::none ? plane : 0);
        read_keys(part, token + plane * kLanes, keys, part.angles(plane));
        if (g.fused == Fused::none) {
            last_passes(g.plan, int(g.group_channels), keys);
            part.affine.apply(keys, g.group_channels);
        } else {
            score_fused(g.fused, int(g.head_rows), keys, part.affine, part.angles(plane), part.queries,
                        int(part.a.head_dim), part.memory.scores.data() + column + plane * kLanes, kChunk);
        }
    }
    if (g.fused == Fused::none) score_tile(part, column);
}

// Scores → weights, in place, of `count` tokens (a multiple of kLanes); the factor on the row's former sums.
static float softmax_row(float* scores, int count, const Partial& partial) {
    Vec highest = load(scores);
    for (int i = kLanes; i < count; i += kLanes) highest = max(highest, load(scores + i));
    const float top = std::fmax(partial.top(), max_lanes(highest));
    if (top == kNever) {
        std::memset(scores, 0, sizeof(float) * count);
        return 1.0f;
    }
    Vec total = {};
    for (int i = 0; i < count; i += kLanes) {
        const Vec weight = exp2_nonpositive(load(scores + i) - top);
        store(scores + i, weight);
        total += weight;
    }
    const float decay = std::exp2(partial.top() - top);
    partial.total() = partial.total() * decay + sum_lanes(total);
    partial.top() = top;
    return decay;
}

static void scale_sums(const Partial& partial, int64_t head_dim, float factor) {
    if (factor == 1.0f) return;
    float* sums = partial.sums();
    for (int64_t i = 0; i < head_dim; i += kLanes) store(sums + i, load(sums + i) * factor);
}

// Scores the rows must not see become −infinity: tokens past the causal limit or the packed ones, those before the
// lowest, and packed tokens that an exact one replaces. `tokens` starts the chunk, `count` is its padded length.
static void mask_packed(const Part& part, int64_t token, int count) {
    const DecodeArguments& a = part.a;
    for (int64_t row = 0; row < part.g.group_rows; ++row) {
        float* scores = part.memory.scores.data() + row * kChunk;
        const int64_t limit = part.limit(row) < a.packed_tokens ? part.limit(row) : a.packed_tokens;
        for (int64_t i = 0; i < part.lowest(row) - token && i < count; ++i) scores[i] = kNever;
        for (int64_t i = limit > token ? limit - token : 0; i < count; ++i) scores[i] = kNever;
        for (int64_t e = part.exact_from; e < part.exact_to; ++e) {
            const int64_t column = a.exact_token_index[e] - token;
            if (column >= 0 && column < count) scores[column] = kNever;
        }
    }
}

template <int Bits>
static void add_head_values(const Part& part, int64_t head, int64_t first_block, int blocks) {
    const Geometry& g = part.g;
    const int64_t dim = part.a.head_dim, groups = g.value_groups, kv_head = part.group * g.group_heads + head;
    const int group_size = int(dim / groups);
    ByteWeights* weights = part.memory.weights.data();
    for (int64_t row = 0; row < g.head_rows; ++row) {
        const float* probabilities = part.memory.scores.data() + (head * g.head_rows + row) * kChunk;
        for (int64_t group = 0; group < groups; ++group)
            round_weights(probabilities, part.a.values, first_block, blocks, kv_head * groups + group,
                          weights + row * groups + group);
    }
    for (int64_t group = 0; group < groups; ++group) {
        for (int64_t row = 0; row < g.head_rows; row += 4) {
            float* sums = part.partial(head * g.head_rows + row).sums() + group * group_size;
            const int64_t channel = kv_head * dim + group * group_size, stride = g.row_floats(part.a);
            const auto add = [&](auto function) {
                function(part.a.values, g.channels, channel, group_size, first_block, blocks,
                         weights + row * groups + group, groups, sums, stride);
            };
            switch (g.head_rows - row) {
                case 1: add(add_values<Bits, 1>); break;
                case 2: add(add_values<Bits, 2>); break;
                case 3: add(add_values<Bits, 3>); break;
                default: add(add_values<Bits, 4>);
            }
        }
    }
}

static void attend_packed_chunk(const Part& part, int64_t chunk) {
    const DecodeArguments& a = part.a;
    const int64_t token = part.g.begin + chunk * kChunk;
    const int tokens = int(a.packed_tokens - token < kChunk ? a.packed_tokens - token : kChunk);
    if (token + tokens <= a.first_seen[part.row]) return;
    const int blocks = (tokens + kBlock - 1) / kBlock, count = blocks * kBlock;
    for (int column = 0; column < count; column += kTile) score_packed_tile(part, token + column, column);
    mask_packed(part, token, count);
    for (int64_t row = 0; row < part.g.group_rows; ++row) {
        const Partial partial = part.partial(row);
        scale_sums(partial, a.head_dim, softmax_row(part.memory.scores.data() + row * kChunk, count, partial));
    }
    const int64_t first_block = part.row * a.values.blocks + token / kBlock;
    for (int64_t head = 0; head < part.g.group_heads; ++head) {
        if (a.values.bits == 2) add_head_values<2>(part, head, first_block, blocks);
        if (a.values.bits == 3) add_head_values<3>(part, head, first_block, blocks);
        if (a.values.bits == 4) add_head_values<4>(part, head, first_block, blocks);
    }
}
