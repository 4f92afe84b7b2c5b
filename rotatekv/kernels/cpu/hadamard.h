// Hadamard transforms of vectors of kLanes tokens, un-normalised: y = sqrt(W)·Hᵀ·x, or sqrt(W)·H·x where Forward, with
// the matrix of rotatekv/kernels/hadamard.py, which is Sylvester's of order 2^n, or one of Paley's ⊗ Sylvester's.
#pragma once

#include <array>
#include <utility>

#include "arguments.h"
#include "simd.h"

// Sylvester's order N on the vectors source(0) … source(N − 1), into registers: log2(N)·N additions, some of them as
// multiply-adds. Depth first, so that fetching later vectors overlaps with adding earlier ones.
template <int N, int From = 0, class Source>
static ROTATEKV_INLINE void sylvester(const Source& source, Vec one, Vec* x) {
    if constexpr (N == 1) {
        x[0] = source(From);
    } else {
        sylvester<N / 2, From>(source, one, x);
        sylvester<N / 2, From + N / 2>(source, one, x + N / 2);
#pragma GCC unroll 16
        for (int i = 0; i < N / 2; ++i) {
            const Vec a = x[i], b = x[i + N / 2];
            x[i] = a + b;
            x[i + N / 2] = N >= 16 ? a - b * one : a - b;
        }
    }
}

// Sylvester's order N over vectors `stride` apart, for each of `stride` columns of each run of N·stride vectors.
template <int N>
static void sylvester_pass(float* x, int width, int stride) {
    const Vec one = hidden_one();
    for (int start = 0; start < width; start += N * stride) {
        for (int column = start; column < start + stride; ++column) {
            Vec held[N];
            sylvester<N>([&](int i) { return load(x + (column + i * stride) * kLanes); }, one, held);
#pragma GCC unroll 32
            for (int i = 0; i < N; ++i) store(x + (column + i * stride) * kLanes, held[i]);
        }
    }
}

// Entry (row, column) of Paley's first construction of order P, ±1: a first row of ones, a first column of −1 below
// it, and the quadratic characters of column − row modulo P − 1, with 1 on the diagonal.
template <int P>
constexpr int paley_entry(int row, int column) {
    if (row == 0) return 1;
    if (column == 0) return -1;
    if (row == column) return 1;
    const int prime = P - 1, difference = (column - row + prime) % prime;
    for (int i = 1; i < prime; ++i)
        if (i * i % prime == difference) return 1;
    return -1;
}

// How an output takes four inputs: the sign of the first, and the signs of the others relative to it as a number of
// three bits.
struct PaleyTerm {
    int sign, pattern;
};

template <int P, bool Forward>
constexpr std::array<PaleyTerm, P * P / 4> paley_terms() {
    std::array<PaleyTerm, P * P / 4> terms{};
    for (int output = 0; output < P; ++output) {
        for (int four = 0; four < P / 4; ++four) {
            int signs[4] = {}, pattern = 0;
            for (int i = 0; i < 4; ++i)
                signs[i] = Forward ? paley_entry<P>(output, 4 * four + i) : paley_entry<P>(4 * four + i, output);
            for (int i = 1; i < 4; ++i) pattern = 2 * pattern + (signs[i] != signs[0]);
            terms[output * (P / 4) + four] = {signs[0], pattern};
        }
    }
    return terms;
}

// a ± b ± c ± d for the 8 choices of signs: 12 additions.
static ROTATEKV_INLINE void signed_sums(Vec a, Vec b, Vec c, Vec d, Vec one, Vec* sums) {
    const Vec plus = a + b, minus = a - b * one, sum = c + d, difference = c - d * one;
    sums[0] = plus + sum;
    sums[1] = plus + difference;
    sums[2] = plus - difference * one;
    sums[3] = plus - sum * one;
    sums[4] = minus + sum;
    sums[5] = minus + difference;
    sums[6] = minus - difference * one;
    sums[7] = minus - sum * one;
}

template <int P, bool Forward, int Output, int Four = 0>
static ROTATEKV_INLINE Vec paley_sum(const Vec (*sums)[8], Vec one, Vec partial = Vec{}) {
    if constexpr (Four == P / 4) {
        return partial;
    } else {
        constexpr PaleyTerm term = paley_terms<P, Forward>()[Output * (P / 4) + Four];
        const Vec next = sums[Four][term.pattern];
        const Vec sum = Four == 0 ? (term.sign > 0 ? next : -next) : term.sign > 0 ? partial + next : partial - next * one;
        return paley_sum<P, Forward, Output, Four + 1>(sums, one, sum);
    }
}

template <int P, bool Forward, int... Outputs>
static ROTATEKV_INLINE void store_paley(float* x, int stride, const Vec (*sums)[8], Vec one,
                                        std::integer_sequence<int, Outputs...>) {
    (store(x + Outputs * stride * kLanes, paley_sum<P, Forward, Outputs>(sums, one)), ...);
}

