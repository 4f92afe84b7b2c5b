// Heads → planes of transform-coded keys or values: centred, mapped, the scale searched, rounded and packed as
// rotatekv/kernels/transform_coding.py does it, but for ties: a map's sums are in another order.

#include <algorithm>
#include <cmath>
#include <vector>

#include "channels.h"
#include "checks.h"
#include "coded_layout.h"
#include "multiply.h"

constexpr int kTried[] = {-4, -2, 0, 2, 4, 6, 8, 10};  // stored scales, from the root mean square's
constexpr int kTriedAbout[] = {-1, 1};                 // then from the best of these
constexpr float kLeastSquare = 9.094947e-13f;  // 2^-40

// How one head's components are rounded; (D,) each.
struct Rounding {
    Floats levels, most;  // 2^(bits − 1), the highest code; 0 for 0 bits
    int64_t stored = 0;   // components

    Rounding(const int32_t* bits, int64_t dim) : levels(dim), most(dim) {
        for (int64_t i = 0; i < dim; ++i) {
            const int width = bits[i / kGroup];
            levels.data()[i] = width ? float(1 << width) / 2 : 0.0f;
            most.data()[i] = float((1 << width) - 1);
            stored += width > 0;
        }
    }
    // The codes of x in units of a scale, not yet integers' type.
    ROTATEKV_INLINE Vec codes(Vec x, int64_t at) const {
        const Vec least = {};
        return floor_small(max(min(x + load(levels.data() + at), load(most.data() + at)), least));
    }
};

// The memory of one thread: a block's tokens of a head, and their codes.
struct Tokens {
    Floats heads, components;    // (kBlock, D)
    std::vector<uint8_t> codes;  // (kBlock, D)
    explicit Tokens(int64_t dim) : heads(kBlock * dim), components(kBlock * dim), codes(size_t(kBlock * dim)) {}
};

class FrameWriter {
  public:
    explicit FrameWriter(const FrameWriteArguments& a)
        : a_(a), dim_(a.head_dim), coded_(coded_groups(a.coded, a.kv_heads, a.head_dim / kGroup)) {
        for (int64_t head = 0; head < a.kv_heads; ++head)
            rounding_.emplace_back(a.coded.bits + head * dim_ / kGroup, dim_);
    }

    // Tokens from … to − 1 of one sequence and head, which lie in one block.
    void write(int64_t row, int64_t head, int64_t from, int64_t to, Tokens* tokens) const {
        const int64_t block = row * a_.coded.blocks + (a_.start + from) / kBlock, first = (a_.start + from) % kBlock;
        write_codes(row, head, from, to, block, tokens);
        if (a_.words_of_tokens) {
            for (int64_t lane = first; lane < first + to - from; ++lane) pack_token(head, block, lane, *tokens);
        } else {
            pack_components(head, block, first, first + to - from, *tokens);
        }
    }

  private:
    // Stored scales, and the codes at the tokens' lanes of the block.
    void write_codes(int64_t row, int64_t head, int64_t from, int64_t to, int64_t block, Tokens* tokens) const {
        for (int64_t token = from; token < to; ++token)
            enter(row, head, token, tokens->heads.data() + (token - from) * dim_);
        const float* map = a_.map + head * dim_ * dim_;
        multiply(tokens->heads.data(), to - from, dim_, 1, map, dim_, dim_, tokens->components.data());
        for (int64_t token = from; token < to; ++token) {
            const float* x = tokens->components.data() + (token - from) * dim_;
            const int64_t lane = (a_.start + token) % kBlock;
            const int stored = best_scale(head, x);
            round(head, x, stored, tokens->codes.data() + lane * dim_);
            const_cast<uint8_t*>(a_.coded.scale)[(block * a_.kv_heads + head) * kBlock + lane] = uint8_t(stored);
        }
    }

    // A key as it is in its frame, less the mean there; or a value less the mean.
    void enter(int64_t row, int64_t head, int64_t token, float* x) const {
        const int64_t from = row * a_.batch_stride + head * a_.head_stride + token * a_.token_stride;
        read_numbers(a_.heads, a_.number, from, dim_, x);
        if (!a_.mean) return;
        const int64_t half = a_.rotary_dim / 2, at = row * a_.turn_batch_stride + token * a_.turn_token_stride;
        const float* mean = a_.mean + head * dim_;
        const float *cos = a_.origin_cos + at, *sin = a_.origin_sin + at;
        const float *place_cos = a_.place_cos + at, *place_sin = a_.place_sin + at;
#pragma GCC ivdep
        for (int64_t i = 0; i < half; ++i) {
            const float low = x[i], high = x[i + half];
            x[i] = low * cos[i] + high * sin[i] - (mean[i] * place_cos[i] - mean[i + half] * place_sin[i]);
            x[i + half] = high * cos[i] - low * sin[i] - (mean[i + half] * place_cos[i] + mean[i] * place_sin[i]);
        }
        for (int64_t i = 2 * half; i < dim_; ++i) x[i] -= mean[i];
    }

