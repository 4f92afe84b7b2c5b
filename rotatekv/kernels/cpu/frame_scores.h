// Scores of transform-coded keys: a token's codes, as bytes, times the words of frame_queries.h, and the mean's part.
#pragma once

#include "frame_queries.h"

#if defined(__AVX512F__)
constexpr int kMostFrameRows = 4;  // query rows whose sums for two vectors of tokens stay in registers
#else
constexpr int kMostFrameRows = 2;
#endif

// Where the tokens of a head lie, kLanes of them.
struct FrameTokens {
    const int32_t* pairs;    // of their block, all planes
    const int16_t* singles;
    const uint8_t* scale;
    int64_t place;  // of the first one in the frame
};

template <int Bits, int Rows, int Vectors, bool Exact>
static ROTATEKV_INLINE void add_group(const CodedGroup& group, const FrameTokens* tokens, const int32_t* const* words,
                                      IntVec (*high)[Vectors], IntVec (*low)[Vectors]) {
    CodedWords<Bits> codes[Vectors] = {};
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v)
        codes[v].read(tokens[v].pairs + group.pair * kBlock, tokens[v].singles + group.single * kBlock);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
        WordVec bytes[Vectors];
#pragma GCC unroll 2
        for (int v = 0; v < Vectors; ++v) bytes[v] = codes[v].bytes(j);
#pragma GCC unroll 4
        for (int row = 0; row < Rows; ++row) {
            const WordVec high_word = broadcast_word(uint32_t(words[row][j]));
#pragma GCC unroll 2
            for (int v = 0; v < Vectors; ++v) high[row][v] = dot_bytes(high[row][v], bytes[v], high_word);
            if (!Exact && !has_low_bytes(Bits)) continue;
            const WordVec low_word = broadcast_word(uint32_t(words[row][4 + j]));
#pragma GCC unroll 2
            for (int v = 0; v < Vectors; ++v) low[row][v] = dot_bytes(low[row][v], bytes[v], low_word);
        }
    }
}

// Scores of `Rows` rows for `Vectors`·kLanes tokens of one frame.
template <int Rows, int Vectors, bool Exact>
static void score_frame_tokens(const std::vector<CodedGroup>& groups, const FrameTokens* tokens,
                               const FrameRow* rows, float* scores, int64_t score_stride) {
    IntVec high[Rows][Vectors] = {}, low[Rows][Vectors] = {};
    const int32_t* words[Rows];
    for (int row = 0; row < Rows; ++row) words[row] = rows[row].words;
    for (const CodedGroup& group : groups) {
        switch (group.bits) {
            case 1: add_group<1, Rows, Vectors, Exact>(group, tokens, words, high, low); break;
            case 2: add_group<2, Rows, Vectors, Exact>(group, tokens, words, high, low); break;
            case 3: add_group<3, Rows, Vectors, Exact>(group, tokens, words, high, low); break;
            case 4: add_group<4, Rows, Vectors, Exact>(group, tokens, words, high, low); break;
            default: add_group<5, Rows, Vectors, Exact>(group, tokens, words, high, low);
        }
#pragma GCC unroll 4
        for (int row = 0; row < Rows; ++row) words[row] += kGroupWords;
    }
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) {
        const Vec scale = load_frame_scales(tokens[v].scale);
#pragma GCC unroll 4
        for (int row = 0; row < Rows; ++row) {
            const Vec sum = to_float(high[row][v]) * 256.0f + to_float(low[row][v]) + rows[row].middle;
            store(scores + row * score_stride + v * kLanes,
                  load(rows[row].positions + tokens[v].place) * rows[row].position_unit + sum * rows[row].unit * scale);
        }
    }
}

template <int Vectors, bool Exact>
static void score_frame_rows(int count, const std::vector<CodedGroup>& groups, const FrameTokens* tokens,
                             const FrameRow* rows, float* scores, int64_t stride) {
    switch (count) {
        case 1: return score_frame_tokens<1, Vectors, Exact>(groups, tokens, rows, scores, stride);
        case 2: return score_frame_tokens<2, Vectors, Exact>(groups, tokens, rows, scores, stride);
        case 3:
            return score_frame_tokens<kMostFrameRows < 3 ? 2 : 3, Vectors, Exact>(groups, tokens, rows, scores, stride);
        default: return score_frame_tokens<kMostFrameRows, Vectors, Exact>(groups, tokens, rows, scores, stride);
    }
}
