// Heads → blocks: what channels.h makes of them, quantized as rotatekv/kernels/quantize.py does it, in the same order of float32
// operations, bit for bit. Compiled without fused multiply-adds. Rounding is to the nearest, halves to even, throughout.

#include <algorithm>
#include <cmath>
#include <vector>

#include "channels.h"
#include "checks.h"
#include "scales.h"

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
template <class Number>  // float or Vec
static ROTATEKV_INLINE Number round_and_clamp(Number x, float offset, float low, float high) {
    const Number zero = {}, limit = zero + 4194304.0f;  // 2^22
    const Number above = x > limit ? limit : x, bounded = x < -limit ? -limit : above;
    const Number rounded = bounded + 12582912.0f - 12582912.0f;
    const Number sum = rounded + offset, least = zero + low, most = zero + high;
    const Number below = sum < most ? sum : most;
    return sum > least ? below : least;
}

struct Scale {
    uint16_t stored;  // float16
    int8_t zero;
    float value;  // what is stored, in float32
};

static uint16_t stored_half(float wanted) {
    return float_to_half(std::min(std::max(wanted, kSmallestScale), kLargestScale));
}

static Scale scale_of(const float* group, int64_t size, float clip_ratio, int bits) {
    float top = group[0], bottom = group[0];
    int64_t i = 0;
    if (size >= kLanes) {
        Vec tops = load(group), bottoms = tops;
        for (i = kLanes; i + kLanes <= size; i += kLanes) {
            const Vec x = load(group + i);
            tops = max(tops, x);
            bottoms = min(bottoms, x);
        }
        top = max_lanes(tops);
        bottom = -max_lanes(-bottoms);
    }
    for (; i < size; ++i) {
        top = std::max(top, group[i]);
        bottom = std::min(bottom, group[i]);
    }
    const float levels = float((1 << bits) - 1);
    top *= clip_ratio;
    bottom *= clip_ratio;
    const float wanted = std::max((top - bottom) / levels, std::fabs(bottom) / kZeroPointLimit);
    Scale scale;
    scale.stored = stored_half(wanted);
    scale.value = half_to_float(scale.stored);
    scale.zero = int8_t(round_and_clamp(-bottom / scale.value, 0.0f, -kZeroPointLimit, kZeroPointLimit));
    return scale;
}

// The codes of one block's tokens, as its words, channels as they are quantized; 0 at the tokens that are not written.
struct Words {
    std::vector<uint32_t> low, high;  // (C,)
    Channels channels;

    explicit Words(const QuantizeArguments& a)
        : low(size_t(a.kv_heads * a.head_dim)), high(low.size()), channels(a) {}

    void clear() {
        std::fill(low.begin(), low.end(), 0);
        std::fill(high.begin(), high.end(), 0);
    }
};

constexpr int high_width(int64_t bits) { return int(bits) - 2; }  // bits of a code in the plane of high bits

// Codes of the `size` channels of a group, put at token `lane` of the words.
static void put_codes(const float* x, int64_t size, const Scale& scale, int bits, int lane, uint32_t* low,
                      uint32_t* high) {
    const float levels = float((1 << bits) - 1);
    const float zero = scale.zero;
    const int shift = 2 * lane, high_shift = high_width(bits) * lane;
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) {
        const WordVec code = to_words(round_and_clamp(load(x + i) / scale.value, zero, 0.0f, levels));
        store_words(low + i, load_words(low + i) | (code & 3u) << shift);
        if (bits > 2) store_words(high + i, load_words(high + i) | code >> 2 << high_shift);
    }
    for (; i < size; ++i) {
        const uint32_t code = uint32_t(int(round_and_clamp(x[i] / scale.value, zero, 0.0f, levels)));
        low[i] |= (code & 3u) << shift;
        high[i] |= code >> 2 << high_shift;
    }
}

static void quantize_token(const QuantizeArguments& a, int64_t row, int64_t token, Words* words) {
    const PackedPointers& blocks = a.blocks;
    const int bits = int(blocks.bits), lane = int((a.start + token) % kBlock);
    const int64_t block = row * blocks.blocks + (a.start + token) / kBlock, size = int64_t(words->low.size()) / blocks.groups;
    const float* x = words->channels.read(row, token);
    for (int64_t group = 0; group < blocks.groups; ++group) {
        const Scale scale = scale_of(x + group * size, size, a.clip_ratio, bits);
        const int64_t at = (block * blocks.groups + group) * kBlock + lane, first = group * size;
        static_cast<uint16_t*>(const_cast<void*>(blocks.scale))[at] = scale.stored;
        const_cast<int8_t*>(blocks.zero)[at] = scale.zero;
        put_codes(x + first, size, scale, bits, lane, words->low.data() + first, words->high.data() + first);
    }
}

// Puts words into a plane with `width` bits a token, where the tokens `from` … `to` − 1 of the block are new.
template <class Word>
static void write_plane(const uint32_t* words, int width, int from, int to, const int32_t* order, int64_t channels,
                        Word* plane) {
    const uint32_t mask = uint32_t((uint64_t(1) << to * width) - (uint64_t(1) << from * width));
    for (int64_t i = 0; i < channels; ++i) {
        Word& word = plane[order ? order[i] : i];
        word = Word((uint32_t(word) & ~mask) | words[i]);
    }
}

