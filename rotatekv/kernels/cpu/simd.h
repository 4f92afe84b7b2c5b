// Vectors of kLanes numbers by GCC's vector extension: the same source serves every instruction set.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

constexpr int kBlock = 16;  // tokens whose codes share a word

#define ROTATEKV_INLINE inline __attribute__((always_inline))

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntVec __attribute__((vector_size(4 * kLanes)));
typedef uint32_t WordVec __attribute__((vector_size(4 * kLanes)));
typedef float UnalignedVec __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef uint32_t UnalignedWordVec __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

static ROTATEKV_INLINE Vec load(const float* from) { return *reinterpret_cast<const UnalignedVec*>(from); }
static ROTATEKV_INLINE void store(float* to, Vec x) { *reinterpret_cast<UnalignedVec*>(to) = x; }
static ROTATEKV_INLINE WordVec load_words(const int32_t* from) {
    return *reinterpret_cast<const UnalignedWordVec*>(from);
}
static ROTATEKV_INLINE WordVec load_words(const uint32_t* from) {
    return *reinterpret_cast<const UnalignedWordVec*>(from);
}
static ROTATEKV_INLINE void store_words(uint32_t* to, WordVec x) { *reinterpret_cast<UnalignedWordVec*>(to) = x; }
static ROTATEKV_INLINE Vec broadcast(float x) { return x - Vec{}; }  // x + 0 would cost an addition: −0 + 0 is not −0
static ROTATEKV_INLINE WordVec broadcast_word(uint32_t x) { return WordVec{} + x; }

// The largest integers that are not above x, for numbers between −2^22 and 2^22.
static ROTATEKV_INLINE Vec floor_small(Vec x) {
#if defined(__AVX512F__)
    return (Vec)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
    return (Vec)_mm256_floor_ps((__m256)x);
#else
    const Vec rounded = x + 12582912.0f - 12582912.0f;
    return rounded - (rounded > x ? broadcast(1.0f) : Vec{});
#endif
}

// Starts to fetch memory into the first cache, or (Level 2) the second; it need not be there.
template <int Level>
static ROTATEKV_INLINE void prefetch(const void* from, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64)
        __builtin_prefetch(static_cast<const char*>(from) + i, 0, Level == 1 ? 3 : 2);
}

// 1 that the compiler does not know of, so that a + b·one stays a fused multiply-add. AMD cores add on two pipes and
// multiply-add on two others: sums that take turns between them run nearly twice as fast. The result is the same.
static ROTATEKV_INLINE Vec hidden_one() {
    Vec one = broadcast(1.0f);
#if defined(__AVX512F__)
    asm("" : "+v"(one));
#elif defined(__FMA__)
    asm("" : "+x"(one));
#endif
    return one;
}

static ROTATEKV_INLINE Vec to_float(IntVec x) { return __builtin_convertvector(x, Vec); }
static ROTATEKV_INLINE WordVec to_words(Vec x) { return (WordVec)__builtin_convertvector(x, IntVec); }  // 0 … 2^31 − 1

// b where one of the two is no number: GCC makes a comparison and a choice of a > b ? a : b.
static ROTATEKV_INLINE Vec max(Vec a, Vec b) {
#if defined(__AVX512F__)
    return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (Vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return a > b ? a : b;
#endif
}
static ROTATEKV_INLINE Vec min(Vec a, Vec b) {
#if defined(__AVX512F__)
    return (Vec)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (Vec)_mm256_min_ps((__m256)a, (__m256)b);
#else
    return a < b ? a : b;
#endif
}


// Lane i is lane From[i] of a; kLanes … are b's.
template <int... From>
static ROTATEKV_INLINE Vec shuffle(Vec a, Vec b) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, From...);
#else  // GCC has the other since version 12
    return __builtin_shuffle(a, b, IntVec{From...});
#endif
}

constexpr auto kAllLanes = std::make_integer_sequence<int, kLanes>{};

// Each lane next to the one whose number differs by the bit Step.
template <int Step, int... Lanes>
static ROTATEKV_INLINE Vec neighbours(Vec x, std::integer_sequence<int, Lanes...>) {
    return shuffle<(Lanes ^ Step)...>(x, x);
}

