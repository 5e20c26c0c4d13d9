// FSQ with retained prefix and null fill on a GPU: one launch forward, one backward, 16 bytes a load and store.
#pragma once

#include <cstdint>

#include "fsq.h"

namespace flexlam {

// Levels a channel may have here: all thresholds travel as kernel parameters.
constexpr int cuda_max_levels = 64;

// Constants of one level set as the kernels take them, [channel][...].
struct CudaLevels {
    int dim;
    int levels[8];
    int weight[8];
    float shift[8];
    float gain[8];
    float threshold[8][cuda_max_levels - 1];
};

CudaLevels cuda_levels(const LevelPattern& pattern);

// Number of partial sums of the null's gradient that fsq_backward_cuda writes, each [d] fp32.
int cuda_partials();

// As ForwardArgs and BackwardArgs, with device pointers, on `stream` of the current device; grad_null is fp32
// [cuda_partials(), d] or nullptr. Throw std::runtime_error with CUDA's words when a launch is refused.
void fsq_forward_cuda(const CudaLevels& levels, const ForwardArgs& args, void* stream);
void fsq_backward_cuda(const CudaLevels& levels, const BackwardArgs& args, float* grad_null, void* stream);

}  // namespace flexlam
