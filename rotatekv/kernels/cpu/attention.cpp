// Decode attention over a packed cache: for each sequence and rotation group of heads, the tokens are cut into parts
// that threads take one by one (split-K); each leaves an unfinished softmax, and the last step joins them.

#include <algorithm>
#include <new>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "checks.h"
#include "exact.h"

// RoPE at the query's own position, in place; attention_scaling twice, once for the keys.
static void turn_query(const DecodeArguments& a, int64_t position, float* query) {
    const float factor = a.attention_scaling * a.attention_scaling;
    const int64_t half = a.rotary_dim / 2;
    for (int64_t i = 0; i < half; ++i) {
        float cos, sin;
        angle_at(a, position, i, &cos, &sin);
        const float low = query[i] * factor, high = query[i + half] * factor;
        query[i] = low * cos - high * sin;
        query[i + half] = high * cos + low * sin;
    }
}

// (B, H, query_tokens, D) after RoPE, times all constant factors of a score: the softmax scale in log2 units and
// 1/sqrt(W) of the Hadamard matrix.
static void prepare_queries(const DecodeArguments& a, float* out) {
    const int64_t rows = a.query_heads * a.query_tokens;
    const float log2_e = 1.44269504088896341f;
    const float norm = a.rotation_width ? 1.0f / std::sqrt(float(a.rotation_width)) : 1.0f;
    for (int64_t row = 0; row < a.batch * rows; ++row) {
        float* query = out + row * a.head_dim;
        for (int64_t i = 0; i < a.head_dim; ++i)
            query[i] = a.queries[row * a.head_dim + i] * (a.softmax_scale * log2_e * norm);
        const int64_t column = a.total_tokens - a.query_tokens + row % a.query_tokens;
        turn_query(a, std::max<int64_t>(column - a.first[row / rows], 0), query);
    }
}

// Multiplies kLanes rows of (rows, D) by the inverse Hadamard of order D, in place.
static void unrotate_rows(float* rows, int64_t count, int64_t dim, const HadamardPlan& plan, float* room) {
    for (int64_t row = 0; row < kLanes; ++row)
        for (int64_t i = 0; i < dim; ++i) room[i * kLanes + row] = row < count ? rows[row * dim + i] : 0.0f;
    inverse_hadamard(plan, int(dim), room, [&](int channel) { return load(room + channel * kLanes); });
    const float norm = 1.0f / std::sqrt(float(dim));
    for (int64_t row = 0; row < count; ++row)
        for (int64_t i = 0; i < dim; ++i) rows[row * dim + i] = room[i * kLanes + row] * norm;
}

// Joins a row's parts, `step` floats apart; a row that sees no token at all gives zeros.
static void join_row(const float* partials, int64_t parts, int64_t step, int64_t dim, float* out) {
    float top = kNever, total = 0.0f;
    for (int64_t i = 0; i < parts; ++i) top = std::fmax(top, partials[i * step]);
    std::fill(out, out + dim, 0.0f);
    if (top == kNever) return;
    for (int64_t i = 0; i < parts; ++i) {
        const float* part = partials + i * step;
        const float weight = std::exp2(part[0] - top);
        total += part[1] * weight;
        for (int64_t k = 0; k < dim; ++k) out[k] += part[2 + k] * weight;
    }
    for (int64_t k = 0; k < dim; ++k) out[k] /= total;
}

class Decode {
  public:
    explicit Decode(const DecodeArguments& a)
        : a_(a), g_(a), queries_(a.batch * a.query_heads * a.query_tokens * a.head_dim),
          partials_(a.batch * g_.groups * g_.parts() * part_floats()), key_offset_(a.key_factor ? size_t(g_.channels) : 0),
          group_at_(a.group_of_channel ? size_t(g_.channels) : 0) {
        prepare_queries(a, queries_.data());
        const float norm = a.rotation_width ? std::sqrt(float(a.rotation_width)) : 1.0f;
        for (size_t i = 0; i < key_offset_.size(); ++i) key_offset_.data()[i] = a.key_offset[i] * norm;
        for (size_t i = 0; i < group_at_.size(); ++i) group_at_[i] = a.group_of_channel[i] * 2 * kLanes;
        for (int64_t i = 0; i < threads(); ++i) memory_.emplace_back(a, g_);
    }

