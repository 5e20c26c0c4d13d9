#include "engine.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "engine_worker.h"

namespace flexlam {
namespace {

// The first NaN, or the largest; of equals the first.
std::int64_t largest_of(const float* x, std::int64_t n) {
    std::int64_t best = 0;
    for (std::int64_t i = 0; i < n && x[best] == x[best]; ++i)
        if (x[i] > x[best] || x[i] != x[i]) best = i;
    return best;
}

}  // namespace

std::int32_t choose_code(const float* logits, const float* noise, std::int64_t codes, float inverse, std::int64_t top_k,
                         float* scratch) {
    const std::int64_t best = largest_of(logits, codes);
    const float top = logits[best];
    if (!noise || top != top) return static_cast<std::int32_t>(best);
    float floor = -std::numeric_limits<float>::infinity();
    if (0 < top_k && top_k < codes) {
        std::copy_n(logits, codes, scratch);
        std::nth_element(scratch, scratch + top_k - 1, scratch + codes, std::greater<float>());
        floor = scratch[top_k - 1];
    }
    for (std::int64_t i = 0; i < codes; ++i) {
        const float scaled = logits[i] == top ? 0.0f : (logits[i] - top) * inverse;
        scratch[i] = logits[i] < floor ? -std::numeric_limits<float>::infinity() : scaled + noise[i];
    }
    return static_cast<std::int32_t>(largest_of(scratch, codes));
}

float* SequenceEngine::room(std::int64_t floats) {
    const std::size_t needed = static_cast<std::size_t>(floats) + 16;
    if (kept_.size() < needed) kept_.resize(needed);
    return reinterpret_cast<float*>((reinterpret_cast<std::uintptr_t>(kept_.data()) + 63) / 64 * 64);
}

void SequenceEngine::generate(const BlockArgs& block, int threads, const std::string& variant) {
    const std::lock_guard<std::mutex> alone(busy_);
    const Variant chosen = find_variant(variant);
    const Shared shared(shape_, block, threads, room(Shared(shape_, block, threads, nullptr).total));
    Barrier barrier;
    parallel_region(threads, [&](int rank, int count) {
        Worker(shape_, weights_, block, shared, chosen, rank, count, barrier, frequency_).run();
    });
}

}  // namespace flexlam
