// Attention of many tokens over pages by AMX, for calls of their own; csrc/append_amx.cpp has it between products.
#include "prefill.h"

#ifdef FLEXLAM_X86_VARIANTS
#define FLEXLAM_VARIANT amx
#define FLEXLAM_LANES 16
#include <immintrin.h>

#include "parallel.h"
#include "vectors.inl"

#include "tiles.h"
#include "tiles_attend.h"

namespace flexlam {
namespace {

using namespace amx;

// Queries of one key head's group as packed tiles [heads, blocks, dim / 32].
void pack_queries(const AttendArgs& a, std::int64_t session, std::int64_t key_head, std::uint32_t* to) {
    const auto* q = static_cast<const std::uint16_t*>(a.q);
    const std::int64_t group = a.heads / a.kv_heads;
    for (std::int64_t h = 0; h < group; ++h)
        for (std::int64_t first = 0; first < a.tokens; first += side)
            for (std::int64_t d = 0; d < a.dim; d += pairs, to += words) {
                std::uint16_t some[side * pairs] = {};
                for (std::int64_t n = first; n < std::min(first + side, a.tokens); ++n) {
                    const std::int64_t at = ((session * a.tokens + n) * a.heads + key_head * group + h) * a.dim + d;
                    std::copy_n(q + at, pairs, some + (n - first) * pairs);
                }
                transpose(some, 64, to);
            }
}

}  // namespace

void tiles_attend(const AttendArgs& a, int threads) {
    parallel_for(a.batch * a.kv_heads, threads, [&](std::int64_t task) {
        const Tiles configured;
        const std::int64_t session = task / a.kv_heads, blocks = (a.tokens + side - 1) / side;
        thread_local std::vector<std::uint32_t> queries;
        queries.resize(static_cast<std::size_t>(a.heads / a.kv_heads * blocks * (a.dim / pairs) * words));
        pack_queries(a, session, task % a.kv_heads, queries.data());
        Head(a, session, task % a.kv_heads, queries.data()).run([&](std::int64_t head, std::int64_t block, float* rows) {
            auto* out = static_cast<std::uint16_t*>(a.out) + (session * a.tokens * a.heads + head) * a.dim;
            float tile[words];
            for (std::int64_t d = 0; d < a.dim; d += side) {
                transpose(rows + d * side, 64, tile);
                for (std::int64_t n = block * side; n < std::min((block + 1) * side, a.tokens); ++n)
                    store(out + n * a.heads * a.dim + d, to_bf16(load<vf>(tile + n % side * side)));
            }
        });
    });
}

}  // namespace flexlam

#else

namespace flexlam {

void tiles_attend(const AttendArgs&, int) {}

}  // namespace flexlam

#endif
