// What threads share out of csrc/rows.h: rows [first, last) of one group, or of a map; compiled once per instruction set.
#pragma once

#include "rows.h"
#include "variants.h"

namespace flexlam {

constexpr std::int64_t widest_row_vector = 16;  // fp32 numbers

// `n` up to whole vectors.
constexpr std::int64_t whole(std::int64_t n) { return (n + widest_row_vector - 1) / widest_row_vector * widest_row_vector; }

struct RowKernels {
    void (*norm)(const NormArgs&, std::int64_t group, std::int64_t first, std::int64_t last);
    // sums [2, whole(width)] of these rows: of the scale's gradient and the shift's
    void (*norm_grad)(const NormGradArgs&, std::int64_t group, std::int64_t first, std::int64_t last, float* sums);
    void (*gate)(const GateArgs&, std::int64_t group, std::int64_t first, std::int64_t last);
    void (*gate_grad)(const GateGradArgs&, std::int64_t group, std::int64_t first, std::int64_t last, float* sums);
    // the group's row of `out` = the sum of `pieces` rows that are `stride` apart
    void (*join)(const Rows& out, std::int64_t group, const float* sums, std::int64_t pieces, std::int64_t stride,
                 std::int64_t width);
    void (*gelu)(const MapArgs&, std::int64_t row);
    void (*swiglu)(const MapArgs&, std::int64_t row);
};

#define FLEXLAM_DECLARE(name)          \
    namespace name {                   \
    const RowKernels& row_kernels();   \
    }
FLEXLAM_DECLARE(portable)
FLEXLAM_DECLARE(avx2)
FLEXLAM_DECLARE(avx512)
FLEXLAM_DECLARE(avx512_bf16)
#undef FLEXLAM_DECLARE

}  // namespace flexlam
