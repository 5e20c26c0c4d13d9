// The number types that kernels read and write; sums are fp32 inside, whatever the type.
#pragma once

namespace flexlam {

enum class Float : int { f32 = 0, f16 = 1, bf16 = 2 };

}  // namespace flexlam
