// Mean cross-entropy of logits with codes, on the CPU: each row is read from memory once, forward and backward.
#pragma once

#include <cstdint>
#include <string>

#include "floats.h"

namespace flexlam {

struct LossArgs {
    const void* logits;          // [rows, codes], rows `stride` elements apart
    const std::int64_t* target;  // [rows], each in [0, codes) or `ignored`
    float* kept;                 // [rows, 2]: largest logit, sum of exponentials relative to it; backward reads it
    std::int64_t rows, codes, stride, ignored;
    Float type;
};

// What one piece of the rows leaves.
struct LossPart {
    double sum;
    std::int64_t count;
};

// Rows of one piece of work, whatever the number of threads: the mean is the sum of the pieces' in order.
constexpr std::int64_t loss_piece = 16;

// Returns the sum of the losses of the rows that count, and their number.
LossPart loss_forward(const LossArgs& args, int threads, const std::string& variant);
// out [rows, codes] of `type`, contiguous: (softmax - one hot) * scale, zeros where the target is ignored.
void loss_backward(const LossArgs& args, float scale, void* out, int threads, const std::string& variant);

}  // namespace flexlam
