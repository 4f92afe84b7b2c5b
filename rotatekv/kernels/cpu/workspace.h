// The memory of one call, and of one thread within it.
#pragma once

#include <algorithm>
#include <vector>

#include "coded_values.h"
#include "dequantize.h"
#include "floats.h"
#include "frame_queries.h"
#include "fused.h"
#include "hadamard.h"
#include "scores.h"
#include "values.h"

// Derived sizes. A rotation group is the heads one Hadamard matrix mixes: the unit of work, with all its query rows.
struct Geometry {
    int64_t channels;       // C
    int64_t group_channels; // W, or D when keys are not rotated
    int64_t group_heads;    // key/value heads of a rotation group
    int64_t groups;         // rotation groups
    int64_t head_rows;      // query rows that share a key/value head: H / H_kv · query_tokens
    int64_t group_rows;     // query rows of a rotation group
    int64_t value_groups;   // quantization groups of a head's values; 0: they are transform-coded
    int64_t begin;          // of the packed tokens that a query may see: a block's first
    int64_t chunks, splits; // of the packed tokens from there on; `splits` parts of whole chunks
    bool exact;             // one part more, for the exact tokens
    HadamardPlan plan;
    Fused fused;            // how packed keys are scored
    std::vector<std::vector<CodedGroup>> coded;  // transform-coded keys: of each head
    std::vector<CodedValues> coded_values;       // transform-coded values: of each head
    std::vector<HeadPlanes> key_planes, value_planes;  // of transform-coded ones: of each head

    explicit Geometry(const DecodeArguments& a) {
        channels = a.kv_heads * a.head_dim;
        group_channels = a.rotation_width ? a.rotation_width : a.head_dim;
        group_heads = group_channels / a.head_dim;
        groups = a.kv_heads / group_heads;
        head_rows = a.query_heads / a.kv_heads * a.query_tokens;
        group_rows = head_rows * group_heads;
        value_groups = a.values.groups / a.kv_heads;
        const int64_t lowest = a.sliding_window ? a.total_tokens - a.query_tokens - a.sliding_window + 1 : 0;
        begin = std::max<int64_t>(lowest, 0) / kBlock * kBlock;
        chunks = std::max<int64_t>(a.packed_tokens - begin + kChunk - 1, 0) / kChunk;
        // Some parts more than threads, so that a thread that was held up leaves its share to the others.
        const int64_t wanted = a.threads == 1 ? 1 : (6 * a.threads + a.batch * groups - 1) / (a.batch * groups);
        const int64_t chunks_of_part = std::max<int64_t>(chunks / wanted, 1);
        splits = (chunks + chunks_of_part - 1) / chunks_of_part;
        exact = a.exact_tokens > 0;
        plan_hadamard(a.rotation_width, a.key_base, &plan);
        fused = fused_form(plan, int(a.head_dim), int(a.rotary_dim), head_rows);
        const int64_t of_head = a.head_dim / kGroup;
        if (a.coded_keys.scale) coded = coded_groups(a.coded_keys, a.kv_heads, of_head);
        key_planes = planes_of_heads(coded);
        if (!a.coded_values.scale) return;
        const auto groups_of_values = coded_groups(a.coded_values, a.kv_heads, of_head);
        value_planes = planes_of_heads(groups_of_values);
        for (const auto& of_values : groups_of_values) coded_values.emplace_back(of_values);
    }

    int64_t parts() const { return splits + exact; }
    int64_t row_floats(const DecodeArguments& a) const { return a.head_dim + 2; }
};

// What one part of the tokens gives for one query row: an unfinished softmax.
struct Partial {
    float* at;  // largest score (log2 units), sum of weights, then D sums of weight·value
    float& top() const { return at[0]; }
    float& total() const { return at[1]; }
    float* sums() const { return at + 2; }
};

struct ThreadMemory {
    Floats keys;        // (2, W, kLanes)
    Floats key_scales;  // the table of read_lanes
    Floats angles;      // (2, rotary_dim / 2, 2, kLanes)
    Floats scores;      // (group rows, kChunk)
    Floats value_scales;  // (group heads, kChunk), of transform-coded values
    std::vector<ByteWeights> weights;  // (head rows, value groups)
    std::vector<CodedWeights> coded_weights;  // (head rows,)
    FrameQueries frames;

    ThreadMemory(const DecodeArguments& a, const Geometry& g)
        : keys(2 * g.group_channels * kLanes), key_scales(scale_table_floats(a.keys, g.group_channels)),
          angles(2 * a.rotary_dim * kLanes), scores(g.group_rows * kChunk),
          value_scales(a.coded_values.scale ? g.group_heads * kChunk : 0),
          weights(size_t(g.head_rows * g.value_groups)),
          coded_weights(size_t(a.coded_values.scale ? g.head_rows : 0)), frames(a, g.head_rows) {}
};
