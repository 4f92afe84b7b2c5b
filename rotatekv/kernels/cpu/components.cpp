// Planes of transform-coded keys or values → components, as rotatekv/kernels/transform_coding.py reads them, or → heads
// as attention sees them: mapped back, the mean added, keys turned from their frames to their positions.

#include <algorithm>

#include "checks.h"
#include "coded_layout.h"
#include "floats.h"
#include "multiply.h"

// Codes of kLanes components of a group, from `first` on, of one token.
struct ComponentCodes {
    const CodedPointers& coded;
    bool words_of_tokens;

    // A plane's numbers of `width` bits: a token's word, or the token's place in each component's.
    template <class Word>
    ROTATEKV_INLINE WordVec read(const Word* plane, int lane, int first, const WordVec& shifts, int shift) const {
        if (words_of_tokens) return broadcast_word(uint32_t(plane[lane])) >> shifts;
        if constexpr (sizeof(Word) == 4) return load_words(plane + first) >> shift;
        else return load_short_words(plane + first) >> shift;
    }

    ROTATEKV_INLINE WordVec codes(const CodedGroup& group, int64_t block, int lane, int first) const {
        const WordVec component = lane_numbers() + uint32_t(first);
        const int32_t* pairs = coded.pairs + (block * coded.pair_planes + group.pair) * kBlock;
        WordVec codes = {};
        for (int plane = 0; plane < group.bits / 2; ++plane)
            codes |= (read(pairs + plane * kBlock, lane, first, component * 2, 2 * lane) & 3u) << (2 * plane);
        if (group.bits % 2) {
            const int16_t* single = coded.singles + (block * coded.single_planes + group.single) * kBlock;
            WordVec shifts;
            for (int i = 0; i < kLanes; ++i) shifts[i] = uint32_t(kSingleShift[first + i]);
            codes |= (read(single, lane, first, shifts, kSingleShift[lane]) & 1u) << (group.bits - 1);
        }
        return codes;
    }
};

// Components (tokens, D) of one block of a head of a sequence, its tokens before `tokens`. Returns how many tokens.
static int64_t read_block(const ComponentArguments& a, const std::vector<CodedGroup>& groups, int64_t row, int64_t head,
                          int64_t block, float* out) {
    const ComponentCodes reader{a.coded, a.words_of_tokens != 0};
    const int64_t at = row * a.coded.blocks + block;
    const uint8_t* scale = a.coded.scale + (at * a.kv_heads + head) * kBlock;
    const int count = int(std::min<int64_t>(kBlock, a.tokens - block * kBlock));
    std::fill(out, out + count * a.head_dim, 0.0f);
    for (const CodedGroup& group : groups)
        for (int first = 0; first < kGroup; first += kLanes)
            for (int lane = 0; lane < count; ++lane) {
                const Vec codes = to_float((IntVec)reader.codes(group, at, lane, first));
                store(out + lane * a.head_dim + group.index * kGroup + first,
                      (codes + group.middle) * frame_scale(scale[lane]));
            }
    return count;
}

// One token's head, mapped back → as attention sees it.
static void leave(const ComponentArguments& a, int64_t row, int64_t head, int64_t token, float* x) {
    const int64_t half = a.rotary_dim / 2, at = row * a.turn_batch_stride + token * a.turn_token_stride;
    const float* mean = a.mean + head * a.head_dim;
    const float *cos = a.origin_cos + at, *sin = a.origin_sin + at, *place_cos = a.place_cos + at;
    const float* place_sin = a.place_sin + at;
#pragma GCC ivdep
    for (int64_t i = 0; i < half; ++i) {
        const float low = x[i] + (mean[i] * place_cos[i] - mean[i + half] * place_sin[i]);
        const float high = x[i + half] + (mean[i + half] * place_cos[i] + mean[i] * place_sin[i]);
        x[i] = low * cos[i] - high * sin[i];
        x[i + half] = high * cos[i] + low * sin[i];
    }
    for (int64_t i = 2 * half; i < a.head_dim; ++i) x[i] += mean[i];
}

// The heads of one block; `components` (16, D) is the thread's memory.
static void read_heads(const ComponentArguments& a, const std::vector<CodedGroup>& groups, int64_t row, int64_t head,
                       int64_t block, float* components, float* out) {
    const int64_t dim = a.head_dim, count = read_block(a, groups, row, head, block, components);
    const int64_t stored = groups.empty() ? 0 : (groups.back().index + 1) * kGroup;  // no later ones are coded
    multiply(components, count, dim, 1, a.map + head * dim * dim, stored, dim, out);
    for (int64_t i = 0; i < count; ++i) leave(a, row, head, block * kBlock + i, out + i * dim);
}

static const char* check_components(const ComponentArguments& a) {
    ROTATEKV_REQUIRE(a.structure_bytes == int64_t(sizeof(ComponentArguments)), "built from other sources: rebuild");
    ROTATEKV_REQUIRE(a.batch >= 0 && a.kv_heads >= 1, "sizes must be positive");
    ROTATEKV_REQUIRE(a.head_dim >= 16 && a.head_dim <= 1024 && a.head_dim % 16 == 0,
                     "head_dim must be a multiple of 16 up to 1024");
    ROTATEKV_REQUIRE(a.tokens >= 0 && a.tokens <= a.output_tokens, "tokens must be 0 … those of the output");
    ROTATEKV_REQUIRE(a.threads >= 1 && a.threads <= 1024, "threads must be 1 … 1024");
    if (a.batch == 0 || a.tokens == 0) return nullptr;
    ROTATEKV_REQUIRE(a.output && a.coded.scale && (!a.map || a.mean), "a tensor is missing");
    ROTATEKV_REQUIRE(a.rotary_dim >= 0 && a.rotary_dim <= a.head_dim && a.rotary_dim % 2 == 0,
                     "rotary_dim must be even and at most head_dim");
    ROTATEKV_REQUIRE(!a.rotary_dim || (a.map && a.origin_cos && a.origin_sin && a.place_cos && a.place_sin),
                     "a table of cos or sin is missing");
    return check_coded(a.coded, a.kv_heads * a.head_dim / kGroup, a.tokens);
}

// Null, or one line that says what is wrong with the arguments.
extern "C" __attribute__((visibility("default"))) const char* rotatekv_components(const ComponentArguments* arguments) {
    if (!arguments) return "no arguments";
    const ComponentArguments& a = *arguments;
    if (const char* wrong = check_components(a)) return wrong;
    if (a.batch == 0 || a.tokens == 0) return nullptr;
    const auto groups = coded_groups(a.coded, a.kv_heads, a.head_dim / kGroup);
    const int64_t blocks = (a.tokens + kBlock - 1) / kBlock, heads = a.batch * a.kv_heads;
    const int64_t threads = std::max<int64_t>(1, std::min(a.threads, heads * blocks));
#pragma omp parallel for schedule(static) num_threads(int(threads)) if (threads > 1)
    for (int64_t part = 0; part < threads; ++part) {
        Floats components(kBlock * a.head_dim);
        for (int64_t task = heads * blocks * part / threads; task < heads * blocks * (part + 1) / threads; ++task) {
            const int64_t at = task / blocks, block = task % blocks, row = at / a.kv_heads, head = at % a.kv_heads;
            float* out = a.output + (at * a.output_tokens + block * kBlock) * a.head_dim;
            if (a.map) read_heads(a, groups[head], row, head, block, components.data(), out);
            else read_block(a, groups[head], row, head, block, out);
        }
    }
    return nullptr;
}
