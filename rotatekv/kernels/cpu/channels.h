// From heads as attention sees them to the numbers that are quantized: RoPE undone, affine, rotated, reordered.
#pragma once

#include "floats.h"
#include "hadamard_rows.h"

// Makes one token's channels at a time; the memory of one thread.
class Channels {
  public:
    explicit Channels(const QuantizeArguments& a)
        : a_(a), channels_(a.kv_heads * a.head_dim), x_(channels_), y_(a.order ? channels_ : 0),
          rotation_(a.rotation_width, a.base) {}

    // (C,), there until the next call.
    const float* read(int64_t row, int64_t token) const {
        for (int64_t head = 0; head < a_.kv_heads; ++head) read_head(row, head, token, x_.data() + head * a_.head_dim);
        if (a_.factor) {
            float* x = x_.data();
            for (int64_t i = 0; i < channels_; ++i) x[i] = (x[i] - a_.offset[i]) / a_.factor[i];
        }
        if (a_.rotation_width) rotation_.apply<true>(x_.data(), channels_ / a_.rotation_width);
        if (a_.order) {
            const float* x = x_.data();
            float* y = y_.data();
            for (int64_t i = 0; i < channels_; ++i) y[i] = x[a_.order[i]];
            return y;
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

    const QuantizeArguments& a_;
    const int64_t channels_;
    Floats x_, y_;  // (C,), as they come and in their order
    RowRotation rotation_;
};
