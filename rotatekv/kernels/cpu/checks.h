// Checks of what the caller handed over: each returns null, or one line that says what is wrong.
#pragma once

#include "arguments.h"
#include "hadamard.h"
#include "rope.h"

#define ROTATEKV_REQUIRE(condition, message) \
    if (!(condition)) return message

static const char* check_indices(const int32_t* indices, int64_t count, int64_t limit, const char* message) {
    for (int64_t i = 0; i < count; ++i)
        if (indices[i] < 0 || indices[i] >= limit) return message;
    return nullptr;
}

// Scales per channel over groups of tokens, or per token over groups of channels.
static const char* check_scales(const PackedPointers& packed, int64_t tokens, int64_t channels) {
    const int64_t per_scale = packed.tokens_per_scale;
    ROTATEKV_REQUIRE(per_scale >= 0 && per_scale % kBlock == 0 && per_scale < (int64_t(1) << 31),
                     "tokens_per_scale must be 0 or a multiple of 16");
    if (per_scale == 0) {
        ROTATEKV_REQUIRE(packed.groups >= 1, "there must be at least one quantization group");
        return nullptr;
    }
    ROTATEKV_REQUIRE(packed.groups == 0, "scales per channel have no groups of channels");
    ROTATEKV_REQUIRE(channels % 16 == 0, "scales per channel need a multiple of 16 channels");
    ROTATEKV_REQUIRE(packed.scale_rows * per_scale >= tokens, "the packed tokens have no scales");
    return nullptr;
}

static const char* check_packed(const PackedPointers& packed, int64_t tokens, int64_t channels) {
    ROTATEKV_REQUIRE(packed.bits == 2 || packed.bits == 3 || packed.bits == 4, "bits must be 2, 3 or 4");
    ROTATEKV_REQUIRE(packed.blocks * kBlock >= tokens, "the packed tokens do not fit in the blocks");
    if (const char* wrong = check_scales(packed, tokens, channels)) return wrong;
    if (tokens == 0) return nullptr;
    ROTATEKV_REQUIRE(packed.low && packed.scale && packed.zero, "a packed tensor is missing");
    ROTATEKV_REQUIRE(packed.bits == 2 || packed.high, "3 and 4 bits need the plane of high bits");
    return nullptr;
}

// The quantization group of each channel, just where scales are per token.
static const char* check_groups(const PackedPointers& packed, const int32_t* group_of_channel, int64_t channels) {
    ROTATEKV_REQUIRE(!group_of_channel == (packed.tokens_per_scale > 0),
                     "group_of_channel is needed where scales are per token, and only there");
    if (!group_of_channel) return nullptr;
    return check_indices(group_of_channel, channels, packed.groups, "a channel's group is not there");
}

static const char* check_sizes(const DecodeArguments& a) {
    ROTATEKV_REQUIRE(a.structure_bytes == int64_t(sizeof(DecodeArguments)), "built from other sources: rebuild");
    ROTATEKV_REQUIRE(a.batch >= 1 && a.kv_heads >= 1 && a.query_heads >= 1, "sizes must be positive");
    ROTATEKV_REQUIRE(a.query_heads % a.kv_heads == 0, "kv_heads must divide query_heads");
    ROTATEKV_REQUIRE(a.head_dim >= 16 && a.head_dim <= 1024 && a.head_dim % 16 == 0,
                     "head_dim must be a multiple of 16 up to 1024");
    ROTATEKV_REQUIRE(a.query_tokens >= 1 && a.query_tokens <= 16, "query_tokens must be 1 … 16");
    ROTATEKV_REQUIRE(a.packed_tokens >= 0 && a.packed_tokens <= a.total_tokens, "packed_tokens must be 0 … total");
    ROTATEKV_REQUIRE(a.sliding_window >= 0, "sliding_window must be 0 or positive");
    ROTATEKV_REQUIRE(a.query_tokens <= a.total_tokens, "more query tokens than tokens");
    ROTATEKV_REQUIRE(a.total_tokens < (int64_t(1) << 31), "total_tokens must be below 2^31");
    ROTATEKV_REQUIRE(a.threads >= 1 && a.threads <= 1024, "threads must be 1 … 1024");
    return nullptr;
}

static const char* check_rotation(int64_t width, const HadamardBase& base, int64_t kv_heads, int64_t head_dim) {
    HadamardPlan plan;
    ROTATEKV_REQUIRE(width >= 0 && width <= 65536 && plan_hadamard(width, base, &plan),
                     "rotation_width must be 0 or a Hadamard order");
    ROTATEKV_REQUIRE(width == 0 || (width % head_dim == 0 && kv_heads * head_dim % width == 0),
                     "rotation_width must be a whole number of heads that divides kv_heads");
    return nullptr;
}

static const char* check_transforms(const DecodeArguments& a) {
    HadamardPlan plan;
    if (const char* wrong = check_rotation(a.rotation_width, a.key_base, a.kv_heads, a.head_dim)) return wrong;
    ROTATEKV_REQUIRE(!a.unrotate_values || plan_hadamard(a.head_dim, a.value_base, &plan), "head_dim has no Hadamard matrix");
    ROTATEKV_REQUIRE(a.rotary_dim >= 0 && a.rotary_dim <= a.head_dim && a.rotary_dim % 2 == 0,
                     "rotary_dim must be even and at most head_dim");
    if (a.rotary_dim == 0) return nullptr;
    ROTATEKV_REQUIRE(a.coarse_cos && a.coarse_sin && a.fine_cos && a.fine_sin, "a table of cos or sin is missing");
    for (int64_t row = 0; row < a.batch; ++row)
        ROTATEKV_REQUIRE(a.coarse_rows * kCoarseStep >= a.total_tokens + a.origin[row],
                         "the tables of cos and sin are too short");
    return nullptr;
}

