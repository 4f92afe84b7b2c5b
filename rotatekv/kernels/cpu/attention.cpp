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
        if (!a.coded_keys.scale) continue;
        const int64_t head = row / a.query_tokens % a.query_heads / (a.query_heads / a.kv_heads);
        for (int64_t i = 0; i < a.head_dim; ++i)
            out[row * a.head_dim + i] *= a.frames.channel_factor[head * a.head_dim + i];
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

constexpr int kMappedRows = 4;  // of a head, mapped side by side

class Decode {
  public:
    explicit Decode(const DecodeArguments& a)
        : a_(a), g_(a), queries_(a.batch * a.query_heads * a.query_tokens * a.head_dim),
          partials_(a.batch * g_.groups * g_.parts() * part_floats()),
          group_at_(a.group_of_channel ? size_t(g_.channels) : 0) {
        prepare_queries(a, queries_.data());
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
        const int64_t from = exact ? 0 : g_.chunks * split / g_.splits;
        const int64_t to = exact ? 0 : g_.chunks * (split + 1) / g_.splits;
        const Part part{a_, g_, memory,
                        (exact ? a_.queries : queries_.data()) + pair * g_.group_rows * a_.head_dim,
                        group_at_.data(),
                        partials_.data() + (pair * g_.parts() + split) * part_floats(), row, group,
                        g_.exact ? std::lower_bound(begin, end, int32_t(row)) - begin : 0,
                        g_.exact ? std::upper_bound(begin, end, int32_t(row)) - begin : 0,
                        std::min(g_.begin + to * kChunk, a_.packed_tokens)};
        for (int64_t i = 0; i < g_.group_rows; ++i) {
            part.partial(i).top() = kNever;
            part.partial(i).total() = 0.0f;
            std::fill(part.partial(i).sums(), part.partial(i).sums() + a_.head_dim, 0.0f);
        }
        if (exact) return attend_exact(part);
        memory.frames.begin(row);
        for (int64_t chunk = from; chunk < to; ++chunk) attend_packed_chunk(part, chunk);
    }

    // The packed tokens' sums are in the space that values are stored in, those of the exact tokens are not.
    void join() {
        const int64_t dim = a_.head_dim;
        std::fill(a_.output, a_.output + rows() * dim, 0.0f);
        for (int64_t row = 0; row < rows(); ++row) weigh_parts(partials_of(row), g_.parts(), part_floats());
        add_parts(0, g_.splits);
        if (a_.coded_values.scale) map_values();
        if (a_.unrotate_values) RowRotation(dim, a_.value_base).apply<false>(a_.output, rows());
        add_parts(g_.splits, g_.parts());
    }

    // Components become channels of the output's heads, and the mean is added as often as the packed tokens have weight.
    void map_values() {
        const int64_t heads = a_.batch * a_.kv_heads, rows = g_.head_rows, dim = a_.head_dim;
        const bool parallel = threads() > 1 && heads * rows * dim * dim > (1 << 18);
#pragma omp parallel for schedule(static) num_threads(int(threads())) if (parallel)
        for (int64_t head = 0; head < heads; ++head) {
            Floats mapped(kMappedRows * dim);
            for (int64_t row = 0; row < rows; row += kMappedRows)
                map_rows(head, head * rows + row, std::min<int64_t>(rows - row, kMappedRows), mapped.data());
        }
    }

    // At most kMappedRows query rows of a head of a sequence.
    void map_rows(int64_t head, int64_t row, int64_t rows, float* mapped) {
        const int64_t dim = a_.head_dim, kv_head = head % a_.kv_heads;
        const float *map = a_.value_map + kv_head * dim * dim, *mean = a_.value_mean + kv_head * dim;
        float* out = a_.output + row * dim;
        float weights[kMappedRows] = {};
        for (int64_t k = 0; k < rows; ++k)
            for (int64_t i = 0; i < g_.splits; ++i) {
                const float* part = partials_of(row + k) + i * part_floats();
                weights[k] += part[0] * part[1];
            }
        for (int64_t at = 0; at < dim; at += kLanes) {
            Vec sums[kMappedRows];
            for (int k = 0; k < kMappedRows; ++k) sums[k] = load(mean + at) * weights[k];
            for (int64_t i = 0; i < dim; ++i) {
                const Vec column = load(map + i * dim + at);
#pragma GCC unroll 4
                for (int k = 0; k < kMappedRows; ++k) sums[k] += column * out[(k < rows ? k : 0) * dim + i];
            }
            for (int64_t k = 0; k < rows; ++k) store(mapped + k * dim + at, sums[k]);
        }
        std::copy(mapped, mapped + rows * dim, out);
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
