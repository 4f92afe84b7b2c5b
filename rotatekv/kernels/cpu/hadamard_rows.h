// The orthonormal Hadamard matrix of order W, or its inverse, times rows of W numbers in memory.
#pragma once

#include <algorithm>
#include <cmath>

#include "floats.h"
#include "hadamard.h"
#include "transpose.h"

// Sylvester's order kLanes on the lanes of a vector.
template <int Step = 1, int... Lanes>
static ROTATEKV_INLINE Vec rotate_within(Vec x, std::integer_sequence<int, Lanes...> lanes) {
    if constexpr (Step == kLanes) {
        return x;
    } else {
        const IntVec minus = {(Lanes & Step ? INT32_MIN : 0)...};  // the sign bits of the lanes that are taken away
        return rotate_within<2 * Step>(neighbours<Step>(x, lanes) + (Vec)((IntVec)x ^ minus), lanes);
    }
}

class RowRotation {
  public:
    RowRotation(int64_t width, const HadamardBase& base) : width_(int(width)), room_(0) {
        if (width % kLanes == 0 && plan_hadamard(width / kLanes, base, &plan_)) return;
        plan_hadamard(width, base, &plan_);
        room_ = Floats(width * kLanes);
    }

    // rows (count, W), in place; Forward: H·row, otherwise Hᵀ·row.
    template <bool Forward>
    void apply(float* rows, int64_t count) const {
        if (plan_.width == width_) return apply_in_lanes<Forward>(rows, count);
        // H is the matrix of order W / kLanes ⊗ Sylvester's of order kLanes.
        for (float* row = rows; row < rows + count * width_; row += width_) {
            const auto within = [&](int i) { return rotate_within(load(row + i * kLanes), kAllLanes); };
            hadamard<Forward>(plan_, plan_.width, row, within);
            for (int i = 0; i < width_; i += kLanes) store(row + i, load(row + i) * norm());
        }
    }

  private:
    // kLanes rows at a time, each in a lane.
    template <bool Forward>
    void apply_in_lanes(float* rows, int64_t count) const {
        float* room = room_.data();
        for (; count > 0; count -= kLanes, rows += kLanes * width_) {
            const int some = int(std::min<int64_t>(count, kLanes));
            for (int i = 0; i < width_; i += kLanes)
                load_tokens(rows + i, some, width_, room + i * kLanes, std::min(kLanes, width_ - i));
            hadamard<Forward>(plan_, width_, room, [&](int channel) { return load(room + channel * kLanes); });
            for (int i = 0; i < width_; i += kLanes)
                store_tokens(room + i * kLanes, std::min(kLanes, width_ - i), norm(), rows + i, some, width_);
        }
    }

    float norm() const { return 1.0f / std::sqrt(float(width_)); }

    int width_;          // W
    HadamardPlan plan_;  // of the order W / kLanes, or W
    Floats room_;        // (W, kLanes) for the latter
};
