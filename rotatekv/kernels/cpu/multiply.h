// Products of small matrices.
#pragma once

#include "simd.h"

// Sums over k of a[i·row + k·step]·b[k] for I rows and V vectors; b's rows are `width` floats apart, as are the sums'.
template <int I, int V>
static ROTATEKV_INLINE void multiply_tile(const float* a, int64_t row, int64_t step, const float* b, int64_t count,
                                          int64_t width, float* sums) {
    Vec tile[I][V] = {};
    for (int64_t k = 0; k < count; ++k) {
        Vec numbers[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) numbers[v] = load(b + k * width + v * kLanes);
#pragma GCC unroll 8
        for (int i = 0; i < I; ++i)
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) tile[i][v] += numbers[v] * a[i * row + k * step];
    }
    for (int i = 0; i < I; ++i)
        for (int v = 0; v < V; ++v) store(sums + i * width + v * kLanes, tile[i][v]);
}

template <int I, int V>
static void multiply_columns(const float* a, int64_t rows, int64_t row, int64_t step, const float* b, int64_t count,
                             int64_t width, float* sums) {
    int64_t i = 0;
    for (; i + I <= rows; i += I) multiply_tile<I, V>(a + i * row, row, step, b, count, width, sums + i * width);
    for (; i < rows; ++i) multiply_tile<1, V>(a + i * row, row, step, b, count, width, sums + i * width);
}

// sums (rows, width) ← a (rows, count)·b (count, width); a's strides are `row` and `step`.
static void multiply(const float* a, int64_t rows, int64_t row, int64_t step, const float* b, int64_t count,
                     int64_t width, float* sums) {
    int64_t at = 0;
    for (; at + 3 * kLanes <= width; at += 3 * kLanes)
        multiply_columns<4, 3>(a, rows, row, step, b + at, count, width, sums + at);
    for (; at + 2 * kLanes <= width; at += 2 * kLanes)
        multiply_columns<4, 2>(a, rows, row, step, b + at, count, width, sums + at);
    for (; at < width; at += kLanes) multiply_columns<8, 1>(a, rows, row, step, b + at, count, width, sums + at);
}
