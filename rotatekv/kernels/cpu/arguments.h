// What the Python side hands over. Every array is dense in the order given; rotatekv/kernels/cpu/arguments.py mirrors
// this field by field.
#pragma once

#include <cstdint>

// Letters: B batch, H query heads, H_kv key/value heads, D head_dim, C = H_kv·D, N blocks of 16 tokens.
struct PackedPointers {
    const int32_t* low;     // (B, N, C)
    const void* high;       // (B, N, C) int16 for 3 bits, int32 for 4, null for 2
    const void* scale;      // (B, N, groups, 16) float16, or (B, R, C)
    const int8_t* zero;     // (B, N, groups, 16), or (B, R, C)
    int64_t blocks;         // N, allocated
    int64_t groups;         // of channels that share a scale; 0: scales are per channel
    int64_t bits;  // 2, 3 or 4
    int64_t tokens_per_scale;  // g, a multiple of 16: row r of R serves tokens g·r … g·r + g − 1; 0: per token
    int64_t scale_rows;        // R; 0: scales are per token
};

// The factor of a Hadamard matrix that is no power of two, entries ±1, where the kernels have no pass of their own.
struct HadamardBase {
    const float* matrix;  // (order, order); null: none is needed
    int64_t order;
};

// Transform-coded keys or values, in the layout of rotatekv/kernels/transform_coding.py. G = D / 16 groups of components.
struct CodedPointers {
    const int32_t* pairs;    // (B, N, pair_planes, 16)
    const int16_t* singles;  // (B, N, single_planes, 16)
    const uint8_t* scale;    // (B, N, H_kv, 16); null: they are not transform-coded
    const int32_t* bits;     // (H_kv, G), 0 … 5
    int64_t blocks;          // N, allocated
    int64_t pair_planes, single_planes;
    float noise[6];  // mean square of a component's rounding error by its bits: keys in steps; values of variance 1
};

// What frame_tables.py makes of the keys' map. O outputs.
struct FramePointers {
    const float* channel_factor;  // (H_kv, D), of queries
    const int32_t* matrix;        // (H_kv, D / 2, O), two int16 each
    const float* units;           // (H_kv, O)
    const int32_t* positions;     // (H_kv, rank / 2, FRAME), two int16 each: by token of a frame
    const float* position_units;  // (H_kv, FRAME)
    int64_t size;                 // FRAME, tokens, a multiple of 16
    int64_t outputs, rank;        // O = D + rank, or more; rank is even
};

struct DecodeArguments {
    int64_t structure_bytes;  // sizeof(DecodeArguments): both sides must agree
    int64_t batch, query_heads, kv_heads, head_dim, query_tokens;
    int64_t packed_tokens;   // tokens 0 … packed_tokens − 1 are read from the blocks
    int64_t total_tokens;    // length of the sequence, exact tokens included
    int64_t rotation_width;  // W of the keys' grouped-head Hadamard; 0 = not rotated
    int64_t rotary_dim;      // channels of a head that RoPE turns in packed keys; 0 = these are after RoPE too
    int64_t coarse_rows;     // rows of the coarse tables
    int64_t exact_tokens;    // S
    int64_t exact_is_bfloat16;
    int64_t unrotate_values;  // 1: packed values are rotated by the Hadamard matrix of order D
    int64_t sliding_window;   // a query of token c sees the tokens after c − sliding_window; 0 = all
    int64_t dropped;          // tokens before token 0, a multiple of 16: token c has the place c + dropped
    int64_t threads;
    float softmax_scale, attention_scaling;
    PackedPointers keys, values;
    CodedPointers coded_keys, coded_values;  // instead of keys, values
    FramePointers frames;                    // of coded_keys
    HadamardBase key_base, value_base;  // of the orders W and D
    const int32_t* group_of_channel;  // (C,) quantization group of each key channel; null: scales are per channel
    const float* value_map;           // (H_kv, D, D) of coded_values: what each component adds to an output head
    const float* value_mean;          // (H_kv, D)
    const float* queries;             // (B, H, query_tokens, D), after RoPE
    const int32_t* first_seen;        // (B,) first token that any query sees
    const int32_t* origin;            // (B,) position of token 0; below 0: the first tokens are not seen
    const float* coarse_cos;          // (coarse_rows, rotary_dim / 2), row q is position 16·q
    const float* coarse_sin;
    const float* fine_cos;  // (rotary_dim / 2, 32), column p is position p
    const float* fine_sin;
    const int32_t* exact_batch_index;  // (S,) ascending: sequence of each exact token
    const int32_t* exact_token_index;  // (S,) its index in the sequence
    const uint16_t* exact_keys;        // (S, H_kv, D) float16 or bfloat16, after RoPE
    const uint16_t* exact_values;      // (S, H_kv, D), not rotated
    float* output;  // (B, H, query_tokens, D)
};

