// From heads as attention sees them to the numbers that are quantized: RoPE undone, rotated, reordered.
#pragma once

#include "floats.h"
#include "hadamard_rows.h"

template <class Many, class One>
static void widen(const uint16_t* from, float* x, int64_t count, const Many& many, const One& one) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(x + i, many(from + i));
    for (; i < count; ++i) x[i] = one(from[i]);
}

// x (count,) ← numbers from index `at` on; `number`: 0 for float32, 1 for float16, 2 for bfloat16.
static void read_numbers(const void* from, int64_t number, int64_t at, int64_t count, float* x) {
    const uint16_t* halves = static_cast<const uint16_t*>(from) + at;
    if (number == 0) std::memcpy(x, static_cast<const float*>(from) + at, sizeof(float) * size_t(count));
    if (number == 1) widen(halves, x, count, load_halves, half_to_float);
    if (number == 2) widen(halves, x, count, load_bfloats, bfloat_to_float);
}

// Makes one token's channels at a time; the memory of one thread.
class Channels {
  public:
    explicit Channels(const QuantizeArguments& a)
        : a_(a), channels_(a.kv_heads * a.head_dim), x_(channels_), y_(a.order ? channels_ : 0),
          rotation_(a.rotation_width, a.base) {}

    // (C,), there until the next call.
    const float* read(int64_t row, int64_t token) const {
        for (int64_t head = 0; head < a_.kv_heads; ++head) read_head(row, head, token, x_.data() + head * a_.head_dim);
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
        const int64_t at = row * a_.batch_stride + head * a_.head_stride + token * a_.token_stride;
        read_numbers(a_.heads, a_.number, at, a_.head_dim, x);
        const int64_t half = a_.rotary_dim / 2, table = row * a_.unrope_batch_stride + token * a_.unrope_token_stride;
        for (int64_t i = 0; i < half; ++i) {
            const float cos = a_.cos[table + i], sin = a_.sin[table + i], low = x[i], high = x[i + half];
            x[i] = low * cos + high * sin;
            x[i + half] = high * cos - low * sin;
        }
    }

    const QuantizeArguments& a_;
    const int64_t channels_;
    Floats x_, y_;  // (C,), as they come and in their order
    RowRotation rotation_;
};
