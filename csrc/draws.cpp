#include "draws.h"

#include <algorithm>

#include "parallel.h"
#include "variants.h"

namespace flexlam {

#define FLEXLAM_DECLARE(name)                                                                              \
    namespace name {                                                                                       \
    void draw_normal(const DrawArgs&, std::int64_t row, std::int64_t first, std::int64_t last);            \
    }
FLEXLAM_DECLARE(portable)
#ifdef FLEXLAM_X86_VARIANTS
FLEXLAM_DECLARE(avx2)
FLEXLAM_DECLARE(avx512)
#endif

namespace {

constexpr std::int64_t chunk_numbers = 16384;  // some 15 us; whole vectors of blocks at any width

decltype(&portable::draw_normal) kernel_of(const std::string& name) {
    switch (find_variant(name)) {
#ifdef FLEXLAM_X86_VARIANTS
        case Variant::avx512_bf16:
        case Variant::avx512: return avx512::draw_normal;
        case Variant::avx2: return avx2::draw_normal;
#endif
        default: return portable::draw_normal;
    }
}

}  // namespace

void draw_normal(const DrawArgs& a, int threads, const std::string& variant) {
    const auto kernel = kernel_of(variant);
    const std::int64_t chunks = (a.count + chunk_numbers - 1) / chunk_numbers;
    parallel_for(a.rows * chunks, threads, [&](std::int64_t i) {
        const std::int64_t first = i % chunks * chunk_numbers;
        kernel(a, i / chunks, first, std::min(a.count, first + chunk_numbers));
    });
}

void draw_words(std::uint64_t key, std::uint64_t step, const std::int64_t* streams, std::int64_t* words, std::int64_t rows) {
    for (std::int64_t b = 0; b < rows; ++b) {
        const auto stream = static_cast<std::uint64_t>(streams[b]);
        const auto second = static_cast<std::uint32_t>((step & 0x7fffffffu) + 0x80000000u);
        std::uint32_t c[4] = {0xffffffffu, second, static_cast<std::uint32_t>(stream),
                              static_cast<std::uint32_t>(stream >> 32)};
        auto k0 = static_cast<std::uint32_t>(key), k1 = static_cast<std::uint32_t>(key >> 32);
        for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
            const std::uint64_t p0 = 0xD2511F53ull * c[0], p1 = 0xCD9E8D57ull * c[2];
            const std::uint32_t c0 = static_cast<std::uint32_t>(p1 >> 32) ^ c[1] ^ k0;
            const std::uint32_t c2 = static_cast<std::uint32_t>(p0 >> 32) ^ c[3] ^ k1;
            c[1] = static_cast<std::uint32_t>(p1), c[3] = static_cast<std::uint32_t>(p0);
            c[0] = c0, c[2] = c2;
        }
        words[b] = c[0];
    }
}

}  // namespace flexlam
