// Attention of blocks of queries to a few tokens each, joined with attention to the tokens before them, as
// rotatekv/kernels/attention_parts.py does it.

#include <algorithm>
#include <cmath>
#include <vector>

#include "channels.h"
#include "checks.h"
#include "multiply.h"
#include "transpose.h"

constexpr float kLog2E = 1.44269504f;

// The memory of one thread: a block of queries, with all query heads of a key/value head. A query has a lane of its own.
struct Band {
    Floats rows, tile;        // (kLanes, D) queries or outputs, and (kLanes, kLanes) of them
    Floats keys, values;      // (W, D)
    Floats queries, outputs;  // (D, lanes)
    Floats weights;           // (W, lanes), scores at first
    Floats share, others;     // (lanes,), what the band's values, and the tokens before it, count in a query's mean
    Band(int64_t dim, int64_t columns, int64_t lanes)
        : rows(kLanes * dim), tile(kLanes * kLanes), keys(columns * dim), values(columns * dim), queries(dim * lanes),
          outputs(dim * lanes), weights(columns * lanes), share(lanes), others(lanes) {}
};

class BandAttention {
  public:
    explicit BandAttention(const BandArguments& a)
        : a_(a), dim_(a.head_dim), columns_(a.columns), heads_(a.heads / a.kv_heads),
          lanes_of_head_((a.queries + kLanes - 1) / kLanes * kLanes), lanes_(heads_ * lanes_of_head_) {}

    Band memory() const { return Band(dim_, columns_, lanes_); }

    void attend(int64_t row, int64_t kv_head, int64_t block, Band* band) const {
        gather(row, kv_head, block, band);
        each_tile(row, kv_head, block, [&](const Tile& tile) { load_queries(tile, band); });
        multiply(band->keys.data(), columns_, dim_, 1, band->queries.data(), dim_, lanes_, band->weights.data());
        each_tile(row, kv_head, block, [&](const Tile& tile) { weigh(tile, band); });
        multiply(band->values.data(), dim_, 1, dim_, band->weights.data(), columns_, lanes_, band->outputs.data());
        each_tile(row, kv_head, block, [&](const Tile& tile) { write(tile, band); });
    }

  private:
    // Up to kLanes queries of a head.
    struct Tile {
        int64_t row, head, block;
        int64_t query, first, lane;  // the first one's number in the call and in its block, and where its lane is
        int count;
    };

    template <class Each>
    void each_tile(int64_t row, int64_t kv_head, int64_t block, const Each& each) const {
        for (int64_t i = 0; i < heads_; ++i)
            for (int64_t first = 0; first < a_.queries; first += kLanes)
                each(Tile{row, kv_head * heads_ + i, block, block * a_.queries + first, first, i * lanes_of_head_ + first,
                          int(std::min<int64_t>(kLanes, a_.queries - first))});
    }

    static int64_t at(const HeadPointers& heads, int64_t row, int64_t head, int64_t token) {
        return row * heads.batch_stride + head * heads.head_stride + token * heads.token_stride;
    }

    void gather(int64_t row, int64_t kv_head, int64_t block, Band* band) const {
        for (int64_t i = 0; i < columns_; ++i) {
            const int64_t column = a_.column_index[block * columns_ + i];
            const bool is_flushed = column >= a_.tokens;
            const auto copy = [&](const HeadPointers& now, const HeadPointers& flushed, float* to) {
                const HeadPointers& heads = is_flushed ? flushed : now;
                const int64_t from = at(heads, row, kv_head, is_flushed ? column - a_.tokens : column);
                read_numbers(heads.data, is_flushed ? a_.flushed_number : a_.number, from, dim_, to);
            };
            copy(a_.keys, a_.flushed_keys, band->keys.data() + i * dim_);
            copy(a_.values, a_.flushed_values, band->values.data() + i * dim_);
        }
    }

    void load_queries(const Tile& tile, Band* band) const {
        for (int i = 0; i < tile.count; ++i) {
            const int64_t from = at(a_.query, tile.row, tile.head, tile.query + i);
            read_numbers(a_.query.data, a_.number, from, dim_, band->rows.data() + i * dim_);
        }
        const float factor = a_.softmax_scale * kLog2E;
        for (int64_t i = 0; i < dim_; i += kLanes) {
            load_tokens(band->rows.data() + i, tile.count, dim_, band->tile.data(), kLanes);
            for (int64_t j = 0; j < kLanes; ++j)
                store(band->queries.data() + (i + j) * lanes_ + tile.lane, load(band->tile.data() + j * kLanes) * factor);
        }
    }