    // The stored scale of those tried whose weighted error is least; of equal ones the first.
    int best_scale(int64_t head, const float* x) const {
        const Rounding& rounding = rounding_[head];
        const float *weights = a_.weights + head * dim_, *steps = a_.steps + head * dim_;
        Vec squares = {};
        for (int64_t i = 0; i < dim_; i += kLanes) {
            const Vec number = load(x + i) * load(steps + i);
            squares += number * number;
        }
        const float mean = sum_lanes(squares) / float(std::max<int64_t>(rounding.stored, 1));
        const float steps_of_two = std::log2(std::max(mean, kLeastSquare)) * (kScaleSteps / 2);
        int best = int(std::nearbyint(steps_of_two)) + kScaleZero;
        float least = INFINITY;
        try_scales(head, x, kTried, &best, &least);
        try_scales(head, x, kTriedAbout, &best, &least);
        return best;
    }

    // The best of the stored scale so far and those that differ from it by the offsets; all of them side by side.
    template <size_t Count>
    void try_scales(int64_t head, const float* x, const int (&offsets)[Count], int* best, float* least) const {
        const Rounding& rounding = rounding_[head];
        int candidates[Count];
        float scales[Count], inverses[Count];
        for (size_t i = 0; i < Count; ++i) {
            candidates[i] = std::min(std::max(*best + offsets[i], 0), 255);
            scales[i] = frame_scale(candidates[i]);
            inverses[i] = frame_scale(2 * kScaleZero - candidates[i]);
        }
        Vec errors[Count] = {};
        for (int64_t at = 0; at < dim_; at += kLanes) {
            const Vec number = load(x + at), middles = 0.5f - load(rounding.levels.data() + at);
            const Vec weight = load(a_.weights + head * dim_ + at);
#pragma GCC unroll 8
            for (size_t i = 0; i < Count; ++i) {
                const Vec off = (rounding.codes(number * inverses[i], at) + middles) * scales[i] - number;
                errors[i] += off * off * weight;
            }
        }
        for (size_t i = 0; i < Count; ++i) {
            const float sum = sum_lanes(errors[i]);
            if (sum < *least) {
                *least = sum;
                *best = candidates[i];
            }
        }
    }

    void round(int64_t head, const float* x, int stored, uint8_t* codes) const {
        const float inverse = frame_scale(2 * kScaleZero - stored);
        for (int64_t i = 0; i < dim_; i += kLanes)
            store_low_bytes(codes + i, to_nearest(rounding_[head].codes(load(x + i) * inverse, i)));
    }

    // A token of keys has words of its own, one a plane.
    void pack_token(int64_t head, int64_t block, int64_t lane, const Tokens& tokens) const {
        const CodedPointers& coded = a_.coded;
        for (const CodedGroup& group : coded_[head]) {
            const uint8_t* codes = tokens.codes.data() + lane * dim_ + group.index * kGroup;
            for (int plane = 0; plane < group.bits / 2; ++plane) {
                uint32_t word = 0;
                for (int i = 0; i < kGroup; i += kLanes)
                    word |= join_lanes((load_byte_words(codes + i) >> (2 * plane) & 3u) << (lane_numbers() * 2)) << (2 * i);
                const int64_t at = (block * coded.pair_planes + group.pair + plane) * kBlock + lane;
                const_cast<int32_t*>(coded.pairs)[at] = int32_t(word);
            }
            if (group.bits % 2 == 0) continue;
            uint32_t word = 0;
            for (int i = 0; i < kGroup; ++i) word |= (codes[i] >> (group.bits - 1) & 1u) << kSingleShift[i];
            const int64_t at = (block * coded.single_planes + group.single) * kBlock + lane;
            const_cast<int16_t*>(coded.singles)[at] = int16_t(word);
        }
    }

    // A component of values has words of its own, which the block's tokens from … to − 1 share with the others.
    void pack_components(int64_t head, int64_t block, int64_t from, int64_t to, const Tokens& tokens) const {
        const CodedPointers& coded = a_.coded;
        for (const CodedGroup& group : coded_[head]) {
            const uint8_t* codes = tokens.codes.data() + group.index * kGroup;
            for (int plane = 0; plane < group.bits / 2; ++plane) {
                const int64_t at = (block * coded.pair_planes + group.pair + plane) * kBlock;
                put(codes, from, to, 2 * plane, 3, [](int64_t lane) { return int(2 * lane); },
                    const_cast<int32_t*>(coded.pairs) + at);
            }
            const int64_t at = (block * coded.single_planes + group.single) * kBlock;
            if (group.bits % 2)
                put(codes, from, to, group.bits - 1, 1, [](int64_t lane) { return kSingleShift[lane]; },
                    const_cast<int16_t*>(coded.singles) + at);
        }
    }