    void run() {
        const int64_t tasks = this->tasks();
#pragma omp parallel num_threads(int(threads()))
        {
            ThreadMemory& memory = memory_[thread_number()];
#pragma omp for schedule(dynamic, 1)
            for (int64_t task = 0; task < tasks; ++task) run_task(task, memory);
        }
        join();
    }

  private:
    int64_t part_floats() const { return g_.group_rows * g_.row_floats(a_); }
    int64_t tasks() const { return a_.batch * g_.groups * g_.parts(); }
    int64_t threads() const { return std::max<int64_t>(1, std::min(a_.threads, tasks())); }
    static int thread_number() {
#ifdef _OPENMP
        return omp_get_thread_num();
#else
        return 0;
#endif
    }

    void run_task(int64_t task, ThreadMemory& memory) {
        // The exact tokens come first: the longest parts should not be the last.
        const int64_t pair = task % (a_.batch * g_.groups), split = g_.parts() - 1 - task / (a_.batch * g_.groups);
        const int64_t row = pair / g_.groups, group = pair % g_.groups;
        const int32_t *begin = a_.exact_rows, *end = begin + a_.exact_tokens;
        const Part part{a_, g_, memory,
                        queries_.data() + pair * g_.group_rows * a_.head_dim,
                        ChannelAffine{a_.key_factor, key_offset_.data()}.from(group * g_.group_channels),
                        group_at_.data(),
                        partials_.data() + (pair * g_.parts() + split) * part_floats(), row, group,
                        g_.exact ? std::lower_bound(begin, end, int32_t(row)) - begin : 0,
                        g_.exact ? std::upper_bound(begin, end, int32_t(row)) - begin : 0};
        for (int64_t i = 0; i < g_.group_rows; ++i) {
            part.partial(i).top() = kNever;
            part.partial(i).total() = 0.0f;
            std::fill(part.partial(i).sums(), part.partial(i).sums() + a_.head_dim, 0.0f);
        }
        if (split == g_.splits) return attend_exact(part);
        const int64_t from = g_.chunks * split / g_.splits, to = g_.chunks * (split + 1) / g_.splits;
        for (int64_t chunk = from; chunk < to; ++chunk) attend_packed_chunk(part, chunk);
    }

    void join() {
        const int64_t dim = a_.head_dim, rows = a_.batch * g_.groups * g_.group_rows;
        for (int64_t row = 0; row < rows; ++row) {
            const int64_t pair = row / g_.group_rows, inner = row % g_.group_rows;
            const float* partials = partials_.data() + pair * g_.parts() * part_floats() + inner * g_.row_floats(a_);
            join_row(partials, g_.parts(), part_floats(), dim, a_.output + row * dim);
        }
        if (!a_.unrotate_values) return;
        HadamardPlan plan;
        plan_hadamard(dim, a_.value_base, &plan);
        Floats room(dim * kLanes);
        for (int64_t row = 0; row < rows; row += kLanes)
            unrotate_rows(a_.output + row * dim, std::min<int64_t>(kLanes, rows - row), dim, plan, room.data());
    }

    const DecodeArguments& a_;
    const Geometry g_;
    Floats queries_, partials_;
    std::vector<float> key_offset_;
    std::vector<int32_t> group_at_;
    std::vector<ThreadMemory> memory_;
};

// Null, or one line that says what is wrong with the arguments.
extern "C" __attribute__((visibility("default"))) const char* rotatekv_attention(const DecodeArguments* a) {
    if (!a) return "no arguments";
    if (const char* wrong = check_decode(*a)) return wrong;
    try {
        Decode(*a).run();
    } catch (const std::bad_alloc&) {
        return "out of memory";
    }
    return nullptr;
}
