// What many tokens at once need beside matrix products, on the CPU: norms, SwiGLU, and attention by the processor's tiles.
#pragma once

#include "decode.h"

namespace flexlam {

// out[r] = the root mean square norm of x[r] times `weight`; all [rows, width] or [width], contiguous, of one type.
void norm_rows(const void* x, const void* weight, void* out, std::int64_t rows, std::int64_t width, Float type, float eps,
               int threads, const std::string& variant);

// out[r] = silu(x[r, :inner]) * x[r, inner:], of x [rows, 2 inner].
void swiglu_rows(const void* x, void* out, std::int64_t rows, std::int64_t inner, Float type, int threads,
                 const std::string& variant);

// Whether this processor has tiles for bf16 (AMX) and the operating system lets this process use them.
bool has_tiles();

// Whether tiles_attend takes such arguments: bf16 throughout, heads of 32, 64, 96 or 128, pages of whole 16s.
bool takes_tiles(const AttendArgs& args);

// As page_attend, for many tokens; has_tiles() and takes_tiles() have said yes. Weights are rounded to bf16.
void tiles_attend(const AttendArgs& args, int threads);

}  // namespace flexlam
