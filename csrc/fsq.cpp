#include "fsq.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>

#include "parallel.h"
#include "variants.h"

namespace flexlam {

#define FLEXLAM_DECLARE(name)                                                                                         \
    namespace name {                                                                                                  \
    void forward(const LevelPattern&, const ForwardArgs&, std::int64_t first, std::int64_t last);                     \
    void backward(const LevelPattern&, const BackwardArgs&, std::int64_t first, std::int64_t last, double* null);     \
    }
FLEXLAM_DECLARE(portable)
#ifdef FLEXLAM_X86_VARIANTS
FLEXLAM_DECLARE(avx2)
FLEXLAM_DECLARE(avx512)
#endif

namespace {

constexpr std::int64_t chunk_elements = 8192;  // 32 KB of fp32 in, as much out: fits the second-level cache
constexpr std::int64_t small_codebook = 16384;

struct Kernels {
    decltype(&portable::forward) forward;
    decltype(&portable::backward) backward;
};

Kernels kernels_of(const std::string& name) {
    switch (find_variant(name)) {
#ifdef FLEXLAM_X86_VARIANTS
        case Variant::avx512_bf16:
        case Variant::avx512: return {avx512::forward, avx512::backward};
        case Variant::avx2: return {avx2::forward, avx2::backward};
#endif
        default: return {portable::forward, portable::backward};
    }
}

template <class Body>
void each_chunk(std::int64_t tokens, std::int64_t slots, int dim, int threads, const Body& body) {
    const std::int64_t size = chunk_tokens(slots, dim);
    const std::int64_t chunks = (tokens + size - 1) / size;
    parallel_for(chunks, threads, [&](std::int64_t i) { body(i, i * size, std::min(tokens, (i + 1) * size)); });
}

// Digits of a code as the reference forms them: floor division and a remainder that is never negative.
void values_of(const LevelPattern& p, std::int64_t code, float* out) {
    for (int c = 0; c < p.dim; ++c) {
        std::int64_t q = code / p.basis[c];
        if (q * p.basis[c] > code) --q;
        const std::int64_t n = p.levels[c], digit = ((q % n) + n) % n;
        out[c] = static_cast<float>(digit - n / 2) / static_cast<float>(n / 2);
    }
}

}  // namespace

LevelPattern::LevelPattern(std::vector<int> counts, const std::vector<float>& thresholds,
                           const std::vector<float>& half, const std::vector<float>& shifts)
    : dim(static_cast<int>(counts.size())), levels(std::move(counts)) {
    if (dim < 1 || dim > 8) throw std::invalid_argument("levels: expected 1..8 channels, got " + std::to_string(dim));
    steps = *std::max_element(levels.begin(), levels.end()) - 1;
    const auto d = static_cast<std::size_t>(dim);
    if (thresholds.size() != d * static_cast<std::size_t>(steps) || half.size() != d || shifts.size() != d)
        throw std::invalid_argument("levels: expected thresholds [max - 1, d], half [d] and shift [d]");
    for (const int n : levels) {
        if (n < 2 || codebook * n > std::numeric_limits<std::int32_t>::max())
            throw std::invalid_argument("levels: expected integers of at least 2 and a codebook below 2^31");
        basis.push_back(codebook);
        codebook *= n;
    }
    for (int j = 0; j < steps; ++j)
        for (int i = 0; i < lanes * dim; ++i) threshold.push_back(thresholds[static_cast<std::size_t>(j) * d + i % dim]);
    for (int i = 0; i < lanes * dim; ++i) {
        const int c = i % dim;
        const double inverse = 1.0 / (levels[c] / 2);
        int exponent = 0;
        const double mantissa = std::frexp(inverse, &exponent);
        half_width.push_back(static_cast<float>(levels[c] / 2));
        inverse_high.push_back(static_cast<float>(std::ldexp(std::floor(std::ldexp(mantissa, 16)), exponent - 16)));
        inverse_low.push_back(static_cast<float>(inverse - static_cast<double>(inverse_high.back())));
        weight.push_back(static_cast<int>(basis[c]));
        shift.push_back(shifts[c]);
        gain.push_back(half[c] / static_cast<float>(levels[c] / 2));
    }
    if (codebook > small_codebook) return;
    values.resize(static_cast<std::size_t>(codebook) * d);
    for (std::int64_t code = 0; code < codebook; ++code) values_of(*this, code, &values[code * d]);
}

std::int64_t chunk_tokens(std::int64_t slots, int dim) {
    const std::int64_t blocks = chunk_elements / (slots * dim);
    return slots * std::max<std::int64_t>(1, blocks);
}

void fsq_forward(const LevelPattern& p, const ForwardArgs& a, int threads, const std::string& variant) {
    const Kernels v = kernels_of(variant);
    each_chunk(a.tokens, a.prefix.slots, p.dim, threads,
               [&](std::int64_t, std::int64_t first, std::int64_t last) { v.forward(p, a, first, last); });
}

void fsq_backward(const LevelPattern& p, const BackwardArgs& a, int threads, const std::string& variant) {
    const Kernels v = kernels_of(variant);
    each_chunk(a.tokens, a.prefix.slots, p.dim, threads, [&](std::int64_t i, std::int64_t first, std::int64_t last) {
        v.backward(p, a, first, last, a.grad_null ? a.grad_null + i * p.dim : nullptr);
    });
}

void codes_to_latents(const LevelPattern& p, const LookupArgs& a, int threads) {
    const Prefix& prefix = a.prefix;
    each_chunk(a.tokens, prefix.slots, p.dim, threads, [&](std::int64_t, std::int64_t first, std::int64_t last) {
        for (std::int64_t t = first; t < last; ++t) {
            float* out = a.latents + t * p.dim;
            if (prefix.keep && t % prefix.slots >= prefix.keep[t / prefix.slots]) {
                std::copy_n(prefix.null, p.dim, out);
            } else if (!p.values.empty() && a.codes[t] >= 0 && a.codes[t] < p.codebook) {
                std::copy_n(&p.values[static_cast<std::size_t>(a.codes[t]) * p.dim], p.dim, out);
            } else {
                values_of(p, a.codes[t], out);
            }
        }
    });
}

void sample_prefix(std::uint64_t seed, std::uint64_t offset, const std::int64_t* edges, std::int64_t slots,
                   std::int32_t* keep, std::int64_t blocks) {
    for (std::int64_t b = 0; b < blocks; ++b) {
        const std::uint64_t at = offset + static_cast<std::uint64_t>(b);
        std::uint32_t c[4] = {static_cast<std::uint32_t>(at), static_cast<std::uint32_t>(at >> 32), 0, 0};
        std::uint32_t k0 = static_cast<std::uint32_t>(seed), k1 = static_cast<std::uint32_t>(seed >> 32);
        for (int round = 0; round < 10; ++round) {
            const std::uint64_t p0 = 0xD2511F53ull * c[0], p1 = 0xCD9E8D57ull * c[2];
            const std::uint32_t c0 = static_cast<std::uint32_t>(p1 >> 32) ^ c[1] ^ k0;
            const std::uint32_t c2 = static_cast<std::uint32_t>(p0 >> 32) ^ c[3] ^ k1;
            c[1] = static_cast<std::uint32_t>(p1), c[3] = static_cast<std::uint32_t>(p0);
            c[0] = c0, c[2] = c2;
            k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
        }
        keep[b] = static_cast<std::int32_t>(std::upper_bound(edges, edges + slots, std::int64_t{c[0]}) - edges);
    }
}

}  // namespace flexlam
