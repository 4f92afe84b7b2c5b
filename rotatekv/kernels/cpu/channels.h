// From heads as attention sees them to the numbers that are quantized: RoPE undone, affine, rotated, reordered.
#pragma once

#include "floats.h"
#include "hadamard_rows.h"

// Makes one token's channels at a time; the memory of one thread.
class Channels {
  public:
    explicit Channels(const QuantizeArguments& a)
        : a_(a), channels_(a.kv_heads * a.head_dim), x_(channels_), y_(channels_), room_(0) {
        within_lanes_ = plan_hadamard(a.rotation_width / kLanes, a.base, &plan_) && a.rotation_width % kLanes == 0;
        if (within_lanes_) return;
        plan_hadamard(a.rotation_width, a.base, &plan_);
        room_ = Floats(a.rotation_width * kLanes);
    }

    // (C,), there until the next call.
    const float* read(int64_t row, int64_t token) {
        for (int64_t head = 0; head < a_.kv_heads; ++head) read_head(row, head, token, x_.data() + head * a_.head_dim);
        if (a_.factor) {
            float* x = x_.data();
            for (int64_t i = 0; i < channels_; ++i) x[i] = (x[i] - a_.offset[i]) / a_.factor[i];
        }
        if (a_.rotation_width) rotate();
        if (a_.order) {
            const float* x = x_.data();
            float* y = y_.data();
            for (int64_t i = 0; i < channels_; ++i) y[i] = x[a_.order[i]];
            std::swap(x_, y_);
        }
        return x_.data();
    }

  private:
    void read_head(int64_t row, int64_t head, int64_t token, float* x) const {
        const int64_t at = row * a_.batch_stride + head * a_.head_stride + token * a_.token_stride, dim = a_.head_dim;
        const uint16_t* halves = static_cast<const uint16_t*>(a_.heads) + at;
        if (a_.number == 0) std::memcpy(x, static_cast<const float*>(a_.heads) + at, sizeof(float) * dim);
        if (a_.number == 1) widen(halves, x, load_halves, half_to_float);
        if (a_.number == 2) widen(halves, x, load_bfloats, bfloat_to_float);
        const int64_t half = a_.rotary_dim / 2, table = row * a_.unrope_batch_stride + token * a_.unrope_token_stride;
        for (int64_t i = 0; i < half; ++i) {
            const float cos = a_.cos[table + i], sin = a_.sin[table + i], low = x[i], high = x[i + half];
            x[i] = low * cos + high * sin;
            x[i + half] = high * cos - low * sin;
        }
    }

    template <class Many, class One>
    void widen(const uint16_t* from, float* x, const Many& many, const One& one) const {
        int64_t i = 0;
        for (; i + kLanes <= a_.head_dim; i += kLanes) store(x + i, many(from + i));
        for (; i < a_.head_dim; ++i) x[i] = one(from[i]);
    }

    void rotate() {
        const int64_t width = a_.rotation_width, rows = channels_ / width;
        if (!within_lanes_) {
            for (int64_t from = 0; from < rows; from += kLanes)
                rotate_lanes<true>(plan_, x_.data() + from * width, std::min<int64_t>(kLanes, rows - from), room_.data());
            return;
        }
        for (int64_t from = 0; from < channels_; from += width) rotate_row(plan_, x_.data() + from, y_.data() + from);
        std::swap(x_, y_);
    }

    const QuantizeArguments& a_;
    const int64_t channels_;
    Floats x_, y_;       // (C,)
    Floats room_;        // (W, kLanes) where rows are rotated in lanes
    HadamardPlan plan_;  // of the order W / kLanes, or W
    bool within_lanes_;
};
