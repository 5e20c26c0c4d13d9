// The parts of csrc/rotary.h and csrc/loss.h that threads share out; compiled once per instruction set.
#pragma once

#include "loss.h"
#include "rotary.h"
#include "variants.h"

namespace flexlam {

struct SequenceKernels {
    void (*rotate)(const RotaryForward&, std::int64_t first, std::int64_t last);  // tokens of all batches
    // `sums` [2, dim], which the gradients of the weights are added to
    void (*rotate_back)(const RotaryBackward&, std::int64_t first, std::int64_t last, float* sums);
    LossPart (*loss)(const LossArgs&, std::int64_t first, std::int64_t last);
    void (*loss_back)(const LossArgs&, float scale, void* out, std::int64_t first, std::int64_t last);
};

const SequenceKernels& sequence_kernels(Variant variant);

#define FLEXLAM_DECLARE(name)                  \
    namespace name {                           \
    const SequenceKernels& sequence_kernels(); \
    }
FLEXLAM_DECLARE(portable)
FLEXLAM_DECLARE(avx2)
FLEXLAM_DECLARE(avx512)
#undef FLEXLAM_DECLARE

}  // namespace flexlam
