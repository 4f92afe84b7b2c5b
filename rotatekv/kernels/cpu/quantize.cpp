// Quantize-and-pack: rotatekv/quantize.py in the same order of float32 operations, bit for bit, written into blocks.
// Compiled without fused multiply-adds. Rounding is to the nearest, halves to even, throughout.

#include <algorithm>
#include <cmath>
#include <vector>

#include "arguments.h"
#include "simd.h"

constexpr float kZeroPointLimit = 127.0f;
constexpr float kSmallestScale = 5.9604644775390625e-8f;  // 2^-24, the smallest positive float16
constexpr float kLargestScale = 65504.0f;                 // the largest float16

static uint16_t float_to_half(float x) {
#if defined(__F16C__)
    return uint16_t(_cvtss_sh(x, 0));  // 0: to nearest
#else
    if (x < 6.103515625e-5f) return uint16_t(std::nearbyint(x / kSmallestScale));  // subnormal; x is not negative
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    bits += 0x0fff + (bits >> 13 & 1);  // round the 13 bits that go, halves to even
    return uint16_t((bits >> 13) - (112 << 10));
#endif
}

// Adding 1.5·2^23 rounds numbers below 2^22 to integers; larger ones end outside the clamp anyway. NaN gives `low`.
static ROTATEKV_INLINE float round_and_clamp(float x, float offset, float low, float high) {
    const float limit = 4194304.0f;  // 2^22
    const float bounded = x < -limit ? -limit : x > limit ? limit : x;
    const float rounded = bounded + 12582912.0f - 12582912.0f;
    const float sum = rounded + offset;
    return sum > low ? (sum < high ? sum : high) : low;
}

struct Scale {
    uint16_t stored;  // float16
    int8_t zero;
    float wide;  // the scale as it is stored, float32
};

static Scale scale_of(const float* group, int64_t size, float clip_ratio, int bits) {
    float top = group[0], bottom = group[0];
    for (int64_t i = 1; i < size; ++i) {
        top = std::max(top, group[i]);
        bottom = std::min(bottom, group[i]);
    }
    top *= clip_ratio;
    bottom *= clip_ratio;
    const float levels = float((1 << bits) - 1);
    const float wanted = std::max((top - bottom) / levels, std::fabs(bottom) / kZeroPointLimit);
    Scale scale;
    scale.stored = float_to_half(std::min(std::max(wanted, kSmallestScale), kLargestScale));
    scale.wide = half_to_float(scale.stored);
    scale.zero = int8_t(round_and_clamp(-bottom / scale.wide, 0.0f, -kZeroPointLimit, kZeroPointLimit));
    return scale;
}

// Puts `width` bits of a token's code into a word of its block.
template <class Word>
static ROTATEKV_INLINE void put(Word* word, int token, int width, uint32_t code) {
    const uint32_t mask = (1u << width) - 1;
    const int shift = token * width;
    *word = Word((uint32_t(*word) & ~(mask << shift)) | (code & mask) << shift);
}

static void quantize_token(const QuantizeArguments& a, int64_t row, int64_t token, uint8_t* codes) {
    const PackedPointers& blocks = a.blocks;
    const int bits = int(blocks.bits), lane = int((a.start + token) % kBlock);
    const int64_t block = row * blocks.blocks + (a.start + token) / kBlock, size = a.channels / blocks.groups;
    const float* x = a.x + (row * a.tokens + token) * a.channels;
    const float levels = float((1 << bits) - 1);
    for (int64_t group = 0; group < blocks.groups; ++group) {
        const Scale scale = scale_of(x + group * size, size, a.clip_ratio, bits);
        const int64_t at = (block * blocks.groups + group) * kBlock + lane;
        const_cast<uint16_t*>(blocks.scale)[at] = scale.stored;
        const_cast<int8_t*>(blocks.zero)[at] = scale.zero;
        for (int64_t i = group * size; i < (group + 1) * size; ++i)
            codes[i] = uint8_t(int(round_and_clamp(x[i] / scale.wide, float(scale.zero), 0.0f, levels)));
    }
    int32_t* low = const_cast<int32_t*>(blocks.low);
    void* high = const_cast<void*>(blocks.high);
    for (int64_t i = 0; i < a.channels; ++i) {
        const int64_t to = block * a.channels + (a.order ? a.order[i] : i);
        put(low + to, lane, 2, codes[i]);
        if (bits == 3) put(static_cast<int16_t*>(high) + to, lane, 1, codes[i] >> 2);
        if (bits == 4) put(static_cast<int32_t*>(high) + to, lane, 2, codes[i] >> 2);
    }
}

static const char* check_order(const QuantizeArguments& a) {
    std::vector<bool> seen(size_t(a.channels), false);
    for (int64_t i = 0; a.order && i < a.channels; ++i) {
        if (a.order[i] < 0 || a.order[i] >= a.channels || seen[a.order[i]]) return "order is not a permutation";
        seen[a.order[i]] = true;
    }
    return nullptr;
}

static const char* check_quantize(const QuantizeArguments& a) {
    const PackedPointers& blocks = a.blocks;
    if (a.structure_bytes != int64_t(sizeof(QuantizeArguments))) return "built from other sources: rebuild";
    if (a.batch < 0 || a.tokens < 0 || a.channels < 1) return "sizes must be positive";
    if (blocks.bits < 2 || blocks.bits > 4) return "bits must be 2, 3 or 4";
    if (blocks.groups < 1 || a.channels % blocks.groups) return "the groups do not divide the channels";
    if (a.start < 0 || a.start + a.tokens > blocks.blocks * kBlock) return "the tokens do not fit in the blocks";
    if (a.threads < 1 || a.threads > 1024) return "threads must be 1 … 1024";
    if (!(a.clip_ratio > 0.0f)) return "clip_ratio must be positive";
    if (a.batch == 0 || a.tokens == 0) return nullptr;
    if (!a.x || !blocks.low || !blocks.scale || !blocks.zero || (blocks.bits > 2 && !blocks.high))
        return "a tensor is missing";
    return check_order(a);
}

// Null, or one line that says what is wrong with the arguments. Threads take whole blocks, so none shares a word.
extern "C" __attribute__((visibility("default"))) const char* rotatekv_quantize(const QuantizeArguments* arguments) {
    if (!arguments) return "no arguments";
    const QuantizeArguments& a = *arguments;
    if (const char* wrong = check_quantize(a)) return wrong;
    const int64_t first = a.start / kBlock, blocks = (a.start + a.tokens + kBlock - 1) / kBlock - first;
    const int64_t tasks = a.batch * blocks, threads = std::max<int64_t>(1, std::min(a.threads, tasks));
    std::vector<uint8_t> codes(size_t(threads * a.channels));
#pragma omp parallel for schedule(static) num_threads(int(threads)) if (threads > 1)
    for (int64_t part = 0; part < threads; ++part) {
        for (int64_t task = tasks * part / threads; task < tasks * (part + 1) / threads; ++task) {
            const int64_t row = task / blocks, block = first + task % blocks;
            const int64_t from = std::max(block * kBlock - a.start, int64_t(0));
            const int64_t to = std::min((block + 1) * kBlock - a.start, a.tokens);
            for (int64_t token = from; token < to; ++token)
                quantize_token(a, row, token, codes.data() + part * a.channels);
        }
    }
    return nullptr;
}
