// Planes of transform-coded keys or values → components, as rotatekv/kernels/transform_coding.py reads them.

#include <algorithm>

#include "checks.h"
#include "coded_layout.h"

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

// One block of a head of a sequence, its tokens before `tokens`.
static void read_block(const ComponentArguments& a, const std::vector<CodedGroup>& groups, int64_t row, int64_t head,
                       int64_t block) {
    const ComponentCodes reader{a.coded, a.words_of_tokens != 0};
    const int64_t at = row * a.coded.blocks + block;
    const uint8_t* scale = a.coded.scale + (at * a.kv_heads + head) * kBlock;
    const int count = int(std::min<int64_t>(kBlock, a.tokens - block * kBlock));
    float* out = a.output + ((row * a.kv_heads + head) * a.output_tokens + block * kBlock) * a.head_dim;
    std::fill(out, out + count * a.head_dim, 0.0f);
    for (const CodedGroup& group : groups)
        for (int first = 0; first < kGroup; first += kLanes)
            for (int lane = 0; lane < count; ++lane) {
                const Vec codes = to_float((IntVec)reader.codes(group, at, lane, first));
                store(out + lane * a.head_dim + group.index * kGroup + first,
                      (codes + group.middle) * frame_scale(scale[lane]));
            }
}

static const char* check_components(const ComponentArguments& a) {
    ROTATEKV_REQUIRE(a.structure_bytes == int64_t(sizeof(ComponentArguments)), "built from other sources: rebuild");
    ROTATEKV_REQUIRE(a.batch >= 0 && a.kv_heads >= 1, "sizes must be positive");
    ROTATEKV_REQUIRE(a.head_dim >= 16 && a.head_dim <= 1024 && a.head_dim % 16 == 0,
                     "head_dim must be a multiple of 16 up to 1024");
    ROTATEKV_REQUIRE(a.tokens >= 0 && a.tokens <= a.output_tokens, "tokens must be 0 … those of the output");
    ROTATEKV_REQUIRE(a.threads >= 1 && a.threads <= 1024, "threads must be 1 … 1024");
    if (a.batch == 0 || a.tokens == 0) return nullptr;
    ROTATEKV_REQUIRE(a.output && a.coded.scale, "a tensor is missing");
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
#pragma omp parallel for schedule(static) num_threads(int(a.threads)) if (a.threads > 1)
    for (int64_t task = 0; task < heads * blocks; ++task) {
        const int64_t head = task / blocks;
        read_block(a, groups[head % a.kv_heads], head / a.kv_heads, head % a.kv_heads, task % blocks);
    }
    return nullptr;
}
