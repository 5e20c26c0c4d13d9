// Attention of many tokens by matrix tiles. Scores are formed as keys x queries, values x weights as dims x queries, so that
// a lane is a query throughout. Included after vectors.inl and tiles.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "decode_parts.h"

namespace flexlam {
namespace amx {

constexpr std::int64_t split_tokens = 256;  // of keys, whose scores for 16 queries fill 16 KB
constexpr float infinity = std::numeric_limits<float>::infinity();

inline __m512 intrinsic(vf x) { return (__m512)x; }

// 2^x to 1e-4 of it, where half a unit of bf16's last place is 2e-3; exact at whole numbers, 0 below -150, NaN of NaN.
inline vf power_of_two(vf x) {
    const __m512 y = _mm512_max_ps(_mm512_set1_ps(-150.0f), intrinsic(x));
    const __m512 n = _mm512_roundscale_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const vf f = (vf)_mm512_sub_ps(y, n);
    const vf p = ((0.05500886f * f + 0.24221096f) * f + 0.69328294f) * f + 1.0f;  // least largest relative error
    return (vf)_mm512_scalef_ps(intrinsic(p), n);
}

// One session's attention for the query heads of one key head, over all of its tokens.
class Head {
public:
    // `queries` are packed tiles [heads of the group, blocks of 16 tokens, dim / 32], `blocks` of 16 tokens.
    Head(const AttendArgs& a, std::int64_t session, std::int64_t key_head, const std::uint32_t* queries)
        : a_(a), session_(session), group_(key_head), heads_(a.heads / a.kv_heads), blocks_((a.tokens + side - 1) / side),
          seen_(a.context[session] * a.page), own_(a.start[session]), queries_(queries) {
        thread_local std::vector<float> kept;
        const std::int64_t each = heads_ * blocks_;
        const std::int64_t sizes[] = {each * a.dim * side, 2 * each * side,  split_tokens * side,
                                      split_tokens * a.dim / 2, a.dim * side, 2 * words};
        std::int64_t total = 16;
        for (const std::int64_t size : sizes) total += size;
        if (kept.size() < static_cast<std::size_t>(total)) kept.resize(static_cast<std::size_t>(total));
        float* at = reinterpret_cast<float*>((reinterpret_cast<std::uintptr_t>(kept.data()) + 63) / 64 * 64);
        float** const parts[] = {&sums_, &states_, &scores_, &values_, &added_, &woven_};
        for (std::size_t i = 0; i < std::size(sizes); ++i) *parts[i] = at, at += sizes[i];
    }

    // Calls `give(head, block, rows)` with the attended values [dim][16] of each head of the group and block of tokens.
    template <class Give>
    void run(const Give& give) {
        const std::int64_t each = heads_ * blocks_, all = limit(a_.tokens - 1);
        std::fill_n(sums_, each * a_.dim * side, 0.0f);
        for (std::int64_t i = 0; i < each; ++i) store(largest(i), vf{} - infinity), store(total(i), vf{});
        for (std::int64_t from = 0; from < all; from += split_tokens) {
            pack_values(from, std::min(split_tokens, all - from));
            for (std::int64_t i = 0; i < each; ++i) {
                const std::int64_t count = limit(std::min(a_.tokens, (i % blocks_ + 1) * side) - 1) - from;
                if (count > 0) add_split(i, from, std::min(split_tokens, count));
            }
        }
        for (std::int64_t i = 0; i < each; ++i) {
            const vf sum = load<vf>(total(i)), share = pick<vf>(sum == vf{}, vf{}, 1.0f / sum);
            float* rows = sums_ + i * a_.dim * side;
            for (std::int64_t d = 0; d < a_.dim; ++d) store(rows + d * side, load<vf>(rows + d * side) * share);
            give(group_ * heads_ + i / blocks_, i % blocks_, rows);
        }
    }

private:
    float* largest(std::int64_t i) { return states_ + 2 * i * side; }
    float* total(std::int64_t i) { return states_ + (2 * i + 1) * side; }

    // How many tokens query `n` sees.
    std::int64_t limit(std::int64_t n) const {
        return std::min(seen_ + std::max<std::int64_t>(own_ + n + 1, 0), a_.entries * a_.page);
    }

    // Where in keys and values the token `t` stands, as an element.
    std::int64_t place(std::int64_t t) const {
        const std::int64_t entry = std::min(t / a_.page, a_.entries - 1), page = a_.table[session_ * a_.entries + entry];
        const std::int64_t row = std::clamp<std::int64_t>(page, 0, a_.pages - 1) * a_.page + t % a_.page;
        return (row * a_.kv_heads + group_) * a_.dim;
    }

    // Two tokens' numbers in one word each: 32 numbers of both become two vectors of 16 words.
    static void weave(const std::uint16_t* first, const std::uint16_t* second, float* low, float* high) {
        const __m512i a = _mm512_loadu_si512(first), b = _mm512_loadu_si512(second);
        const __m512i to_low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                                                37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
        const __m512i to_high = _mm512_add_epi16(to_low, _mm512_set1_epi16(16));
        _mm512_storeu_si512(low, _mm512_permutex2var_epi16(a, to_low, b));
        _mm512_storeu_si512(high, _mm512_permutex2var_epi16(a, to_high, b));
    }

