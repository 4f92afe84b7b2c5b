// One chunk of tokens against the query rows of one rotation group: scores, online softmax, values.
#pragma once

#include <cmath>

#include "dequantize.h"
#include "frame_scores.h"
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
    const int32_t* group_at;   // (C,) offset of each key channel's group in the table of scales; null: see read_lanes
    float* partials;           // (group rows, D + 2)
    int64_t row, group;        // sequence and rotation group
    int64_t exact_from, exact_to;  // the sequence's exact tokens
    int64_t end;                   // packed tokens of the part lie before it

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
        } else {
            score_fused(g.fused, int(g.head_rows), keys, part.angles(plane), part.queries, int(part.a.head_dim),
                        part.memory.scores.data() + column + plane * kLanes, kChunk);
        }
    }
    if (g.fused == Fused::none) score_tile(part, column);
}

constexpr int kBlocksAhead = 4;  // of the first cache's sets, blocks of 8 × 128 channels share a few

// Starts to fetch a block's values, which come after the chunk's scores, and the keys of a later one. Inlined always:
// GCC drops calls of a function that does nothing but prefetch.
static ROTATEKV_INLINE void fetch_ahead(const Part& part, int64_t block) {
    const DecodeArguments& a = part.a;
    const Geometry& g = part.g;
    for (int64_t i = block; i < block + std::max(2 * kLanes / kBlock, 1); ++i) {
        if (a.coded_values.scale)
            fetch_planes<2>(a.coded_values, part.row * a.coded_values.blocks + i, a.kv_heads, part.group,
                            g.value_planes[part.group]);
        else
            prefetch<2>(a.values.low + (part.row * a.values.blocks + i) * g.channels + part.group * g.group_channels,
                        g.group_channels * 4);
        fetch_planes<1>(a.coded_keys, part.row * a.coded_keys.blocks + i + kBlocksAhead, a.kv_heads, part.group,
                        g.key_planes[part.group]);
    }
}

// Scores of all rows for `blocks` blocks of one frame, from block `place` of it on.
static void score_frame(const Part& part, int64_t block, int blocks, int64_t frame, int64_t place, float* scores) {
    const CodedPointers& f = part.a.coded_keys;
    const int64_t in_rows = part.row * f.blocks + block;
    const int64_t pair_step = f.pair_planes * kBlock, single_step = f.single_planes * kBlock;
    const int64_t scale_step = part.a.kv_heads * kBlock;
    const int32_t* pairs = f.pairs + in_rows * pair_step;
    const int16_t* singles = f.singles + in_rows * single_step;
    const uint8_t* scale = f.scale + in_rows * scale_step + part.group * kBlock;
    const int count = blocks * kBlock / kLanes;  // vectors of tokens
    for (int64_t first = 0; first < part.g.head_rows; first += kMostFrameRows) {
        const int some = int(std::min<int64_t>(part.g.head_rows - first, kMostFrameRows));
        FrameRow rows[kMostFrameRows];
        bool exact = false;
        for (int i = 0; i < some; ++i) {
            rows[i] = part.memory.frames.row(frame, first + i);
            exact |= rows[i].exact;
        }
        const auto pair_of_vectors = exact ? score_frame_rows<2, true> : score_frame_rows<2, false>;
        const auto one_vector = exact ? score_frame_rows<1, true> : score_frame_rows<1, false>;
        for (int at = 0; at < count; at += 2) {
            if (first == 0) fetch_ahead(part, block + at * kLanes / kBlock);
            FrameTokens tokens[2];
            for (int v = 0; v < 2 && at + v < count; ++v) {
                const int token = (at + v) * kLanes, lane = token % kBlock;
                const int64_t later = token / kBlock;
                tokens[v] = {pairs + later * pair_step + lane, singles + later * single_step + lane,
                             scale + later * scale_step + lane, place * kBlock + token};
            }
            const auto score = at + 1 < count ? pair_of_vectors : one_vector;
            score(some, part.g.coded[part.group], tokens, rows, scores + first * kChunk + at * kLanes, kChunk);
        }
    }
}

// Scores of a chunk of transform-coded tokens from `token` on. Without RoPE all frames are one.
static void score_frames(const Part& part, int64_t token, int blocks) {
    const int64_t dropped = part.a.dropped, frame = part.a.frames.size;
    const auto frame_of = [&](int64_t at) { return part.a.rotary_dim ? (at + dropped) / frame : 0; };
    part.memory.frames.hold(part.queries, part.group, part.g.coded[part.group], frame_of(token),
                            frame_of(token + blocks * kBlock - 1) + 1, frame_of(part.end - 1) + 1);
    for (int block = 0; block < blocks;) {
        const int64_t at = token + block * kBlock, place = (at + dropped) % frame / kBlock;
        const int run = int(std::min<int64_t>(frame / kBlock - place, blocks - block));
        score_frame(part, at / kBlock, run, frame_of(at), place, part.memory.scores.data() + block * kBlock);
        block += run;
    }
}