// Paley's order P over vectors `stride` apart: sums of four inputs with every choice of signs, shared by all outputs
// (order 12: 60 additions instead of 132).
template <int P, bool Forward>
static void paley_pass(float* x, int stride) {
    const Vec one = hidden_one();
    for (int column = 0; column < stride; ++column) {
        float* at = x + column * kLanes;
        Vec sums[P / 4][8];
#pragma GCC unroll 8
        for (int four = 0; four < P / 4; ++four) {
            const float* from = at + 4 * four * stride * kLanes;
            signed_sums(load(from), load(from + stride * kLanes), load(from + 2 * stride * kLanes),
                        load(from + 3 * stride * kLanes), one, sums[four]);
        }
        store_paley<P, Forward>(at, stride, sums, one, std::make_integer_sequence<int, P>{});
    }
}

constexpr int kLargestBase = 1024;

// Any order over vectors `stride` apart, for orders that have no pass of their own: a dense product.
template <bool Forward>
static void dense_pass(float* x, int stride, const HadamardBase& base) {
    alignas(64) float held[kLargestBase * kLanes];
    const int order = int(base.order), input_step = Forward ? 1 : order, output_step = Forward ? order : 1;
    for (int column = 0; column < stride; ++column) {
        float* at = x + column * kLanes;
        for (int i = 0; i < order; ++i) store(held + i * kLanes, load(at + i * stride * kLanes));
        for (int j = 0; j < order; j += 4) {
            Vec sums[4] = {};
            for (int i = 0; i < order; ++i) {
                const Vec from = load(held + i * kLanes);
                const float* signs = base.matrix + i * input_step + j * output_step;
#pragma GCC unroll 4
                for (int k = 0; k < 4; ++k) sums[k] += from * signs[k * output_step];
            }
            for (int k = 0; k < 4; ++k) store(at + (j + k) * stride * kLanes, sums[k]);
        }
    }
}

// width = inner · middle · paley: Sylvester's order `inner` on consecutive channels, then order `middle`, then Paley's.
struct HadamardPlan {
    int width = 0, inner = 1, middle = 1, paley = 1;
    HadamardBase base = {};
};

// False if there is no matrix of that order; `base` is looked at for other orders than 2^n, 12·2^n and 20·2^n. Width 0
// means no transform.
static bool plan_hadamard(int64_t width, const HadamardBase& base, HadamardPlan* plan) {
    *plan = HadamardPlan{};
    plan->width = int(width);
    if (width == 0) return true;
    const bool dense = base.matrix && base.order >= 4 && base.order <= kLargestBase && base.order % 4 == 0;
    for (int64_t paley : {int64_t(1), int64_t(12), int64_t(20), dense ? base.order : 1}) {
        if (width % paley) continue;
        const int64_t rest = width / paley;
        if (rest & (rest - 1)) continue;
        plan->base = base;
        plan->paley = int(paley);
        plan->inner = int(rest < 16 ? rest : 16);
        plan->middle = int(rest / plan->inner);
        return true;
    }
    return false;
}

static void sylvester_passes(float* x, int width, int stride, int order) {
    while (order > 1) {
        const int radix = order <= 32 ? order : 16;
        if (radix == 32) sylvester_pass<32>(x, width, stride);
        if (radix == 16) sylvester_pass<16>(x, width, stride);
        if (radix == 8) sylvester_pass<8>(x, width, stride);
        if (radix == 4) sylvester_pass<4>(x, width, stride);
        if (radix == 2) sylvester_pass<2>(x, width, stride);
        stride *= radix;
        order /= radix;
    }
}

template <int Inner, class Loader>
static void inner_pass(float* x, int width, const Loader& loader) {
    const Vec one = hidden_one();
    for (int start = 0; start < width; start += Inner) {
        Vec held[Inner];
        sylvester<Inner>([&](int i) { return loader(start + i); }, one, held);
#pragma GCC unroll 16
        for (int i = 0; i < Inner; ++i) store(x + (start + i) * kLanes, held[i]);
    }
}

// The passes over x (channels, kLanes) ← (loader(0), loader(1), …); `channels` is W, or any number when W = 0.
template <class Loader>
static void first_pass(const HadamardPlan& plan, int channels, float* x, const Loader& loader) {
    switch (plan.inner) {
        case 16: inner_pass<16>(x, channels, loader); break;
        case 8: inner_pass<8>(x, channels, loader); break;
        case 4: inner_pass<4>(x, channels, loader); break;
        case 2: inner_pass<2>(x, channels, loader); break;
        default: inner_pass<1>(x, channels, loader);
    }
}

template <bool Forward = false>
static void last_passes(const HadamardPlan& plan, int channels, float* x) {
    sylvester_passes(x, channels, plan.inner, plan.middle);
    const int stride = plan.inner * plan.middle;
    if (plan.paley == 12) paley_pass<12, Forward>(x, stride);
    else if (plan.paley == 20) paley_pass<20, Forward>(x, stride);
    else if (plan.paley > 1) dense_pass<Forward>(x, stride, plan.base);
}

// x (channels, kLanes) ← sqrt(W)·Hᵀ·(loader(0), loader(1), …), or H
template <bool Forward, class Loader>
static void hadamard(const HadamardPlan& plan, int channels, float* x, const Loader& loader) {
    first_pass(plan, channels, x, loader);
    last_passes<Forward>(plan, channels, x);
}
