// The parts that threads share out, and what they leave for each other; compiled once per instruction set.
#pragma once

#include "decode.h"
#include "variants.h"

namespace flexlam {

constexpr std::int64_t widest_vector = 16;  // fp32 numbers

// `n` up to whole vectors.
constexpr std::int64_t padded(std::int64_t n) { return (n + widest_vector - 1) / widest_vector * widest_vector; }

// What each split of each query leaves: for every head sums [padded dim] of weighted values, their largest score and the sum
// of their weights (0: it saw nothing).
struct Parts {
    std::int64_t entries, splits, width;
    float* sums;  // [queries, splits, heads, width]

    float& largest(float* part) const { return part[width - 2]; }
    float& total(float* part) const { return part[width - 1]; }
};

struct DecodeKernels {
    void (*rows)(const LinearArgs&, float* y);  // x in fp32, normed where asked for: [rows, padded inner]
    void (*outs)(const LinearArgs&, const float* y, std::int64_t first, std::int64_t last);
    // of the heads of queries, then of keys, those in [first, last); a key's head brings its value along
    void (*write)(const WriteArgs&, std::int64_t token, std::int64_t first, std::int64_t last);
    void (*part)(const AttendArgs&, const Parts&, std::int64_t query, std::int64_t split);
    void (*join)(const AttendArgs&, const Parts&, std::int64_t query);
    // x [n] = row `code` of the embedding, and row `slot` of `place` added unless that is nullptr
    void (*embed)(const void* embedding, std::int64_t code, const void* place, std::int64_t slot, std::int64_t n, float* x);
    void (*norm)(const void* x, std::int64_t row, const void* weight, std::int64_t width, float eps, void* out);
    void (*swiglu)(const void* x, std::int64_t row, std::int64_t inner, void* out);  // x [rows, 2 inner]
};

// Those of one instruction set for weights, or pages, of a type.
const DecodeKernels& decode_kernels(Variant variant, Float type);

#define FLEXLAM_DECLARE(name)                          \
    namespace name {                                   \
    const DecodeKernels& decode_kernels(Float type);   \
    }
FLEXLAM_DECLARE(portable)
FLEXLAM_DECLARE(avx2)
FLEXLAM_DECLARE(avx512)
FLEXLAM_DECLARE(avx512_bf16)
#undef FLEXLAM_DECLARE

}  // namespace flexlam
