// The layout of transform-coded keys and values, rotatekv/kernels/transform_coding.py: groups, planes, words and scales.
#pragma once

#include <vector>

#include "arguments.h"
#include "simd.h"

constexpr int kGroup = 16;   // components of one number of bits
constexpr int kScaleSteps = 8;   // of a factor of two
constexpr int kScaleZero = 128;  // stored for a scale of 1
constexpr int kSingleShift[kGroup] = {0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 6, 7, 12, 13, 14, 15};

// A group of components that is stored, and the first of its planes among those of all heads.
struct CodedGroup {
    int index, bits;  // which group of the head
    float middle;     // ½ − 2^(bits − 1), what is added to a code
    float noise;      // mean square of a component's rounding error, see CodedPointers
    int64_t pair, single;
};

// The coded groups of each head.
static std::vector<std::vector<CodedGroup>> coded_groups(const CodedPointers& coded, int64_t heads, int64_t groups) {
    std::vector<std::vector<CodedGroup>> of_heads(static_cast<size_t>(heads));
    int64_t pair = 0, single = 0;
    for (int64_t i = 0; i < heads * groups; ++i) {
        const int bits = coded.bits[i];
        const float middle = 0.5f - float(1 << bits) / 2;
        if (bits) of_heads[i / groups].push_back({int(i % groups), bits, middle, coded.noise[bits], pair, single});
        pair += bits / 2;
        single += bits % 2;
    }
    return of_heads;
}

// A head's planes among those of all heads: the first ones, and how many.
struct HeadPlanes {
    int64_t pair = 0, pairs = 0, single = 0, singles = 0;
};

static std::vector<HeadPlanes> planes_of_heads(const std::vector<std::vector<CodedGroup>>& coded) {
    std::vector<HeadPlanes> of_heads;
    for (const auto& groups : coded) {
        HeadPlanes planes;
        if (!groups.empty()) {
            planes.pair = groups[0].pair;
            planes.single = groups[0].single;
        }
        for (const CodedGroup& group : groups) {
            planes.pairs += group.bits / 2;
            planes.singles += group.bits % 2;
        }
        of_heads.push_back(planes);
    }
    return of_heads;
}

// Starts to fetch a head's planes of a block, and its scales: the memory of one of `heads` heads.
template <int Level>
static ROTATEKV_INLINE void fetch_planes(const CodedPointers& coded, int64_t block, int64_t heads, int64_t head,
                                         const HeadPlanes& of) {
    prefetch<Level>(coded.pairs + (block * coded.pair_planes + of.pair) * kBlock, of.pairs * kBlock * 4);
    prefetch<Level>(coded.singles + (block * coded.single_planes + of.single) * kBlock, of.singles * kBlock * 2);
    prefetch<Level>(coded.scale + (block * heads + head) * kBlock, kBlock);
}

// kLanes words, of 16 codes each: bytes(j) has the codes j, 4 + j, 8 + j and 12 + j in the four bytes.
template <int Bits>
struct CodedWords {
    WordVec low, high, single;

    // Words of a group's planes from `pairs` and `singles` on.
    ROTATEKV_INLINE void read(const int32_t* pairs, const int16_t* singles) {
        if (Bits >= 2) low = load_words(pairs);
        if (Bits >= 4) high = load_words(pairs + kBlock);
        if (Bits % 2) {
            single = load_short_words(singles);
            single |= single << 12;  // four codes in the low half of each byte
        }
    }

    ROTATEKV_INLINE WordVec bytes(int j) const {
        WordVec codes = {};
        if (Bits >= 2) codes = low >> (2 * j) & 0x03030303u;
        if (Bits >= 4) codes |= (high >> (2 * j) & 0x03030303u) << 2;
        if (Bits % 2) codes |= (single >> j & 0x01010101u) << (Bits - 1);
        return codes;
    }
};

// The fraction's bits of 2^(i / 8).
alignas(32) constexpr int32_t kEighths[8] = {0x000000, 0x0b95c2, 0x1837f0, 0x25fed7,
                                             0x3504f3, 0x45672a, 0x5744fd, 0x6ac0c7};

static ROTATEKV_INLINE IntVec eighth_of_power(IntVec i) {
#if defined(__AVX512F__)
    const __m256i table = _mm256_load_si256(reinterpret_cast<const __m256i*>(kEighths));
    return (IntVec)_mm512_permutexvar_epi32((__m512i)i, _mm512_castsi256_si512(table));
#elif defined(__AVX2__)
    const __m256i table = _mm256_load_si256(reinterpret_cast<const __m256i*>(kEighths));
    return (IntVec)_mm256_permutevar8x32_epi32(table, (__m256i)i);
#else
    IntVec bits;
    for (int lane = 0; lane < kLanes; ++lane) bits[lane] = kEighths[i[lane]];
    return bits;
#endif
}

// The stored scales of kLanes tokens.
static ROTATEKV_INLINE Vec load_frame_scales(const uint8_t* from) {
    typedef uint8_t Bytes __attribute__((vector_size(kLanes), aligned(1), may_alias));
    const IntVec stored = __builtin_convertvector(*reinterpret_cast<const Bytes*>(from), IntVec);
    return (Vec)((((stored >> 3) + (127 - kScaleZero / kScaleSteps)) << 23) + eighth_of_power(stored & 7));
}

// The scale that 0 … 256 stands for.
static float frame_scale(int stored) {
    const int32_t power = stored / kScaleSteps + 127 - kScaleZero / kScaleSteps;
    const int32_t bits = (power << 23) + kEighths[stored % kScaleSteps];
    float scale;
    std::memcpy(&scale, &bits, 4);
    return scale;
}