template <int Step = kLanes / 2>
static ROTATEKV_INLINE float sum_lanes(Vec x) {
    if constexpr (Step == 0) return x[0];
    else return sum_lanes<Step / 2>(x + neighbours<Step>(x, kAllLanes));
}

template <int Step = kLanes / 2>
static ROTATEKV_INLINE float max_lanes(Vec x) {
    if constexpr (Step == 0) return x[0];
    else return max_lanes<Step / 2>(max(x, neighbours<Step>(x, kAllLanes)));
}

// 0, 1, … kLanes − 1
static ROTATEKV_INLINE WordVec lane_numbers() {
    WordVec lanes;
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = lane;
    return lanes;
}

// 2^x for x ≤ 0, relative error below 2e-7; exactly 0 below −126, for −infinity too.
static ROTATEKV_INLINE Vec exp2_nonpositive(Vec x) {
    const Vec lowest = broadcast(-126.0f), rounding = broadcast(12582912.0f);  // 1.5·2^23: adding it rounds
    const Vec clamped = max(x, lowest);
    const Vec shifted = clamped + rounding;
    const Vec f = clamped - (shifted - rounding);  // in [−0.5, 0.5]
    Vec y = broadcast(1.5403530e-4f);              // ln(2)^n / n! for n = 6 … 0
    y = y * f + 1.3333558e-3f;
    y = y * f + 9.6181291e-3f;
    y = y * f + 5.5504109e-2f;
    y = y * f + 2.4022651e-1f;
    y = y * f + 6.9314718e-1f;
    y = y * f + 1.0f;
    const IntVec power = (IntVec)shifted << 23;
    return x < lowest ? Vec{} : (Vec)((IntVec)y + power);
}

static ROTATEKV_INLINE float half_to_float(uint16_t bits) {
#if defined(__F16C__)
    return _cvtsh_ss(bits);
#else
    const uint32_t sign = uint32_t(bits & 0x8000) << 16, rest = bits & 0x7fff;
    float magnitude;
    if (rest >= 0x7c00) {  // infinity, not a number
        const uint32_t word = 0x7f800000u | (rest & 0x3ff) << 13;
        std::memcpy(&magnitude, &word, 4);
    } else if (rest < 0x400) {
        magnitude = float(rest) * 5.9604644775390625e-8f;  // subnormal: multiples of 2^-24
    } else {
        const uint32_t word = (rest << 13) + 0x38000000u;  // exponent bias 15 → 127
        std::memcpy(&magnitude, &word, 4);
    }
    return sign ? -magnitude : magnitude;
#endif
}

// kLanes consecutive float16 → float32
static ROTATEKV_INLINE Vec load_halves(const uint16_t* from) {
#if defined(__AVX512F__)
    return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__AVX2__)
    return (Vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
    Vec x;
    for (int lane = 0; lane < kLanes; ++lane) x[lane] = half_to_float(from[lane]);
    return x;
#endif
}

static ROTATEKV_INLINE float bfloat_to_float(uint16_t bits) {
    const uint32_t word = uint32_t(bits) << 16;
    float x;
    std::memcpy(&x, &word, 4);
    return x;
}

// kLanes consecutive bfloat16 → float32
static ROTATEKV_INLINE Vec load_bfloats(const uint16_t* from) {
    typedef uint16_t Shorts __attribute__((vector_size(2 * kLanes), aligned(2), may_alias));
    return (Vec)(__builtin_convertvector(*reinterpret_cast<const Shorts*>(from), WordVec) << 16);
}

