#include "rows.h"

#include <algorithm>
#include <vector>

#include "parallel.h"
#include "rows_parts.h"
#include "variants.h"

namespace flexlam {
namespace {

constexpr std::int64_t piece_rows = 128;          // of a sum; 80 tokens of an example are one piece
constexpr std::int64_t least_elements = 1 << 15;  // of a thread: some 10 us, where waking another takes a few

const RowKernels& kernels_of(const std::string& variant) {
    switch (find_variant(variant)) {
#ifdef FLEXLAM_X86_VARIANTS
        case Variant::avx512_bf16: return avx512_bf16::row_kernels();
        case Variant::avx512: return avx512::row_kernels();
        case Variant::avx2: return avx2::row_kernels();
#endif
        default: return portable::row_kernels();
    }
}

int useful(std::int64_t elements, int threads) {
    return static_cast<int>(std::clamp<std::int64_t>(elements / least_elements, 1, std::max(threads, 1)));
}

// Calls `body(group, piece, first, last)` for all rows of all groups, in pieces that depend on `count` alone.
template <class Body>
void each_piece(const Extent& e, int threads, Body&& body) {
    const std::int64_t pieces = (e.count + piece_rows - 1) / piece_rows;
    parallel_for(e.groups * pieces, useful(e.groups * e.count * e.width, threads), [&](std::int64_t i) {
        const std::int64_t group = i / pieces, piece = i % pieces;
        body(group, piece, piece * e.count / pieces, (piece + 1) * e.count / pieces);
    });
}

// The same with room for `sums` rows of each piece, which are then joined into the groups' rows of `outs`.
template <class Body>
void sum_pieces(const RowKernels& kernels, const Extent& e, const Rows* outs, std::int64_t sums, int threads, Body&& body) {
    const std::int64_t pieces = (e.count + piece_rows - 1) / piece_rows, stride = sums * whole(e.width);
    thread_local std::vector<float> kept;
    kept.resize(std::max(kept.size(), static_cast<std::size_t>(e.groups * pieces * stride)));
    float* room = kept.data();  // the caller's, whichever thread looks
    each_piece(e, threads, [&](std::int64_t group, std::int64_t piece, std::int64_t first, std::int64_t last) {
        body(group, first, last, room + (group * pieces + piece) * stride);
    });
    parallel_for(e.groups, useful(e.groups * pieces * stride, threads), [&](std::int64_t group) {
        for (std::int64_t s = 0; s < sums; ++s)
            if (outs[s].data)
                kernels.join(outs[s], group, room + group * pieces * stride + s * whole(e.width), pieces, stride, e.width);
    });
}

void each_row(const MapArgs& a, int threads, void (*kernel)(const MapArgs&, std::int64_t)) {
    parallel_for(a.rows, useful(a.rows * a.width, threads), [&](std::int64_t row) { kernel(a, row); });
}

}  // namespace

void row_norm(const NormArgs& a, int threads, const std::string& variant) {
    const RowKernels& kernels = kernels_of(variant);
    each_piece(a.extent, threads, [&](std::int64_t group, std::int64_t, std::int64_t first, std::int64_t last) {
        kernels.norm(a, group, first, last);
    });
}

void row_norm_backward(const NormGradArgs& a, int threads, const std::string& variant) {
    const RowKernels& kernels = kernels_of(variant);
    const Rows outs[] = {a.dscale, a.dshift};
    sum_pieces(kernels, a.extent, outs, 2, threads,
               [&](std::int64_t group, std::int64_t first, std::int64_t last, float* sums) {
                   kernels.norm_grad(a, group, first, last, sums);
               });
}

void gate_add(const GateArgs& a, int threads, const std::string& variant) {
    const RowKernels& kernels = kernels_of(variant);
    each_piece(a.extent, threads, [&](std::int64_t group, std::int64_t, std::int64_t first, std::int64_t last) {
        kernels.gate(a, group, first, last);
    });
}

void gate_add_backward(const GateGradArgs& a, int threads, const std::string& variant) {
    const RowKernels& kernels = kernels_of(variant);
    sum_pieces(kernels, a.extent, &a.dgate, 1, threads,
               [&](std::int64_t group, std::int64_t first, std::int64_t last, float* sums) {
                   kernels.gate_grad(a, group, first, last, sums);
               });
}

void gelu(const MapArgs& a, int threads, const std::string& variant) {
    each_row(a, threads, kernels_of(variant).gelu);
}

void swiglu(const MapArgs& a, int threads, const std::string& variant) {
    each_row(a, threads, kernels_of(variant).swiglu);
}

}  // namespace flexlam
