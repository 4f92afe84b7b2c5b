// The last pass of the inverse Hadamard, RoPE and the scores in one: a column's vectors go from the butterflies, which
// add, straight to the turns and scores, which multiply, so both kinds of pipes are busy and nothing is written back.
//
// A column is what the last pass mixes: channels 16 apart. A head has Steps = D / 16 of them, and RoPE pairs step f
// with step f + Steps / 2, so each column holds whole pairs. Other shapes take the passes one by one.
#pragma once

#include "hadamard.h"
#include "scales.h"
#include "scores.h"

constexpr int kMostFusedRows = 4;  // query rows of a head whose sums stay in registers
constexpr int kStride = 16;        // channels; a constant, so that addresses are
constexpr int kStep = kStride * kLanes;

// Paley's order 12: the outputs of one column are sums of three of these.
struct PaleyColumn {
    static constexpr int kOutputs = 12;
    Vec sums[3][8];

    ROTATEKV_INLINE PaleyColumn(const float* at, int) {
#pragma GCC unroll 3
        for (int four = 0; four < 3; ++four) {
            const float* from = at + 4 * four * kStep;
            signed_sums(load(from), load(from + kStep), load(from + 2 * kStep), load(from + 3 * kStep),
                        broadcast(1.0f), sums[four]);
        }
    }
    template <int Output>
    ROTATEKV_INLINE Vec get() const {
        return paley_sum<12, false, Output>(sums, broadcast(1.0f));
    }
};

// Sylvester's order N.
template <int N>
struct SylvesterColumn {
    static constexpr int kOutputs = N;
    Vec held[N];

    ROTATEKV_INLINE SylvesterColumn(const float* at, int) {
        sylvester<N>([&](int i) { return load(at + i * kStep); }, broadcast(1.0f), held);
    }
    template <int Output>
    ROTATEKV_INLINE Vec get() const { return held[Output]; }
};

// One half of the outputs of Sylvester's order 2·N: those of the sums or of the differences of the two input halves.
template <int N>
struct HalfSylvesterColumn {
    static constexpr int kOutputs = N;
    Vec held[N];

    ROTATEKV_INLINE HalfSylvesterColumn(const float* at, int half) {
        const auto folded = [&](int i) {
            const Vec a = load(at + i * kStep), b = load(at + (i + N) * kStep);
            return half ? a - b : a + b;
        };
        sylvester<N>(folded, broadcast(1.0f), held);
    }
    template <int Output>
    ROTATEKV_INLINE Vec get() const { return held[Output]; }
};

// Adds the pair of channels at step First of head Head, turned, to the scores of the head's rows.
template <int Steps, int Rows, int Pair_, class Column>
static ROTATEKV_INLINE void add_pair(const Column& column, int at, const float* angles, const float* queries,
                                     Vec (*sums)[Rows]) {
    constexpr int kHeadDim = Steps * kStride;
    constexpr int kHead = Pair_ % (Column::kOutputs / Steps), kFirst = Pair_ / (Column::kOutputs / Steps);
    const Vec low = column.template get<kHead * Steps + kFirst>();
    const Vec high = column.template get<kHead * Steps + kFirst + Steps / 2>();
    const float* angle = angles + (kFirst * kStride + at) * 2 * kLanes;
    const Vec cos = load(angle), sin = load(angle + kLanes);
    const Vec turned_low = low * cos - high * sin, turned_high = high * cos + low * sin;
    const float* query = queries + kHead * Rows * kHeadDim + kFirst * kStride + at;
#pragma GCC unroll 4
    for (int row = 0; row < Rows; ++row) {
        sums[kHead][row] += broadcast(query[row * kHeadDim]) * turned_low;
        sums[kHead][row] += broadcast(query[row * kHeadDim + kHeadDim / 2]) * turned_high;
    }
}

template <int Steps, int Rows, class Column, int... Pairs>
static ROTATEKV_INLINE void add_pairs(const Column& column, int at, const float* angles, const float* queries,
                                      Vec (*sums)[Rows], std::integer_sequence<int, Pairs...>) {
    (add_pair<Steps, Rows, Pairs>(column, at, angles, queries, sums), ...);
}

// x (16·kOutputs or twice as many, kLanes) before the last pass; scores of the kLanes tokens of `Rows` rows of
// each head that the column type gives, `half` of the outputs if it gives half.
template <class Column, int Steps, int Rows>
static void score_columns(const float* x, int half, const float* angles, const float* queries, float* scores,
                          int64_t score_stride) {
    constexpr int kHeads = Column::kOutputs / Steps;
    Vec sums[kHeads][Rows] = {};
    for (int at = 0; at < kStride; ++at) {
        const Column column(x + at * kLanes, half);
        add_pairs<Steps, Rows>(column, at, angles, queries, sums,
                               std::make_integer_sequence<int, Column::kOutputs / 2>{});
    }
    for (int head = 0; head < kHeads; ++head)
        for (int row = 0; row < Rows; ++row) store(scores + (head * Rows + row) * score_stride, sums[head][row]);
}

template <class Column, int Steps>
static void score_column_rows(int rows, const float* x, int half, const float* angles, const float* queries,
                              float* scores, int64_t stride) {
    switch (rows) {
        case 1: return score_columns<Column, Steps, 1>(x, half, angles, queries, scores, stride);
        case 2: return score_columns<Column, Steps, 2>(x, half, angles, queries, scores, stride);
        case 3: return score_columns<Column, Steps, 3>(x, half, angles, queries, scores, stride);
        default: return score_columns<Column, Steps, 4>(x, half, angles, queries, scores, stride);
    }
}

// Which fused form a shape takes: 0 for none.
enum class Fused { none, paley, whole, halves };

static Fused fused_form(const HadamardPlan& plan, int head_dim, int rotary_dim, int64_t head_rows) {
    if (rotary_dim != head_dim || head_rows > kMostFusedRows || plan.width == 0) return Fused::none;
    if (plan.paley == 12 && plan.inner == 16 && plan.middle == 1 && head_dim == 64) return Fused::paley;
    if (plan.paley > 1 || plan.inner < 16) return Fused::none;
    const int steps = head_dim / 16;
    if (steps != 4 && steps != 8) return Fused::none;
    return plan.middle == 16 ? Fused::whole : plan.middle == 32 ? Fused::halves : Fused::none;
}

// Scores of all rows of a rotation group for kLanes tokens whose keys lack only the last pass.
static void score_fused(Fused form, int rows, const float* x, const RopeAngles& angles, const float* queries,
                        int head_dim, float* scores, int64_t score_stride) {
    const auto score = [&](auto function, int half) {
        const int64_t first = half * 256 / head_dim * rows;  // the second half's rows come after 256 channels' heads
        function(rows, x, half, angles.table, queries + first * head_dim, scores + first * score_stride,
                 score_stride);
    };
    if (form == Fused::paley) return score(score_column_rows<PaleyColumn, 4>, 0);
    const bool narrow = head_dim == 64;
    if (form == Fused::whole) {
        if (narrow) return score(score_column_rows<SylvesterColumn<16>, 4>, 0);
        return score(score_column_rows<SylvesterColumn<16>, 8>, 0);
    }
    for (int half = 0; half < 2; ++half) {
        if (narrow) score(score_column_rows<HalfSylvesterColumn<16>, 4>, half);
        else score(score_column_rows<HalfSylvesterColumn<16>, 8>, half);
    }
}
