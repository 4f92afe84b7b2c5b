// Query rows in the frames of transform-coded keys (rotatekv/kernels/transform_coding.py): turned back by the position
// of a frame's first token, and multiplied by the head's matrix, so that codes can be multiplied by them as they are.
//
// Everything is an integer times a unit. A query in its frame is rounded to 14 bits, with its sign, the matrix to 16
// (frame_tables.py chooses the units so that no sum overflows), and each weight of a code to 16 again, as two bytes.
#pragma once

#include <algorithm>
#include <vector>

#include "floats.h"
#include "coded_layout.h"
#include "rope.h"

constexpr float kLargestQuery = 8191.0f;
constexpr float kLargestWord = 32639.0f;  // 256·127 + 127
constexpr int kRowTile = 4;               // rows of a product whose sums stay in registers
constexpr int kGroupWords = 8;            // of a row's weights: four of high bytes, four of low ones
constexpr int kFewestHeldFrames = 3;      // a chunk's 256 tokens touch so many
constexpr int kHeldRows = 64;             // rows of one product, about

// Codes of up to two bits are small: their weights need no low byte unless a few weights are far above the others. Then
// a row is exact: all its weights have both bytes.
constexpr bool has_low_bytes(int bits) { return bits > 2; }
constexpr float kLeastRatio = 40.0f;  // of the noise of rounding keys to the error of leaving low bytes away

// What the tokens of one frame are multiplied by, for one query row.
struct FrameRow {
    const int32_t* words;    // (coded groups, kGroupWords), bytes in the order in which a shift and a mask give codes
    const float* positions;  // (frame,) the mean's part of the scores, in units of its own
    float unit;              // of the words
    float middle;            // Σ weight·(½ − 2^(bits − 1)), in units
    float position_unit;
    bool exact;
};

// The largest magnitude of x (count,).
static float largest_of(const float* x, int64_t count) {
    Vec top = {};
    for (int64_t i = 0; i < count; i += kLanes) top = max(top, max(load(x + i), -load(x + i)));
    return max_lanes(top);
}

// x (count,) times `factor` rounded to integers of 16 bits, one after the other.
static void round_row(const float* x, int64_t count, float factor, int32_t* pairs) {
    int16_t* integers = reinterpret_cast<int16_t*>(pairs);
    for (int64_t i = 0; i < count; i += kLanes) store_shorts(integers + i, to_nearest(load(x + i) * factor));
}

// A matrix of integers for one head: `half` pairs of rows, and the unit of each column.
struct PairMatrix {
    const int32_t* words;  // (half, outputs)
    const float* units;    // (outputs,)
    int64_t half, outputs;
};

// products (kRowTile rows, outputs) of rows of pairs of integers, for Vectors·kLanes outputs from `output` on.
template <int Vectors>
static void multiply_tile(const PairMatrix& m, int64_t output, const int32_t* pairs, int64_t stride, float* products) {
    IntVec sums[kRowTile][Vectors] = {};
    for (int64_t i = 0; i < m.half; ++i) {
        WordVec columns[Vectors];
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) columns[v] = load_words(m.words + i * m.outputs + output + v * kLanes);
#pragma GCC unroll 4
        for (int row = 0; row < kRowTile; ++row) {
            const WordVec pair = broadcast_word(uint32_t(pairs[row * stride + i]));
#pragma GCC unroll 4
            for (int v = 0; v < Vectors; ++v) sums[row][v] = dot_shorts(sums[row][v], columns[v], pair);
        }
    }
#pragma GCC unroll 4
    for (int row = 0; row < kRowTile; ++row)
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v)
            store(products + row * m.outputs + output + v * kLanes,
                  to_float(sums[row][v]) * load(m.units + output + v * kLanes));
}

// products (rows, outputs) of whole tiles of rows of pairs, `stride` words apart.
static void multiply(const PairMatrix& m, const int32_t* pairs, int64_t stride, int64_t rows, float* products) {
    for (int64_t output = 0; output < m.outputs;) {
        const int64_t left = (m.outputs - output) / kLanes, vectors = left >= 4 ? 4 : left >= 2 ? 2 : 1;
        const auto tile = vectors == 4 ? multiply_tile<4> : vectors == 2 ? multiply_tile<2> : multiply_tile<1>;
        for (int64_t row = 0; row < rows; row += kRowTile)
            tile(m, output, pairs + row * stride, stride, products + row * m.outputs);
        output += vectors * kLanes;
    }
}

