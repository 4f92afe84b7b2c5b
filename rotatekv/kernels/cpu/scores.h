// Scores of query rows against a tile of keys: two vectors of kLanes tokens, so that a query number is fetched once
// for both.
#pragma once

#include "rope.h"

constexpr int kTile = 2 * kLanes;  // tokens
constexpr int kMostRows = 8;       // query rows that share a pass over the keys

// keys: two planes `plane` floats apart of one head (D, kLanes), before RoPE; angles: one for each plane.
// queries (Rows, D); scores: row r's kTile scores start at r·score_stride.
template <int Rows, bool Rope>
static void score_rows(const float* keys, int64_t plane, const RopeAngles* angles, const float* queries, int head_dim,
                       float* scores, int64_t score_stride) {
    Vec sums[Rows][2] = {};
    const int half = Rope ? angles[0].half : 0;
    for (int i = 0; i < half; ++i) {
        const Pair first = turn(keys, i, angles[0]), second = turn(keys + plane, i, angles[1]);
#pragma GCC unroll 8
        for (int row = 0; row < Rows; ++row) {
            const Vec low = broadcast(queries[row * head_dim + i]);
            const Vec high = broadcast(queries[row * head_dim + i + half]);
            sums[row][0] += low * first.low;
            sums[row][1] += low * second.low;
            sums[row][0] += high * first.high;
            sums[row][1] += high * second.high;
        }
    }
    for (int i = 2 * half; i < head_dim; ++i) {
        const Vec first = load(keys + i * kLanes), second = load(keys + plane + i * kLanes);
#pragma GCC unroll 8
        for (int row = 0; row < Rows; ++row) {
            const Vec query = broadcast(queries[row * head_dim + i]);
            sums[row][0] += query * first;
            sums[row][1] += query * second;
        }
    }
    for (int row = 0; row < Rows; ++row) {
        store(scores + row * score_stride, sums[row][0]);
        store(scores + row * score_stride + kLanes, sums[row][1]);
    }
}

template <bool Rope>
static void score_some_rows(int rows, const float* keys, int64_t plane, const RopeAngles* angles, const float* queries,
                            int head_dim, float* scores, int64_t stride) {
    switch (rows) {
        case 1: return score_rows<1, Rope>(keys, plane, angles, queries, head_dim, scores, stride);
        case 2: return score_rows<2, Rope>(keys, plane, angles, queries, head_dim, scores, stride);
        case 3: return score_rows<3, Rope>(keys, plane, angles, queries, head_dim, scores, stride);
        case 4: return score_rows<4, Rope>(keys, plane, angles, queries, head_dim, scores, stride);
        case 5: return score_rows<5, Rope>(keys, plane, angles, queries, head_dim, scores, stride);
        case 6: return score_rows<6, Rope>(keys, plane, angles, queries, head_dim, scores, stride);
        case 7: return score_rows<7, Rope>(keys, plane, angles, queries, head_dim, scores, stride);
        default: return score_rows<8, Rope>(keys, plane, angles, queries, head_dim, scores, stride);
    }
}

// All query rows of one key/value head; turns the keys once, in place where several passes read them.
static void score_head(int rows, float* keys, int64_t plane, const RopeAngles* angles, const float* queries,
                       int head_dim, float* scores, int64_t stride) {
    bool rope = angles[0].half > 0;
    if (rope && rows > kMostRows) {
        turn_in_place(keys, angles[0]);
        turn_in_place(keys + plane, angles[1]);
        rope = false;
    }
    for (int row = 0; row < rows; row += kMostRows) {
        const int some = rows - row < kMostRows ? rows - row : kMostRows;
        const float* q = queries + int64_t(row) * head_dim;
        float* to = scores + row * stride;
        if (rope) score_some_rows<true>(some, keys, plane, angles, q, head_dim, to, stride);
        else score_some_rows<false>(some, keys, plane, angles, q, head_dim, to, stride);
    }
}
