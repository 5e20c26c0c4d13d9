#include "decode.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "decode_parts.h"
#include "parallel.h"
#include "variants.h"

namespace flexlam {
namespace {

constexpr std::int64_t split_tokens = 256;       // 512 KB of keys and values of 4 heads of 64 in fp32
constexpr std::int64_t least_products = 1 << 15;  // of a thread: 8 us, where waking another takes a few
constexpr std::int64_t least_elements = 1 << 14;  // of keys that a thread reads

const DecodeKernels& kernels_of(Float type, const std::string& name) {
    switch (find_variant(name)) {
#ifdef FLEXLAM_X86_VARIANTS
        case Variant::avx512: return avx512::decode_kernels(type);
        case Variant::avx2: return avx2::decode_kernels(type);
#endif
        default: return portable::decode_kernels(type);
    }
}

int useful(std::int64_t work, std::int64_t least, int threads) {
    return static_cast<int>(std::clamp<std::int64_t>(work / least, 1, std::max(threads, 1)));
}

// Room that a thread keeps from call to call.
float* room(std::vector<float>& kept, std::int64_t elements) {
    if (kept.size() < static_cast<std::size_t>(elements)) kept.resize(static_cast<std::size_t>(elements));
    return kept.data();
}

}  // namespace

std::int64_t split_entries(const AttendArgs& a) { return std::max<std::int64_t>(1, split_tokens / a.page); }

void linear(const LinearArgs& a, int threads, const std::string& variant) {
    const DecodeKernels& kernels = kernels_of(a.type, variant);
    thread_local std::vector<float> kept;
    float* y = room(kept, a.rows * padded(a.inner));
    kernels.rows(a, y);
    const std::int64_t blocks = padded(a.outs) / widest_vector;
    const std::int64_t chunks = std::min<std::int64_t>(
        blocks, useful(a.rows * a.outs * a.inner * (a.gated ? 2 : 1), least_products, threads));
    parallel_for(chunks, threads, [&](std::int64_t i) {
        kernels.outs(a, y, i * blocks / chunks * widest_vector,
                     std::min(a.outs, (i + 1) * blocks / chunks * widest_vector));
    });
}

void page_write(const WriteArgs& a, int threads, const std::string& variant) {
    const DecodeKernels& kernels = kernels_of(a.type, variant);
    std::vector<double> frequency(static_cast<std::size_t>(a.dim / 2));
    for (std::size_t i = 0; i < frequency.size(); ++i)
        frequency[i] = std::pow(a.theta, -2.0 * static_cast<double>(i) / static_cast<double>(a.dim));
    const int used = useful(a.tokens * (a.heads + 2 * a.kv_heads) * a.dim, least_elements, threads);
    parallel_for(a.tokens, used, [&](std::int64_t token) { kernels.write(a, frequency.data(), token); });
}

void page_attend(const AttendArgs& a, int threads, const std::string& variant) {
    const DecodeKernels& kernels = kernels_of(a.type, variant);
    const std::int64_t queries = a.batch * a.tokens, entries = split_entries(a);
    const std::int64_t splits = (a.entries + entries - 1) / entries, width = padded(a.dim) + widest_vector;
    thread_local std::vector<float> kept;
    const Parts parts{entries, splits, width, room(kept, queries * splits * a.heads * width)};
    const int used = useful(queries * a.entries * a.page * a.kv_heads * a.dim, least_elements, threads);
    parallel_for(queries * splits, used,
                 [&](std::int64_t i) { kernels.part(a, parts, i / splits, i % splits); });
    parallel_for(queries, queries > 8 ? used : 1, [&](std::int64_t i) { kernels.join(a, parts, i); });
}

}  // namespace flexlam
