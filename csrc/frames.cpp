#include "frames.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "parallel.h"
#include "variants.h"

namespace flexlam {

#define FLEXLAM_DECLARE(name)                                                                                          \
    namespace name {                                                                                                   \
    void make_patches(const PatchArgs&, std::int64_t sample);                                                          \
    double flow_loss(const FlowLossArgs&, std::int64_t sample);                                                            \
    void scale_error(const void*, void*, std::int64_t first, std::int64_t last, float scale, Float type);              \
    }
FLEXLAM_DECLARE(portable)
#ifdef FLEXLAM_X86_VARIANTS
FLEXLAM_DECLARE(avx2)
FLEXLAM_DECLARE(avx512)
#endif

namespace {

constexpr std::int64_t chunk_elements = 65536;

struct Kernels {
    decltype(&portable::make_patches) patches;
    decltype(&portable::flow_loss) loss;
    decltype(&portable::scale_error) scale;
};

Kernels kernels_of(const std::string& name) {
    switch (find_variant(name)) {
#ifdef FLEXLAM_X86_VARIANTS
        case Variant::avx512_bf16:
        case Variant::avx512: return {avx512::make_patches, avx512::flow_loss, avx512::scale_error};
        case Variant::avx2: return {avx2::make_patches, avx2::flow_loss, avx2::scale_error};
#endif
        default: return {portable::make_patches, portable::flow_loss, portable::scale_error};
    }
}

}  // namespace

void make_patches(const PatchArgs& a, int threads, const std::string& variant) {
    const auto kernel = kernels_of(variant).patches;
    parallel_for(a.shape.batch, threads, [&](std::int64_t sample) { kernel(a, sample); });
}

double flow_loss(const FlowLossArgs& a, int threads, const std::string& variant) {
    const auto kernel = kernels_of(variant).loss;
    std::vector<double> sums(static_cast<std::size_t>(a.shape.batch));
    parallel_for(a.shape.batch, threads,
                 [&](std::int64_t sample) { sums[static_cast<std::size_t>(sample)] = kernel(a, sample); });
    return std::accumulate(sums.begin(), sums.end(), 0.0);
}

void scale_error(const void* error, void* out, std::int64_t count, float scale, Float type, int threads,
                 const std::string& variant) {
    const auto kernel = kernels_of(variant).scale;
    parallel_for((count + chunk_elements - 1) / chunk_elements, threads, [&](std::int64_t i) {
        kernel(error, out, i * chunk_elements, std::min(count, (i + 1) * chunk_elements), scale, type);
    });
}

}  // namespace flexlam
