// The norms, modulations and activations around transformer blocks, forward and backward, on the CPU. Numbers are read and
// written in their types and are fp32 inside.
//
// Rows of `width` numbers stand in groups of `count`; each group has its own scale, shift or gate. Sums over a group's rows
// are taken in fixed pieces, which are added in order: no result depends on the number of threads.
#pragma once

#include <cstdint>
#include <string>

#include "floats.h"

namespace flexlam {

// Where rows stand: elements from one group, and from one row of it, to the next. Numbers of a row are neighbours. What there
// is one row of in a group (a scale, its gradient) has `row` 0; nullptr is what is not there.
struct Rows {
    void* data;
    Float type;
    std::int64_t group, row;
};

struct Extent {
    std::int64_t groups, count, width;
};

// out = y * scale + shift, or y * (1 + scale) + shift with `one`. y is (x - mean) * rstd with `center`; without, x * rstd of
// the root mean square, rounded to x's type.
struct NormArgs {
    Rows x, scale, shift, out;
    float* stats;  // [groups * count] of rstd; with `center` as many means behind them
    Extent extent;
    float eps;
    bool center, one;
};

struct NormGradArgs {
    Rows grad, x, scale;
    const float* stats;
    Rows dx, dscale, dshift;
    Extent extent;
    bool center, one;
};

// out = x + gate * y
struct GateArgs {
    Rows x, y, gate, out;
    Extent extent;
};

struct GateGradArgs {
    Rows grad, y, gate, dy, dgate;
    Extent extent;
};

// One of the functions below for `rows` rows of `width` numbers of one type, the last of `last`: out = f(a, b).
struct MapArgs {
    const void* grad;  // of `out`; nullptr: forward
    const void* a;
    const void* b;  // nullptr for a function of one argument
    void* out;      // backward: the gradient of a
    void* other;    // backward: the gradient of b
    std::int64_t rows, width, last, a_row, b_row;  // from one row to the next; of the others it is `width`
    Float type;
};

// `variant` is one of variant_names(), or "" for the first. `threads` is at most how many work.
void row_norm(const NormArgs& args, int threads, const std::string& variant);
void row_norm_backward(const NormGradArgs& args, int threads, const std::string& variant);
void gate_add(const GateArgs& args, int threads, const std::string& variant);
void gate_add_backward(const GateGradArgs& args, int threads, const std::string& variant);
void gelu(const MapArgs& args, int threads, const std::string& variant);    // tanh's approximation
void swiglu(const MapArgs& args, int threads, const std::string& variant);  // silu(a) * b

}  // namespace flexlam
