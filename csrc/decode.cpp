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

int useful(std::int64_t work, std::int64_t least, int threads) {
    return static_cast<int>(std::clamp<std::int64_t>(work / least, 1, std::max(threads, 1)));
}

// Room that a thread keeps from call to call.
float* room(std::vector<float>& kept, std::int64_t elements) {
    if (kept.size() < static_cast<std::size_t>(elements)) kept.resize(static_cast<std::size_t>(elements));
    return kept.data();
}

}  // namespace

const DecodeKernels& decode_kernels(Variant variant, Float type) {
    switch (variant) {
#ifdef FLEXLAM_X86_VARIANTS
        case Variant::avx512_bf16: return avx512_bf16::decode_kernels(type);
        case Variant::avx512: return avx512::decode_kernels(type);
        case Variant::avx2: return avx2::decode_kernels(type);
#endif
        default: return portable::decode_kernels(type);
    }
}

std::vector<double> frequencies(double theta, std::int64_t dim) {
    std::vector<double> out(static_cast<std::size_t>(dim / 2));
    for (std::size_t i = 0; i < out.size(); ++i)
        out[i] = std::pow(theta, -2.0 * static_cast<double>(i) / static_cast<double>(dim));
    return out;
}

void angles_at(std::int64_t position, const std::vector<double>& frequency, float* cosine, float* sine) {
    for (std::size_t i = 0; i < frequency.size(); ++i) {
        const double angle = static_cast<double>(position) * frequency[i];
        cosine[i] = static_cast<float>(std::cos(angle)), sine[i] = static_cast<float>(std::sin(angle));
    }
}

std::int64_t split_entries(const AttendArgs& a) { return std::max<std::int64_t>(1, split_tokens / a.page); }

void linear(const LinearArgs& a, int threads, const std::string& variant) {
    const DecodeKernels& kernels = decode_kernels(find_variant(variant), a.type);
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

void page_write(WriteArgs a, const std::int64_t* positions, double theta, int threads, const std::string& variant) {
    const DecodeKernels& kernels = decode_kernels(find_variant(variant), a.type);
    const std::vector<double> frequency = frequencies(theta, a.dim);
    const auto half = static_cast<std::int64_t>(frequency.size());
    thread_local std::vector<float> kept;
    float* angles = room(kept, 2 * a.tokens * half);
    a.cosine = angles, a.sine = angles + a.tokens * half;
    const int used = useful(a.tokens * (a.heads + 2 * a.kv_heads) * a.dim, least_elements, threads);
    parallel_for(a.tokens, used, [&](std::int64_t token) {
        angles_at(positions[token], frequency, angles + token * half, angles + (a.tokens + token) * half);
        kernels.write(a, token, 0, a.heads + a.kv_heads);
    });
}

void page_attend(const AttendArgs& a, int threads, const std::string& variant) {
    const DecodeKernels& kernels = decode_kernels(find_variant(variant), a.type);
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
