// Gradients of a linear layer's weight and bias, for training on a CPU with matrix tiles. Sums run over all rows in fp32 and
// leave in fp32, so that nothing is rounded on the way to the optimiser.
#pragma once

#include <cstdint>

namespace flexlam {

struct LinearGrads {
    const void *grad, *x;            // bf16 [rows, outer] and [rows, inner]; numbers of a row are neighbours
    std::int64_t grad_row, x_row;    // elements from a row to the next
    float *weight, *bias;            // written: [outer, inner] and [outer]; no bias: nullptr
    std::int64_t rows, outer, inner;
};

// Whether linear_gradients takes such widths: whole 32s, on a processor with tiles.
bool takes_linear(std::int64_t outer, std::int64_t inner);

// The same bits from any number of threads.
void linear_gradients(const LinearGrads& args, int threads);

}  // namespace flexlam