    // Values of a split as tiles of 16 dims x 32 tokens; zeros for tokens beyond `count`.
    void pack_values(std::int64_t from, std::int64_t count) {
        static const std::uint16_t nothing[128] = {};
        const auto* v = static_cast<const std::uint16_t*>(a_.v);
        for (std::int64_t t = 0; t < count; t += pairs) {
            const std::uint16_t* rows[pairs];
            for (std::int64_t i = 0; i < pairs; ++i) rows[i] = t + i < count ? v + place(from + t + i) : nothing;
            for (std::int64_t d = 0; d < a_.dim; d += pairs) {
                for (std::int64_t i = 0; i < side; ++i)
                    weave(rows[2 * i] + d, rows[2 * i + 1] + d, woven_ + i * side, woven_ + words + i * side);
                float* to = values_ + (t / pairs * (a_.dim / side) + d / side) * words;
                transpose(woven_, 64, to), transpose(woven_ + words, 64, to + words);
            }
        }
    }

    // Scores of 16 queries for `count` tokens from `from` on, with what a query does not see at minus infinity, and the
    // largest of each query so far.
    void form_scores(std::int64_t i, std::int64_t from, std::int64_t count) {
        const auto* k = static_cast<const std::uint16_t*>(a_.k);
        const std::uint32_t* q = queries_ + i * (a_.dim / pairs) * words;
        const std::int64_t stride = a_.kv_heads * a_.dim * 2, last = from + (count - 1) / side * side;
        settle();
        for (std::int64_t t = 0; t < count; t += 2 * side) {
            // the second half may lie beyond what is seen: any rows will do, for the mask covers them
            const std::uint16_t *first = k + place(from + t), *second = k + place(std::min(from + t + side, last));
            _tile_zero(0);
            _tile_zero(1);
            for (std::int64_t d = 0; d < a_.dim; d += pairs) {
                _tile_loadd(4, q + d / pairs * words, 64);
                _tile_loadd(2, first + d, stride);
                _tile_loadd(3, second + d, stride);
                _tile_dpbf16ps(0, 2, 4);
                _tile_dpbf16ps(1, 3, 4);
            }
            _tile_stored(0, scores_ + t * side, 64);
            _tile_stored(1, scores_ + (t + side) * side, 64);
        }
        settle();
        const std::int64_t block = i % blocks_, whole = std::min(limit(block * side) - from, count);  // seen by all 16
        vi ends;
        for (int n = 0; n < side; ++n)
            ends[n] = static_cast<std::int32_t>(limit(std::min(a_.tokens - 1, block * side + n)) - from);
        vf most = load<vf>(largest(i));
        std::int64_t t = 0;
        for (; t < whole; ++t) most = (vf)_mm512_max_ps(intrinsic(most), intrinsic(load<vf>(scores_ + t * side)));
        for (; t < (count + pairs - 1) / pairs * pairs; ++t) {
            const vf seen = pick<vf>(vi{} + static_cast<std::int32_t>(t) < ends, load<vf>(scores_ + t * side), vf{} - infinity);
            store(scores_ + t * side, seen);
            most = (vf)_mm512_max_ps(intrinsic(most), intrinsic(seen));
        }
        store(largest(i), most);
    }

    void add_split(std::int64_t i, std::int64_t from, std::int64_t count) {
        const vf before = load<vf>(largest(i));
        form_scores(i, from, count);
        const float scale = 1.44269504f / std::sqrt(static_cast<float>(a_.dim));  // for powers of two
        // a query that has seen nothing yet has weights of nothing: any finite reference will do
        vf most = load<vf>(largest(i));
        most = pick<vf>(most == vf{} - infinity, vf{}, most);
        vf sum{};
        const std::int64_t tall = a_.dim / side;
        for (std::int64_t d = 0; d < tall; d += 4) {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            for (std::int64_t t = 0; t < count; t += pairs) {
                if (d == 0) sum += weigh(t, most * scale, scale);
                settle();
                const float* tile = values_ + (t / pairs * tall + d) * words;
                _tile_loadd(4, scores_ + t * side, 64);
                _tile_loadd(5, tile, 64);
                _tile_dpbf16ps(0, 5, 4);
                _tile_loadd(6, tile + words, 64);
                _tile_dpbf16ps(1, 6, 4);
                if (d + 2 >= tall) continue;
                _tile_loadd(5, tile + 2 * words, 64);
                _tile_dpbf16ps(2, 5, 4);
                _tile_loadd(6, tile + 3 * words, 64);
                _tile_dpbf16ps(3, 6, 4);
            }
            float* to = added_ + d * words;
            _tile_stored(0, to, 64);
            _tile_stored(1, to + words, 64);
            if (d + 2 < tall) {
                _tile_stored(2, to + 2 * words, 64);
                _tile_stored(3, to + 3 * words, 64);
            }
        }
        settle();
        const vf factor = power_of_two((before - most) * scale);
        store(total(i), load<vf>(total(i)) * factor + sum);
        float* out = sums_ + i * a_.dim * side;
        for (std::int64_t d = 0; d < a_.dim; ++d)
            store(out + d * side, load<vf>(out + d * side) * factor + load<vf>(added_ + d * side));
    }

    // Weights of 32 tokens take the place of their scores, as a packed tile; returns their sum.
    vf weigh(std::int64_t t, vf most, float scale) {
        vf sum{};
        float* at = scores_ + t * side;
        for (std::int64_t r = 0; r < side; ++r) {
            const vf first = power_of_two(load<vf>(at + 2 * r * side) * scale - most);
            const vf second = power_of_two(load<vf>(at + (2 * r + 1) * side) * scale - most);
            sum += first + second;
            _mm512_storeu_si512(at + r * side, pack(intrinsic(first), intrinsic(second)));
        }
        return sum;
    }

    const AttendArgs& a_;
    const std::int64_t session_, group_, heads_, blocks_, seen_, own_;
    const std::uint32_t* queries_;
    float *sums_, *states_, *scores_, *values_, *added_, *woven_;
};

}  // namespace amx
}  // namespace flexlam