    // Puts the bits `mask` of the codes, above `low` others, where `shift` says into the words of a group's components.
    template <class Shift, class Word>
    void put(const uint8_t* codes, int64_t from, int64_t to, int low, uint32_t mask, const Shift& shift,
             Word* words) const {
        uint32_t kept = ~0u;
        for (int64_t lane = from; lane < to; ++lane) kept &= ~(mask << shift(lane));
        for (int first = 0; first < kGroup; first += kLanes) {
            WordVec fresh = {};
            for (int64_t lane = from; lane < to; ++lane)
                fresh |= (load_byte_words(codes + lane * dim_ + first) >> low & mask) << shift(lane);
            for (int i = 0; i < kLanes; ++i) words[first + i] = Word((uint32_t(words[first + i]) & kept) | fresh[i]);
        }
    }

    const FrameWriteArguments& a_;
    const int64_t dim_;
    const std::vector<std::vector<CodedGroup>> coded_;
    std::vector<Rounding> rounding_;  // of each head
};

static const char* check_write(const FrameWriteArguments& a) {
    ROTATEKV_REQUIRE(a.structure_bytes == int64_t(sizeof(FrameWriteArguments)), "built from other sources: rebuild");
    ROTATEKV_REQUIRE(a.batch >= 0 && a.tokens >= 0 && a.kv_heads >= 1, "sizes must be positive");
    ROTATEKV_REQUIRE(a.head_dim >= 16 && a.head_dim <= 1024 && a.head_dim % 16 == 0,
                     "head_dim must be a multiple of 16 up to 1024");
    ROTATEKV_REQUIRE(a.start >= 0 && a.start + a.tokens <= a.coded.blocks * kBlock, "the tokens do not fit in the blocks");
    ROTATEKV_REQUIRE(a.threads >= 1 && a.threads <= 1024, "threads must be 1 … 1024");
    ROTATEKV_REQUIRE(a.number >= 0 && a.number <= 2, "heads must be float32, float16 or bfloat16");
    ROTATEKV_REQUIRE(a.rotary_dim >= 0 && a.rotary_dim <= a.head_dim && a.rotary_dim % 2 == 0,
                     "rotary_dim must be even and at most head_dim");
    if (a.batch == 0 || a.tokens == 0) return nullptr;
    ROTATEKV_REQUIRE(a.heads && a.map && a.weights && a.steps && a.coded.scale, "a tensor is missing");
    ROTATEKV_REQUIRE(!a.rotary_dim || (a.mean && a.origin_cos && a.origin_sin && a.place_cos && a.place_sin),
                     "a table of cos or sin is missing");
    return check_coded(a.coded, a.kv_heads * a.head_dim / kGroup, 0);
}

// Null, or one line that says what is wrong with the arguments.
extern "C" __attribute__((visibility("default"))) const char* rotatekv_frames(const FrameWriteArguments* arguments) {
    if (!arguments) return "no arguments";
    const FrameWriteArguments& a = *arguments;
    if (const char* wrong = check_write(a)) return wrong;
    const FrameWriter writer(a);
    // Threads take whole blocks of a head, so none shares a word.
    const int64_t first = a.start / kBlock, blocks = (a.start + a.tokens + kBlock - 1) / kBlock - first;
    const int64_t tasks = a.batch * a.kv_heads * blocks;
    const int64_t threads = std::max<int64_t>(1, std::min(a.threads, tasks));
    const auto run = [&](int64_t part) {
        Tokens tokens(a.head_dim);
        for (int64_t task = tasks * part / threads; task < tasks * (part + 1) / threads; ++task) {
            const int64_t pair = task / blocks, block = first + task % blocks;  // a head's map stays in the cache
            const int64_t from = std::max(block * kBlock - a.start, int64_t(0));
            const int64_t to = std::min((block + 1) * kBlock - a.start, a.tokens);
            writer.write(pair / a.kv_heads, pair % a.kv_heads, from, to, &tokens);
        }
    };
    if (threads == 1) run(0);  // a parallel region of one thread takes as long as a token
    else
#pragma omp parallel for schedule(static) num_threads(int(threads))
        for (int64_t part = 0; part < threads; ++part) run(part);
    return nullptr;
}