// The rows of the frames that a part reads next; the memory of one thread. Each step is done for all rows before the
// next one: what a row's step waits for, a sum over lanes or a quotient, other rows do not.
class FrameQueries {
  public:
    FrameQueries(const DecodeArguments& a, int64_t rows)
        : a_(a), f_(a.frames), dim_(a.head_dim), rows_(rows),
          held_(a.coded_keys.scale ? std::max<int64_t>((kHeldRows + rows - 1) / rows, kFewestHeldFrames) : 0),
          room_((held_ * rows + kLanes - 1) / kLanes * kLanes), pairs_(size_t(room_ * dim_ / 2)),
          words_(size_t(room_ * dim_ / 2)), exact_(size_t(room_)), units_(room_), query_units_(room_), position_units_(room_),
          middles_(room_), tops_(room_), squares_(room_), factors_(room_), angles_(held_ ? a.rotary_dim : 0), fine_angles_(held_ ? a.rotary_dim : 0),
          products_(room_ * f_.outputs), positions_(room_ * f_.size) {}

    // Another part begins: one of this sequence.
    void begin(int64_t row) {
        if (!held_) return;  // keys are not transform-coded
        from_ = to_ = 0;
        origin_ = a_.origin[row] - a_.dropped;
        const int64_t half = a_.rotary_dim / 2;
        fine_ = (origin_ % kCoarseStep + kCoarseStep) % kCoarseStep;  // a frame is whole coarse steps
        for (int64_t i = 0; i < half && fine_; ++i) {
            fine_angles_.data()[i] = a_.fine_cos[i * kFinePositions + fine_];
            fine_angles_.data()[half + i] = a_.fine_sin[i * kFinePositions + fine_];
        }
    }

    // Sees to it that frames from … to − 1 are there, and some up to `end` with them.
    void hold(const float* queries, int64_t head, const std::vector<CodedGroup>& groups, int64_t from, int64_t to,
              int64_t end) {
        if (from >= from_ && to <= to_) return;
        from_ = from;
        to_ = std::min(end, from + held_);
        count_ = (to_ - from_) * rows_;
        const int64_t half = dim_ / 2, outputs = f_.outputs, rank = f_.rank;
        for (int64_t i = 0; i < count_; i += rows_) turn_rows(queries, from_ + i / rows_, turned(i));
        round_rows(products_.data(), dim_, dim_, nullptr, query_units_.data());
        multiply({f_.matrix + head * half * outputs, f_.units + head * outputs, half, outputs}, pairs_.data(), half,
                 count_, products_.data());
        round_products(groups);
        round_rows(products_.data() + dim_, outputs, outputs - dim_, query_units_.data(), position_units_.data());
        multiply({f_.positions + head * rank / 2 * f_.size, f_.position_units + head * f_.size, rank / 2, f_.size},
                 pairs_.data(), half, count_, positions_.data());
    }

    FrameRow row(int64_t frame, int64_t row) const {
        const int64_t i = (frame - from_) * rows_ + row;
        return {words_.data() + i * dim_ / 2, positions_.data() + i * f_.size, units_.data()[i], middles_.data()[i],
                position_units_.data()[i], exact_[i] != 0};
    }

  private:
    float* turned(int64_t i) const { return products_.data() + i * dim_; }  // which are not there yet

    // cos and sin at the frame's first position, rotary_dim / 2 each. It may be below 0; where even the frame's last one
    // is, all of the frame is padding, which nobody sees.
    std::pair<const float*, const float*> angles_of(int64_t frame) {
        const int64_t half = a_.rotary_dim / 2, position = std::max(frame * f_.size + origin_, fine_ - f_.size);
        const int64_t row = (position - fine_) / kCoarseStep;
        const float *coarse_cos = a_.coarse_cos + std::abs(row) * half, *coarse_sin = a_.coarse_sin + std::abs(row) * half;
        if (row >= 0 && fine_ == 0) return {coarse_cos, coarse_sin};
        const float *fine_cos = fine_angles_.data(), *fine_sin = fine_cos + half, sign = row < 0 ? -1.0f : 1.0f;
        float* angles = angles_.data();
        for (int64_t i = 0; i < half; ++i) {
            const float cos = coarse_cos[i], sin = coarse_sin[i] * sign;
            angles[i] = fine_ ? cos * fine_cos[i] - sin * fine_sin[i] : cos;
            angles[half + i] = fine_ ? sin * fine_cos[i] + cos * fine_sin[i] : sin;
        }
        return {angles, angles + half};
    }

    // The queries (rows, D) in the frame.
    void turn_rows(const float* queries, int64_t frame, float* out) {
        const int64_t half = a_.rotary_dim / 2;
        const auto [cos, sin] = angles_of(frame);
        for (int64_t row = 0; row < rows_; ++row, queries += dim_, out += dim_) {
            int64_t k = 0;
            for (; k + kLanes <= half; k += kLanes) {
                const Vec low = load(queries + k), high = load(queries + k + half);
                store(out + k, low * load(cos + k) + high * load(sin + k));
                store(out + k + half, high * load(cos + k) - low * load(sin + k));
            }
            for (; k < half; ++k) {
                const float low = queries[k], high = queries[k + half];
                out[k] = low * cos[k] + high * sin[k];
                out[k + half] = high * cos[k] - low * sin[k];
            }
            std::memcpy(out + 2 * half, queries + 2 * half, sizeof(float) * size_t(dim_ - 2 * half));
        }
    }