// Tokens from … to − 1 of the call, which lie in one block.
static void quantize_block(const QuantizeArguments& a, int64_t row, int64_t from, int64_t to, Words* words) {
    words->clear();
    for (int64_t token = from; token < to; ++token) quantize_token(a, row, token, words);
    const int64_t block = (a.start + from) / kBlock, channels = int64_t(words->low.size());
    const int64_t at = (row * a.blocks.blocks + block) * channels;
    const int first = int(a.start + from - block * kBlock), last = int(a.start + to - block * kBlock);
    const auto write = [&](const std::vector<uint32_t>& plane, int width, auto* stored) {
        write_plane(plane.data(), width, first, last, a.order, channels, stored + at);
    };
    void* high = const_cast<void*>(a.blocks.high);
    write(words->low, 2, const_cast<int32_t*>(a.blocks.low));
    if (a.blocks.bits == 3) write(words->high, high_width(3), static_cast<int16_t*>(high));
    if (a.blocks.bits == 4) write(words->high, high_width(4), static_cast<int32_t*>(high));
}

static const char* check_order(const QuantizeArguments& a, int64_t channels) {
    if (const char* wrong = check_indices(a.order, a.order ? channels : 0, channels, "order is not a permutation"))
        return wrong;
    std::vector<uint8_t> seen(size_t(channels), !a.order);
    for (int64_t i = 0; a.order && i < channels; ++i) seen[a.order[i]] = 1;
    return std::find(seen.begin(), seen.end(), 0) == seen.end() ? nullptr : "order is not a permutation";
}

static const char* check_quantize(const QuantizeArguments& a) {
    const PackedPointers& blocks = a.blocks;
    ROTATEKV_REQUIRE(a.structure_bytes == int64_t(sizeof(QuantizeArguments)), "built from other sources: rebuild");
    ROTATEKV_REQUIRE(a.batch >= 0 && a.tokens >= 0 && a.kv_heads >= 1 && a.head_dim >= 1, "sizes must be positive");
    const int64_t channels = a.kv_heads * a.head_dim;
    ROTATEKV_REQUIRE(channels <= (1 << 20), "too many channels");
    ROTATEKV_REQUIRE(blocks.bits >= 2 && blocks.bits <= 4, "bits must be 2, 3 or 4");
    ROTATEKV_REQUIRE(blocks.groups >= 1 && channels % blocks.groups == 0, "the groups do not divide the channels");
    ROTATEKV_REQUIRE(a.start >= 0 && a.start + a.tokens <= blocks.blocks * kBlock, "the tokens do not fit in the blocks");
    ROTATEKV_REQUIRE(a.threads >= 1 && a.threads <= 1024, "threads must be 1 … 1024");
    ROTATEKV_REQUIRE(a.clip_ratio > 0.0f, "clip_ratio must be positive");
    ROTATEKV_REQUIRE(a.number >= 0 && a.number <= 2, "heads must be float32, float16 or bfloat16");
    if (const char* wrong = check_rotation(a.rotation_width, a.base, a.kv_heads, a.head_dim)) return wrong;
    ROTATEKV_REQUIRE(a.rotary_dim >= 0 && a.rotary_dim <= a.head_dim && a.rotary_dim % 2 == 0,
                     "rotary_dim must be even and at most head_dim");
    if (a.batch == 0 || a.tokens == 0) return nullptr;
    ROTATEKV_REQUIRE(a.heads && blocks.low && blocks.scale && blocks.zero && (blocks.bits == 2 || blocks.high),
                     "a tensor is missing");
    ROTATEKV_REQUIRE(a.rotary_dim == 0 || (a.cos && a.sin), "a table of cos or sin is missing");
    return check_order(a, channels);
}

// Null, or one line that says what is wrong with the arguments. Threads take whole blocks, so none shares a word.
extern "C" __attribute__((visibility("default"))) const char* rotatekv_quantize(const QuantizeArguments* arguments) {
    if (!arguments) return "no arguments";
    const QuantizeArguments& a = *arguments;
    if (const char* wrong = check_quantize(a)) return wrong;
    const int64_t first = a.start / kBlock, blocks = (a.start + a.tokens + kBlock - 1) / kBlock - first;
    const int64_t tasks = a.batch * blocks, threads = std::max<int64_t>(1, std::min(a.threads, tasks));
    std::vector<Words> words;
    for (int64_t i = 0; i < threads; ++i) words.emplace_back(a);
    const auto run = [&](int64_t part) {
        for (int64_t task = tasks * part / threads; task < tasks * (part + 1) / threads; ++task) {
            const int64_t row = task / blocks, block = first + task % blocks;
            const int64_t from = std::max(block * kBlock - a.start, int64_t(0));
            const int64_t to = std::min((block + 1) * kBlock - a.start, a.tokens);
            quantize_block(a, row, from, to, &words[part]);
        }
    };
    if (threads == 1) run(0);  // a parallel region of one thread takes as long as a token
    else
#pragma omp parallel for schedule(static) num_threads(int(threads))
        for (int64_t part = 0; part < threads; ++part) run(part);
    return nullptr;
}
