// Cuts the work of csrc/rotary.h and csrc/loss.h into pieces that depend on sizes alone, and adds in their order.
#include <algorithm>
#include <vector>

#include "parallel.h"
#include "sequence_parts.h"

namespace flexlam {
namespace {

constexpr std::int64_t least_elements = 1 << 14;  // of a thread: 10 us or so, where waking another takes a few

const SequenceKernels& kernels_of(const std::string& name) {
    switch (find_variant(name)) {
#ifdef FLEXLAM_X86_VARIANTS
        case Variant::avx512_bf16:
        case Variant::avx512: return avx512::sequence_kernels();
        case Variant::avx2: return avx2::sequence_kernels();
#endif
        default: return portable::sequence_kernels();
    }
}

// Calls `body(piece, first, last)` for every piece of `count` items of `elements` numbers each.
template <class Body>
void each_piece(std::int64_t count, std::int64_t piece, std::int64_t elements, int threads, const Body& body) {
    const std::int64_t most = std::max<std::int64_t>(1, count * elements / least_elements);
    parallel_for((count + piece - 1) / piece, static_cast<int>(std::min<std::int64_t>(std::max(threads, 1), most)),
                 [&](std::int64_t i) { body(i, i * piece, std::min(count, (i + 1) * piece)); });
}

std::int64_t elements_of(const RotaryArgs& a) { return (a.x[0].heads + a.x[1].heads) * a.dim; }

}  // namespace

void rotary_forward(const RotaryForward& f, int threads, const std::string& variant) {
    const SequenceKernels& kernels = kernels_of(variant);
    each_piece(f.shared.batch * f.shared.tokens, rotary_piece, elements_of(f.shared), threads,
               [&](std::int64_t, std::int64_t first, std::int64_t last) { kernels.rotate(f, first, last); });
}

void rotary_backward(const RotaryBackward& b, int threads, const std::string& variant) {
    const SequenceKernels& kernels = kernels_of(variant);
    const std::int64_t lines = b.shared.batch * b.shared.tokens, dim = b.shared.dim;
    const std::int64_t pieces = (lines + rotary_piece - 1) / rotary_piece;
    std::vector<float> sums(static_cast<std::size_t>(pieces * 2 * dim), 0.0f);
    each_piece(lines, rotary_piece, elements_of(b.shared), threads,
               [&](std::int64_t i, std::int64_t first, std::int64_t last) {
                   kernels.rotate_back(b, first, last, &sums[static_cast<std::size_t>(i * 2 * dim)]);
               });
    for (int which = 0; which < 2; ++which)
        for (std::int64_t c = 0; c < dim; ++c) {
            double sum = 0.0;
            for (std::int64_t i = 0; i < pieces; ++i) sum += sums[static_cast<std::size_t>((2 * i + which) * dim + c)];
            b.grad_weight[which][c] = static_cast<float>(sum);
        }
}

LossPart loss_forward(const LossArgs& a, int threads, const std::string& variant) {
    const SequenceKernels& kernels = kernels_of(variant);
    std::vector<LossPart> parts(static_cast<std::size_t>((a.rows + loss_piece - 1) / loss_piece));
    each_piece(a.rows, loss_piece, a.codes, threads, [&](std::int64_t i, std::int64_t first, std::int64_t last) {
        parts[static_cast<std::size_t>(i)] = kernels.loss(a, first, last);
    });
    LossPart all{0.0, 0};
    for (const LossPart& part : parts) all.sum += part.sum, all.count += part.count;
    return all;
}

void loss_backward(const LossArgs& a, float scale, void* out, int threads, const std::string& variant) {
    const SequenceKernels& kernels = kernels_of(variant);
    each_piece(a.rows, loss_piece, a.codes, threads, [&](std::int64_t, std::int64_t first, std::int64_t last) {
        kernels.loss_back(a, scale, out, first, last);
    });
}

}  // namespace flexlam