// kLanes consecutive int8 → float32
static ROTATEKV_INLINE Vec load_bytes(const int8_t* from) {
#if defined(__AVX512F__)
    return (Vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#elif defined(__AVX2__)
    return (Vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#else
    Vec x;
    for (int lane = 0; lane < kLanes; ++lane) x[lane] = from[lane];
    return x;
#endif
}

// kLanes consecutive bytes, zero-extended
static ROTATEKV_INLINE WordVec load_byte_words(const uint8_t* from) {
#if defined(__AVX512F__)
    return (WordVec)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#elif defined(__AVX2__)
    return (WordVec)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
#else
    WordVec words;
    for (int lane = 0; lane < kLanes; ++lane) words[lane] = from[lane];
    return words;
#endif
}

// The lowest byte of each lane.
static ROTATEKV_INLINE void store_low_bytes(uint8_t* to, IntVec x) {
#if defined(__AVX512F__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8((__m512i)x));
#else
    for (int lane = 0; lane < kLanes; ++lane) to[lane] = uint8_t(x[lane]);
#endif
}

// All lanes' bits together.
static ROTATEKV_INLINE uint32_t join_lanes(WordVec x) {
#if defined(__AVX512F__)
    return uint32_t(_mm512_reduce_or_epi32((__m512i)x));
#else
    uint32_t all = 0;
    for (int lane = 0; lane < kLanes; ++lane) all |= x[lane];
    return all;
#endif
}

// kLanes consecutive 16-bit words, zero-extended
static ROTATEKV_INLINE WordVec load_short_words(const int16_t* from) {
    typedef uint16_t Shorts __attribute__((vector_size(2 * kLanes), aligned(2), may_alias));
    return __builtin_convertvector(*reinterpret_cast<const Shorts*>(from), WordVec);
}

// The nearest integers of numbers between −2^22 and 2^22.
static ROTATEKV_INLINE IntVec to_nearest(Vec x) {
    const Vec shifted = x + 12582912.0f;  // 1.5·2^23: adding it rounds
    return (IntVec)shifted - (IntVec)broadcast(12582912.0f);
}

static ROTATEKV_INLINE void store_shorts(int16_t* to, IntVec x) {
    typedef int16_t Shorts __attribute__((vector_size(2 * kLanes), aligned(2), may_alias));
    *reinterpret_cast<Shorts*>(to) = __builtin_convertvector(x, Shorts);
}

// The lowest bytes of 16 numbers as four words: word j holds, from its lowest byte, the numbers j, 4 + j, 8 + j and
// 12 + j. In that order a shift and a mask give codes of two bits.
static ROTATEKV_INLINE void store_bytes(const IntVec* numbers, int32_t* words) {
#if defined(__AVX512F__)
    const __m128i order = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m128i bytes = _mm512_cvtepi32_epi8((__m512i)numbers[0]);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(words), _mm_shuffle_epi8(bytes, order));
#else
    uint8_t* bytes = reinterpret_cast<uint8_t*>(words);
    for (int i = 0; i < 16; ++i) bytes[i % 4 * 4 + i / 4] = uint8_t(numbers[i / kLanes][i % kLanes]);
#endif
}

// sum[i] + Σ_b a.byte[4i + b]·b.byte[4i + b]; a 0 … 255, b −128 … 127, no two products above 2^15 together.
static ROTATEKV_INLINE IntVec dot_bytes(IntVec sum, WordVec a, WordVec b) {
#if defined(__AVX512VNNI__)
    return (IntVec)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif defined(__AVX512BW__)
    const __m512i pairs = _mm512_maddubs_epi16((__m512i)a, (__m512i)b);
    return sum + (IntVec)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
#elif defined(__AVX2__)
    const __m256i pairs = _mm256_maddubs_epi16((__m256i)a, (__m256i)b);
    return sum + (IntVec)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
    for (int byte = 0; byte < 32; byte += 8)
        sum += (IntVec)(a >> byte & 0xffu) * ((IntVec)(b << (24 - byte)) >> 24);
    return sum;
#endif
}

// sum[i] + a.short[2i]·b.short[2i] + a.short[2i + 1]·b.short[2i + 1], signed.
static ROTATEKV_INLINE IntVec dot_shorts(IntVec sum, WordVec a, WordVec b) {
#if defined(__AVX512VNNI__)
    return (IntVec)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif defined(__AVX512BW__)
    return sum + (IntVec)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return sum + (IntVec)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
    const IntVec low = ((IntVec)(a << 16) >> 16) * ((IntVec)(b << 16) >> 16);
    return sum + low + ((IntVec)a >> 16) * ((IntVec)b >> 16);
#endif
}