// Scores → weights, in place, of `count` tokens (a multiple of kLanes), times the tokens' scales where Scaled; the factor
// on the row's former sums.
template <bool Scaled>
static float softmax_row(float* scores, int count, const Partial& partial, const float* scales = nullptr) {
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
        store(scores + i, Scaled ? weight * load(scales + i) : weight);
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
    float* scores = part.memory.scores.data();
    for (int64_t row = 0; row < part.g.group_rows; ++row) {
        const int64_t limit = part.limit(row) < a.packed_tokens ? part.limit(row) : a.packed_tokens;
        for (int64_t i = 0; i < part.lowest(row) - token && i < count; ++i) scores[row * kChunk + i] = kNever;
        for (int64_t i = limit > token ? limit - token : 0; i < count; ++i) scores[row * kChunk + i] = kNever;
    }
    for (int64_t e = part.exact_from; e < part.exact_to; ++e) {
        const int64_t column = a.exact_token_index[e] - token;
        if (column < 0 || column >= count) continue;
        for (int64_t row = 0; row < part.g.group_rows; ++row) scores[row * kChunk + column] = kNever;
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

static void read_value_scales(const Part& part, int64_t block, int blocks) {
    const CodedPointers& coded = part.a.coded_values;
    const int64_t heads = part.g.group_heads, step = part.a.kv_heads * kBlock;
    const uint8_t* stored = coded.scale + (part.row * coded.blocks + block) * step + part.group * heads * kBlock;
    for (int64_t head = 0; head < heads; ++head)
        read_scales(stored + head * kBlock, step, blocks, part.memory.value_scales.data() + head * kChunk);
}

// Transform-coded values of one head of the rotation group.
static void add_coded_head(const Part& part, int64_t head, int64_t block, int blocks) {
    const Geometry& g = part.g;
    const CodedPointers& coded = part.a.coded_values;
    const int64_t kv_head = part.group * g.group_heads + head, at = part.row * coded.blocks + block;
    const int64_t pair_step = coded.pair_planes * kBlock, single_step = coded.single_planes * kBlock;
    const int64_t stride = g.row_floats(part.a);
    const CodedValues& of_head = g.coded_values[kv_head];
    const ValueChunk chunk{coded.pairs + at * pair_step, coded.singles + at * single_step, pair_step, single_step, blocks};
    CodedWeights* weights = part.memory.coded_weights.data();
    for (int64_t i = 0; i < g.head_rows; i += 4) {
        const int64_t row = head * g.head_rows + i, rows = std::min<int64_t>(g.head_rows - i, 4);
        for (int64_t k = 0; k < rows; ++k)
            round_coded_weights(part.memory.scores.data() + (row + k) * kChunk, blocks, of_head.noise, weights + k);
        add_coded_rows(rows, chunk, of_head.vectors, weights, part.partial(row).sums(), stride);
    }
}

static void attend_packed_chunk(const Part& part, int64_t chunk) {
    const DecodeArguments& a = part.a;
    const int64_t token = part.g.begin + chunk * kChunk;
    const int tokens = int(a.packed_tokens - token < kChunk ? a.packed_tokens - token : kChunk);
    if (token + tokens <= a.first_seen[part.row]) return;
    const int blocks = (tokens + kBlock - 1) / kBlock, count = blocks * kBlock;
    if (a.coded_keys.scale) score_frames(part, token, blocks);
    for (int column = 0; column < count && !a.coded_keys.scale; column += kTile)
        score_packed_tile(part, token + column, column);
    mask_packed(part, token, count);
    if (a.coded_values.scale) read_value_scales(part, token / kBlock, blocks);
    for (int64_t row = 0; row < part.g.group_rows; ++row) {
        const Partial partial = part.partial(row);
        float* scores = part.memory.scores.data() + row * kChunk;
        const float* scales = part.memory.value_scales.data() + row / part.g.head_rows * kChunk;
        const float decay = a.coded_values.scale ? softmax_row<true>(scores, count, partial, scales)
                                                 : softmax_row<false>(scores, count, partial);
        scale_sums(partial, a.head_dim, decay);
    }
    const int64_t first_block = part.row * a.values.blocks + token / kBlock;
    for (int64_t head = 0; head < part.g.group_heads; ++head) {
        if (a.coded_values.scale) add_coded_head(part, head, token / kBlock, blocks);
        if (a.values.bits == 2) add_head_values<2>(part, head, first_block, blocks);
        if (a.values.bits == 3) add_head_values<3>(part, head, first_block, blocks);
        if (a.values.bits == 4) add_head_values<4>(part, head, first_block, blocks);
    }
}
