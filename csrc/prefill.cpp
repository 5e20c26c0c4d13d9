#include "prefill.h"

#include "decode_parts.h"
#include "parallel.h"
#include "variants.h"

namespace flexlam {
namespace {

constexpr std::int64_t rows_of_a_chunk = 8;

// Calls `body(first, last)` for chunks of rows.
template <class Body>
void each_rows(std::int64_t rows, std::int64_t width, int threads, const Body& body) {
    if (rows * width < 1 << 14) threads = 1;
    const std::int64_t chunks = (rows + rows_of_a_chunk - 1) / rows_of_a_chunk;
    parallel_for(chunks, threads, [&](std::int64_t i) {
        body(i * rows_of_a_chunk, i + 1 == chunks ? rows : (i + 1) * rows_of_a_chunk);
    });
}

}  // namespace

void norm_rows(const void* x, const void* weight, void* out, std::int64_t rows, std::int64_t width, Float type, float eps,
               int threads, const std::string& variant) {
    const DecodeKernels& kernels = decode_kernels(find_variant(variant), type);
    each_rows(rows, width, threads, [&](std::int64_t first, std::int64_t last) {
        for (std::int64_t r = first; r < last; ++r) kernels.norm(x, r, weight, width, eps, out);
    });
}

void swiglu_rows(const void* x, void* out, std::int64_t rows, std::int64_t inner, Float type, int threads,
                 const std::string& variant) {
    const DecodeKernels& kernels = decode_kernels(find_variant(variant), type);
    each_rows(rows, inner, threads, [&](std::int64_t first, std::int64_t last) {
        for (std::int64_t r = first; r < last; ++r) kernels.swiglu(x, r, inner, out);
    });
}

}  // namespace flexlam
