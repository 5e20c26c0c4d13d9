// QK-norm and RoPE of training, on the CPU: forward, and the gradients of heads and weights.
#pragma once

#include <cstdint>
#include <string>

#include "floats.h"

namespace flexlam {

// Heads [batch, tokens, heads, dim]; strides in elements, channels side by side.
struct Heads {
    const void* x;
    std::int64_t heads, by_batch, by_token, by_head;
    Float type;
};

// Queries are the first of each pair, keys the second. Results are contiguous.
struct RotaryArgs {
    Heads x[2];
    const float* weight[2];  // [dim]
    const float* cosine;     // rows of the second half's angles stand `second` elements behind the first half's
    const float* sine;       // likewise
    std::int64_t angle_by_batch, angle_by_token, second;
    std::int64_t batch, tokens, dim;
    float eps;
};

struct RotaryForward {
    RotaryArgs shared;
    void* out[2];
    Float to;
};

struct RotaryBackward {
    RotaryArgs shared;
    Heads grad[2];
    void* out[2];          // of the type of `x`
    float* grad_weight[2];  // [dim]
};

// Tokens of one piece of work, whatever the number of threads: a weight's gradient is the sum of the pieces' in order.
constexpr std::int64_t rotary_piece = 32;

// `variant` is one of variant_names(), or "" for the first. `threads` is at most how many work.
void rotary_forward(const RotaryForward& args, int threads, const std::string& variant);
void rotary_backward(const RotaryBackward& args, int threads, const std::string& variant);

}  // namespace flexlam
