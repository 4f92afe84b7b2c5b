// Blocks → heads: unpack, dequantize, undo the grouped Hadamard, and write tokens as rows of their heads. What
// attention needs at prefill, in one pass over the codes.

#include <algorithm>
#include <cmath>
#include <new>
#include <vector>

#include "checks.h"
#include "dequantize.h"
#include "floats.h"
#include "transpose.h"

// The memory of one thread.
struct Room {
    Floats scales;    // the table of read_lanes
    Floats channels;  // (W or D, kLanes)
};

class Dequantize {
  public:
    explicit Dequantize(const DequantizeArguments& a)
        : a_(a), channels_(a.kv_heads * a.head_dim), width_(a.rotation_width ? a.rotation_width : a.head_dim),
          norm_(a.rotation_width ? 1.0f / std::sqrt(float(a.rotation_width)) : 1.0f),
          group_at_(a.group_of_channel ? size_t(channels_) : 0) {
        plan_hadamard(a.rotation_width, a.base, &plan_);
        for (size_t i = 0; i < group_at_.size(); ++i) group_at_[i] = a.group_of_channel[i] * 2 * kLanes;
    }

    // Threads take whole blocks, so that a block's scales are read once.
    void run() const {
        const int64_t blocks = (a_.tokens + kBlock - 1) / kBlock, tasks = a_.batch * blocks;
        const int64_t threads = std::max<int64_t>(1, std::min(a_.threads, tasks));
        std::vector<Room> rooms;
        for (int64_t i = 0; i < threads; ++i)
            rooms.push_back({Floats(scale_table_floats(a_.blocks, channels_)), Floats(width_ * kLanes)});
#pragma omp parallel for schedule(static) num_threads(int(threads)) if (threads > 1)
        for (int64_t part = 0; part < threads; ++part)
            for (int64_t task = tasks * part / threads; task < tasks * (part + 1) / threads; ++task)
                read_block(task / blocks, task % blocks, rooms[part]);
    }

  private:
    void read_block(int64_t row, int64_t block, const Room& room) const {
        for (int lane = 0; lane < kBlock; lane += kLanes) {
            if (block * kBlock + lane >= a_.tokens) return;
            const Place place{row, block, lane, 0, channels_, channels_};
            read_lanes(a_.blocks, place, group_at_.data(), room.scales.data(),
                       [&](const auto& read) { write_lanes(place, read, room.channels.data()); });
        }
    }

    // The place's tokens to the heads they belong to; x (W or D, kLanes) is room.
    template <class Read>
    void write_lanes(const Place& place, const Read& read, float* x) const {
        for (int64_t from = 0; from < channels_; from += width_) {
            hadamard<false>(plan_, int(width_), x, [&](int channel) { return read(int(from) + channel); });
            for (int64_t head = 0; head < width_ / a_.head_dim; ++head)
                write_head(x + head * a_.head_dim * kLanes, place.row * a_.kv_heads + from / a_.head_dim + head,
                           place.block * kBlock + place.first_lane);
        }
    }

    void write_head(const float* x, int64_t head, int64_t token) const {
        const int tokens = int(std::min<int64_t>(kLanes, a_.tokens - token)), dim = int(a_.head_dim);
        float* rows = a_.output + (head * a_.output_tokens + token) * dim;
        for (int i = 0; i < dim; i += kLanes)
            store_tokens(x + i * kLanes, std::min(kLanes, dim - i), norm_, rows + i, tokens, dim);
    }

    const DequantizeArguments& a_;
    const int64_t channels_, width_;  // C, and the channels that are rotated together
    const float norm_;
    HadamardPlan plan_;
    std::vector<int32_t> group_at_;  // (C,) offset of each channel's group in the table of scales
};

static const char* check_dequantize(const DequantizeArguments& a) {
    ROTATEKV_REQUIRE(a.structure_bytes == int64_t(sizeof(DequantizeArguments)), "built from other sources: rebuild");
    ROTATEKV_REQUIRE(a.batch >= 0 && a.kv_heads >= 1 && a.head_dim >= 1, "sizes must be positive");
    ROTATEKV_REQUIRE(a.kv_heads * a.head_dim <= (1 << 20), "too many channels");
    ROTATEKV_REQUIRE(a.tokens >= 0 && a.tokens <= a.output_tokens, "tokens must be 0 … those of the output");
    ROTATEKV_REQUIRE(a.threads >= 1 && a.threads <= 1024, "threads must be 1 … 1024");
    if (const char* wrong = check_rotation(a.rotation_width, a.base, a.kv_heads, a.head_dim)) return wrong;
    if (a.batch == 0 || a.tokens == 0) return nullptr;
    const int64_t channels = a.kv_heads * a.head_dim;
    if (const char* wrong = check_packed(a.blocks, a.tokens, channels)) return wrong;
    ROTATEKV_REQUIRE(a.output, "a tensor is missing");
    return check_groups(a.blocks, a.group_of_channel, channels);
}

// Null, or one line that says what is wrong with the arguments.
extern "C" __attribute__((visibility("default"))) const char* rotatekv_dequantize(const DequantizeArguments* a) {
    if (!a) return "no arguments";
    if (const char* wrong = check_dequantize(*a)) return wrong;
    if (a->batch == 0 || a->tokens == 0) return nullptr;
    try {
        Dequantize(*a).run();
    } catch (const std::bad_alloc&) {
        return "out of memory";
    }
    return nullptr;
}
