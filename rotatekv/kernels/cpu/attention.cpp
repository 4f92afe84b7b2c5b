// Decode attention over a packed cache: for each sequence and rotation group of heads, the tokens are cut into parts
// that threads take one by one (split-K); each leaves an unfinished softmax, and the last step joins them.

#include <algorithm>
#include <new>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "checks.h"
#include "exact.h"
#include "hadamard_rows.h"

// (B, H, query_tokens, D) times all constant factors of a packed token's score: the softmax scale in log2 units, 1/sqrt(W)
// of the Hadamard matrix, and the factor on the keys' cos and sin.
static void prepare_queries(const DecodeArguments& a, float* out) {
    const float norm = a.rotation_width ? 1.0f / std::sqrt(float(a.rotation_width)) : 1.0f;
    const float factor = a.softmax_scale * kLog2E * norm;
    for (int64_t row = 0; row < a.batch * a.query_heads * a.query_tokens; ++row) {
        const float* query = a.queries + row * a.head_dim;
        for (int64_t i = 0; i < a.head_dim; ++i)
            out[row * a.head_dim + i] = query[i] * (i < a.rotary_dim ? factor * a.attention_scaling : factor);
    }
}

// Makes of each part's largest score, `step` floats apart, the part's factor in the row's whole softmax: 0 if the row
// sees no token at all.
static void weigh_parts(float* partials, int64_t parts, int64_t step) {
    float top = kNever, total = 0.0f;
    for (int64_t i = 0; i < parts; ++i) top = std::fmax(top, partials[i * step]);
    for (int64_t i = 0; i < parts; ++i) {
        float* part = partials + i * step;
        part[0] = top == kNever ? 0.0f : std::exp2(part[0] - top);
        total += part[1] * part[0];
    }
    for (int64_t i = 0; i < parts && total > 0.0f; ++i) partials[i * step] /= total;
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
        const int32_t *begin = a_.exact_batch_index, *end = begin + a_.exact_tokens;
        const bool exact = split == g_.splits;
        const Part part{a_, g_, memory,
                        (exact ? a_.queries : queries_.data()) + pair * g_.group_rows * a_.head_dim,
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
        if (exact) return attend_exact(part);
        const int64_t from = g_.chunks * split / g_.splits, to = g_.chunks * (split + 1) / g_.splits;
        for (int64_t chunk = from; chunk < to; ++chunk) attend_packed_chunk(part, chunk);
    }

    // The packed tokens' sums are in the values' rotated space, those of the exact tokens are not.
    void join() {
        const int64_t dim = a_.head_dim;
        std::fill(a_.output, a_.output + rows() * dim, 0.0f);
        for (int64_t row = 0; row < rows(); ++row) weigh_parts(partials_of(row), g_.parts(), part_floats());
        add_parts(0, g_.splits);
        if (a_.unrotate_values) RowRotation(dim, a_.value_base).apply<false>(a_.output, rows());
        add_parts(g_.splits, g_.parts());
    }

    int64_t rows() const { return a_.batch * g_.groups * g_.group_rows; }
    float* partials_of(int64_t row) const {
        const int64_t pair = row / g_.group_rows, inner = row % g_.group_rows;
        return partials_.data() + pair * g_.parts() * part_floats() + inner * g_.row_floats(a_);
    }

    // Adds the parts from … to − 1 of all rows to the output.
    void add_parts(int64_t from, int64_t to) {
        for (int64_t row = 0; row < rows(); ++row) {
            float* out = a_.output + row * a_.head_dim;
            for (int64_t i = from; i < to; ++i) {
                const float* part = partials_of(row) + i * part_floats();
                for (int64_t k = 0; k < a_.head_dim; ++k) out[k] += part[2 + k] * part[0];
            }
        }
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