    // The rows of x (count, width), `stride` floats apart, become pairs of integers; units (count,) are theirs,
    // times `per` if that is given.
    void round_rows(const float* x, int64_t stride, int64_t width, const float* per, float* units) {
        for (int64_t i = 0; i < count_; ++i) tops_.data()[i] = largest_of(x + i * stride, width);
        for (int64_t i = 0; i < count_; i += kLanes) {
            const Vec top = load(tops_.data() + i), unit = top * (1.0f / kLargestQuery);
            store(factors_.data() + i, top > 1e-30f ? kLargestQuery / top : Vec{});
            store(units + i, per ? unit * load(per + i) : unit);
        }
        for (int64_t i = 0; i < count_; ++i)
            round_row(x + i * stride, width, factors_.data()[i], pairs_.data() + i * dim_ / 2);
    }

    // Products with the query that codes are multiplied by become words of bytes.
    void round_products(const std::vector<CodedGroup>& groups) {
        float rough = 0.0f;  // mean square of what is left away with the low bytes, in units
        for (const CodedGroup& group : groups) {
            const float square = group.bits == 1 ? 0.25f : 1.25f;  // of a code about its middle
            if (!has_low_bytes(group.bits)) rough += kGroup * (256.0f * 256.0f / 12.0f) * square;
        }
        for (int64_t i = 0; i < count_; ++i) measure_products(groups, i);
        for (int64_t i = 0; i < count_; i += kLanes) {
            const Vec top = load(tops_.data() + i), factor = top > 1e-30f ? kLargestWord / top : Vec{};
            const Vec noise = load(squares_.data() + i) * factor * factor;
            store(factors_.data() + i, factor);
            store(squares_.data() + i, noise);
            store(units_.data() + i, load(query_units_.data() + i) * top * (1.0f / kLargestWord));
        }
        for (int64_t i = 0; i < count_; ++i) {
            exact_[i] = rough * kLeastRatio * kLeastRatio > squares_.data()[i];
            store_words_of(groups, i);
        }
    }

    // The largest product, and what rounding keys costs.
    void measure_products(const std::vector<CodedGroup>& groups, int64_t i) {
        const float* products = products_.data() + i * f_.outputs;
        Vec top = {}, squares = {};
        for (const CodedGroup& group : groups)
            for (int at = 0; at < kGroup; at += kLanes) {
                const Vec x = load(products + group.index * kGroup + at);
                top = max(top, max(x, -x));
                squares += x * x * group.noise;
            }
        tops_.data()[i] = max_lanes(top);
        squares_.data()[i] = sum_lanes(squares);
    }

    void store_words_of(const std::vector<CodedGroup>& groups, int64_t i) {
        const float *products = products_.data() + i * f_.outputs, factor = factors_.data()[i];
        const bool exact = exact_[i];
        Vec middle = {};
        int32_t* words = words_.data() + i * dim_ / 2;
        for (const CodedGroup& group : groups) {
            IntVec high[kGroup / kLanes], low[kGroup / kLanes];
            if (exact || has_low_bytes(group.bits)) {
                for (int part = 0; part < kGroup / kLanes; ++part) {
                    const IntVec weight = to_nearest(load(products + group.index * kGroup + part * kLanes) * factor);
                    high[part] = (weight + 128) >> 8;
                    low[part] = weight - (high[part] << 8);
                    middle += to_float(weight) * group.middle;
                }
                store_bytes(low, words + 4);
            } else {
                for (int part = 0; part < kGroup / kLanes; ++part) {
                    high[part] = to_nearest(load(products + group.index * kGroup + part * kLanes) * (factor / 256.0f));
                    middle += to_float(high[part]) * (256.0f * group.middle);
                }
            }
            store_bytes(high, words);
            words += kGroupWords;
        }
        middles_.data()[i] = sum_lanes(middle);
    }

    const DecodeArguments& a_;
    const FramePointers& f_;
    const int64_t dim_, rows_;  // query rows of a head
    const int64_t held_;        // frames
    const int64_t room_;        // rows of all held frames, whole tiles and vectors
    int64_t from_ = 0, to_ = 0, count_ = 0;  // held frames and rows
    int64_t origin_ = 0, fine_ = 0;  // position of the first frame of all, and its place in a coarse step
    std::vector<int32_t> pairs_;  // (room, D / 2)
    std::vector<int32_t> words_;  // (room, D / 2)
    std::vector<uint8_t> exact_;
    Floats units_, query_units_, position_units_, middles_, tops_, squares_, factors_;  // (room,) each
    Floats angles_, fine_angles_;  // (2, rotary_dim / 2)
    Floats products_;   // (room, outputs); before, the turned queries
    Floats positions_;  // (room, frame)
};