static const char* check_exact(const DecodeArguments& a) {
    ROTATEKV_REQUIRE(a.exact_tokens >= 0, "the number of exact tokens is negative");
    if (a.exact_tokens == 0) return nullptr;
    const int32_t *batch_index = a.exact_batch_index, *token_index = a.exact_token_index;
    ROTATEKV_REQUIRE(batch_index && token_index && a.exact_keys && a.exact_values, "an exact tensor is missing");
    const char* wrong = check_indices(batch_index, a.exact_tokens, a.batch, "an exact batch index is not in the batch");
    if (wrong) return wrong;
    for (int64_t i = 1; i < a.exact_tokens; ++i)
        ROTATEKV_REQUIRE(batch_index[i - 1] <= batch_index[i], "exact batch indices must ascend");
    return check_indices(token_index, a.exact_tokens, a.total_tokens, "an exact token index is past the last token");
}

// The planes that the bits of so many groups need.
static const char* check_coded(const CodedPointers& coded, int64_t groups, int64_t tokens) {
    ROTATEKV_REQUIRE(coded.blocks * kBlock >= tokens, "the packed tokens do not fit in the blocks");
    ROTATEKV_REQUIRE(coded.bits && (coded.pairs || !coded.pair_planes) && (coded.singles || !coded.single_planes),
                     "a plane is missing");
    int64_t pairs = 0, singles = 0;
    for (int64_t i = 0; i < groups; ++i) {
        ROTATEKV_REQUIRE(coded.bits[i] >= 0 && coded.bits[i] <= 5, "a group of components must have 0 … 5 bits");
        pairs += coded.bits[i] / 2;
        singles += coded.bits[i] % 2;
    }
    ROTATEKV_REQUIRE(pairs == coded.pair_planes && singles == coded.single_planes, "the bits need other planes");
    return nullptr;
}

// Transform-coded keys: their tables, and whole blocks before the first token.
static const char* check_frames(const DecodeArguments& a) {
    const FramePointers& f = a.frames;
    if (const char* wrong = check_coded(a.coded_keys, a.kv_heads * a.head_dim / 16, a.packed_tokens)) return wrong;
    ROTATEKV_REQUIRE(f.channel_factor && f.matrix && f.units && f.position_units && (f.positions || !f.rank),
                     "a table of the transform-coded keys is missing");
    ROTATEKV_REQUIRE(f.rank >= 0 && f.rank % 2 == 0 && f.rank <= a.head_dim, "rank must be even and at most head_dim");
    ROTATEKV_REQUIRE(f.outputs % 16 == 0 && f.outputs >= a.head_dim + f.rank && f.outputs <= 2 * a.head_dim,
                     "the matrix has a wrong width");
    ROTATEKV_REQUIRE(a.rotation_width == 0 && !a.group_of_channel, "transform-coded keys are not rotated");
    ROTATEKV_REQUIRE(f.size >= kBlock && f.size % kBlock == 0, "a frame must be a multiple of 16 tokens");
    ROTATEKV_REQUIRE(a.dropped >= 0 && a.dropped % kBlock == 0, "dropped must be a multiple of 16");
    ROTATEKV_REQUIRE(!a.rotary_dim || a.coarse_rows > f.size / kCoarseStep, "the tables of cos and sin are too short");
    return nullptr;
}

static const char* check_keys(const DecodeArguments& a, int64_t channels) {
    if (a.coded_keys.scale) return check_frames(a);
    if (const char* wrong = check_packed(a.keys, a.packed_tokens, channels)) return wrong;
    return check_groups(a.keys, a.group_of_channel, channels);
}

static const char* check_values(const DecodeArguments& a, int64_t channels) {
    if (a.coded_values.scale) {
        ROTATEKV_REQUIRE(a.value_map && a.value_mean, "a table of the transform-coded values is missing");
        ROTATEKV_REQUIRE(!a.unrotate_values, "transform-coded values are not rotated");
        return check_coded(a.coded_values, channels / 16, a.packed_tokens);
    }
    if (const char* wrong = check_packed(a.values, a.packed_tokens, channels)) return wrong;
    ROTATEKV_REQUIRE(a.values.tokens_per_scale == 0, "values must have scales per token");
    ROTATEKV_REQUIRE(channels % a.values.groups == 0 && a.head_dim % (channels / a.values.groups) == 0 &&
                         channels / a.values.groups % 16 == 0,
                     "a values' group must be a multiple of 16 channels that divides head_dim");
    return nullptr;
}

static const char* check_decode(const DecodeArguments& a) {
    if (const char* wrong = check_sizes(a)) return wrong;
    const int64_t channels = a.kv_heads * a.head_dim;
    ROTATEKV_REQUIRE(channels <= (1 << 20), "too many channels");
    ROTATEKV_REQUIRE(a.queries && a.first_seen && a.origin && a.output, "a tensor is missing");
    if (const char* wrong = check_keys(a, channels)) return wrong;
    if (const char* wrong = check_values(a, channels)) return wrong;
    const char* wrong = check_indices(a.first_seen, a.batch, a.total_tokens + 1, "first_seen must be 0 … total_tokens");
    if (wrong || (wrong = check_transforms(a))) return wrong;
    return check_exact(a);
}