struct QuantizeArguments {
    int64_t structure_bytes;
    int64_t batch, kv_heads, tokens, head_dim;
    int64_t batch_stride, head_stride, token_stride;   // of `heads`, in numbers
    int64_t unrope_batch_stride, unrope_token_stride;  // of `cos` and `sin`
    int64_t number;          // 0: `heads` are float32, 1: float16, 2: bfloat16
    int64_t start;           // token index of the first written token
    int64_t rotation_width;  // W of the Hadamard matrix; 0 = not rotated
    int64_t rotary_dim;      // channels of a head whose RoPE is undone; 0 = none
    int64_t threads;
    float clip_ratio;
    PackedPointers blocks;  // written in place
    HadamardBase base;      // of the order W
    const void* heads;      // (B, H_kv, tokens, D); a head of a token is dense
    const int32_t* order;   // (C,) which channel is quantized as the j-th, and where its codes go; null: the j-th
    const float* cos;       // (B, tokens, rotary_dim / 2) with sin, to undo RoPE by; null: nothing
    const float* sin;
};

struct DequantizeArguments {
    int64_t structure_bytes;
    int64_t batch, kv_heads, head_dim;
    int64_t tokens;          // tokens 0 … tokens − 1 are read
    int64_t output_tokens;   // room for a head's tokens in `output`
    int64_t rotation_width;  // W of the Hadamard matrix to undo; 0 = not rotated
    int64_t threads;
    PackedPointers blocks;
    HadamardBase base;                // of the order W
    const int32_t* group_of_channel;  // (C,) quantization group of each channel; null: scales are per channel
    float* output;                    // (B, H_kv, output_tokens, D)
};

// Transform-coded keys or values to write.
struct FrameWriteArguments {
    int64_t structure_bytes;
    int64_t batch, kv_heads, tokens, head_dim;
    int64_t batch_stride, head_stride, token_stride;  // of `heads`, in numbers
    int64_t turn_batch_stride, turn_token_stride;     // of the tables of cos and sin
    int64_t number;      // 0: `heads` are float32, 1: float16, 2: bfloat16
    int64_t start;       // token index of the first written token
    int64_t rotary_dim;  // channels of a head that RoPE turns; 0 = none
    int64_t threads;
    int64_t words_of_tokens;  // 1: a word has 16 components of a token; 0: 16 tokens of a component
    CodedPointers coded;      // written in place
    const void* heads;      // (B, H_kv, tokens, D); a head of a token is dense
    const float* map;       // (H_kv, D, D), Aᵀ
    const float* weights;   // (H_kv, D), of a component's squared error; 0 where it is not stored
    const float* steps;     // (H_kv, D), of a component of variance 1; 0 where it is not stored
    const float* mean;      // (H_kv, D); null: heads are centred, and in their frames
    const float* origin_cos;  // (B, tokens, rotary_dim / 2) with origin_sin: of the position of the frame's first token
    const float* origin_sin;
    const float* place_cos;   // the same of the token's own position, counted from there
    const float* place_sin;
};

// Transform-coded keys or values to read.
struct ComponentArguments {
    int64_t structure_bytes;
    int64_t batch, kv_heads, head_dim;
    int64_t tokens;           // tokens 0 … tokens − 1 are read
    int64_t output_tokens;    // room for a head's tokens in `output`
    int64_t words_of_tokens;  // 1: a word has 16 components of a token; 0: 16 tokens of a component
    int64_t threads;
    int64_t rotary_dim;       // channels of a head that RoPE turns; 0 = none
    int64_t turn_batch_stride, turn_token_stride;  // of the tables of cos and sin
    CodedPointers coded;
    float* output;       // (B, H_kv, output_tokens, D)
    const float* map;    // (H_kv, D, D), the transpose of A⁻¹; null: components are read as they are
    const float* mean;   // (H_kv, D)
    const float* origin_cos;  // (B, tokens, rotary_dim / 2) each, as of FrameWriteArguments
    const float* origin_sin;
    const float* place_cos;
    const float* place_sin;
};

// Keys, values, queries or outputs whose heads lie anywhere; a head of a token is dense.
struct HeadPointers {
    void* data;
    int64_t batch_stride, head_stride, token_stride;  // in numbers
};

// Blocks of queries that see few tokens each.
struct BandArguments {
    int64_t structure_bytes;
    int64_t batch, heads, kv_heads, head_dim;
    int64_t blocks, queries, columns;  // N; of a block, Q and W
    int64_t tokens, flushed_tokens;    // of `keys`, and of `flushed_keys`
    int64_t first_with_older;          // the first query that sees older tokens
    int64_t seen_width;                // of a row of `is_seen`, a multiple of 16 and Q at least
    int64_t number;                    // of queries, keys and values, 0: float32, 1: float16, 2: bfloat16
    int64_t flushed_number, older_number;  // the same of the flushed ones, and of `older`
    int64_t threads;
    HeadPointers query;                         // (B, H, N·Q, D)
    HeadPointers keys, values;                  // (B, H_kv, tokens, D)
    HeadPointers flushed_keys, flushed_values;  // (B, H_kv, flushed_tokens, D)
    HeadPointers older, older_logsumexp;        // attention to older tokens, from query first_with_older on; the last float32
    HeadPointers output;                        // (B, H, N·Q, D) float32
    const int32_t* column_index;                // (N, W), counted in `keys`, then in `flushed_keys`
    const uint8_t* is_seen;                     // (N, W, seen_width)
    float softmax_scale;
};