    // Scores → what each exponential is against the highest, and how the band and the tokens before it are to be mixed.
    void weigh(const Tile& tile, Band* band) const {
        float* scores = band->weights.data() + tile.lane;
        const uint8_t* is_seen = a_.is_seen + tile.block * columns_ * a_.seen_width + tile.first;
        Vec highest = broadcast(-INFINITY), sum = {}, before = highest;
        for (int64_t i = 0; i < columns_; ++i) {
            const Vec score = load_byte_words(is_seen + i * a_.seen_width) != 0 ? load(scores + i * lanes_) : broadcast(-INFINITY);
            store(scores + i * lanes_, score);
            highest = max(highest, score);
        }
        for (int64_t i = 0; i < columns_; ++i) {
            const Vec weight = exp2_nonpositive(load(scores + i * lanes_) - highest);
            store(scores + i * lanes_, weight);
            sum += weight;
        }
        for (int i = 0; i < tile.count; ++i) {
            const int64_t query = tile.query + i - a_.first_with_older;
            if (query < 0) continue;
            const float* logsumexp = static_cast<const float*>(a_.older_logsumexp.data);
            before[i] = logsumexp[at(a_.older_logsumexp, tile.row, tile.head, query)] * kLog2E;
        }
        const Vec top = max(highest, before), of_band = exp2_nonpositive(highest - top);
        const Vec of_older = exp2_nonpositive(before - top), whole = sum * of_band + of_older;
        store(band->share.data() + tile.lane, of_band / whole);
        store(band->others.data() + tile.lane, of_older / whole);
    }

    void write(const Tile& tile, Band* band) const {
        const Vec share = load(band->share.data() + tile.lane);
        for (int64_t i = 0; i < dim_; i += kLanes) {
            for (int64_t j = 0; j < kLanes; ++j)
                store(band->tile.data() + j * kLanes, load(band->outputs.data() + (i + j) * lanes_ + tile.lane) * share);
            store_tokens(band->tile.data(), kLanes, 1.0f, band->rows.data() + i, tile.count, dim_);
        }
        Floats& older = band->tile;  // one row of it at a time
        for (int i = 0; i < tile.count; ++i) {
            const float* from = band->rows.data() + i * dim_;
            float* to = static_cast<float*>(a_.output.data) + at(a_.output, tile.row, tile.head, tile.query + i);
            const int64_t query = tile.query + i - a_.first_with_older;
            if (query < 0) {
                std::memcpy(to, from, sizeof(float) * size_t(dim_));
                continue;
            }
            const float other = band->others.data()[tile.lane + i];
            const int64_t begin = at(a_.older, tile.row, tile.head, query);
            for (int64_t j = 0; j < dim_; j += kLanes) {
                read_numbers(a_.older.data, a_.older_number, begin + j, kLanes, older.data());
                store(to + j, load(from + j) + load(older.data()) * other);
            }
        }
    }

    const BandArguments& a_;
    const int64_t dim_, columns_, heads_, lanes_of_head_, lanes_;
};

static bool is_number(int64_t number) { return number >= 0 && number <= 2; }

static const char* check_bands(const BandArguments& a) {
    ROTATEKV_REQUIRE(a.structure_bytes == int64_t(sizeof(BandArguments)), "built from other sources: rebuild");
    ROTATEKV_REQUIRE(a.batch >= 1 && a.kv_heads >= 1 && a.heads >= 1 && a.blocks >= 1 && a.queries >= 1 && a.columns >= 1,
                     "sizes must be positive");
    ROTATEKV_REQUIRE(a.heads % a.kv_heads == 0, "kv_heads must divide heads");
    ROTATEKV_REQUIRE(a.head_dim >= 16 && a.head_dim <= 1024 && a.head_dim % 16 == 0,
                     "head_dim must be a multiple of 16 up to 1024");
    ROTATEKV_REQUIRE(is_number(a.number) && is_number(a.flushed_number) && is_number(a.older_number),
                     "heads must be float32, float16 or bfloat16");
    ROTATEKV_REQUIRE(a.threads >= 1 && a.threads <= 1024, "threads must be 1 … 1024");
    ROTATEKV_REQUIRE(a.seen_width % 16 == 0 && a.seen_width >= a.queries, "a row of is_seen must be multiples of 16");
    ROTATEKV_REQUIRE(a.query.data && a.keys.data && a.values.data && a.column_index && a.is_seen && a.output.data,
                     "a tensor is missing");
    ROTATEKV_REQUIRE(a.first_with_older >= a.blocks * a.queries || (a.older.data && a.older_logsumexp.data),
                     "attention to older tokens is missing");
    return check_indices(a.column_index, a.blocks * a.columns, a.tokens + a.flushed_tokens, "a column is not there");
}

// Null, or one line that says what is wrong with the arguments.
extern "C" __attribute__((visibility("default"))) const char* rotatekv_bands(const BandArguments* arguments) {
    if (!arguments) return "no arguments";
    const BandArguments& a = *arguments;
    if (const char* wrong = check_bands(a)) return wrong;
    const BandAttention attention(a);
    const int64_t tasks = a.batch * a.blocks * a.kv_heads;
    const int64_t threads = std::max<int64_t>(1, std::min(a.threads, tasks));
#pragma omp parallel for schedule(static) num_threads(int(threads)) if (threads > 1)
    for (int64_t part = 0; part < threads; ++part) {
        Band band = attention.memory();
        for (int64_t task = tasks * part / threads; task < tasks * (part + 1) / threads; ++task)
            attention.attend(task / a.kv_heads / a.blocks, task % a.kv_heads, task / a.kv_heads % a.blocks, &band);
    }
    return nullptr;
}
