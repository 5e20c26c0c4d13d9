// What the forward and the backward of csrc/attention_train.h by AMX (tiles.h) share. Included after <immintrin.h> and
// vectors.inl. Scores stand as keys x queries, one query a lane; weights and slopes are rounded to bf16, as the products of
// the reference take them.
#pragma once

#include <algorithm>

#include "attention_train_parts.h"
#include "tiles.h"
#include "tiles_attend.h"

namespace flexlam {
namespace amx {

// The two halves of csrc/attention_train_amx.cpp.
std::int64_t self_backward_room(const SelfArgs& args);
void self_backward(const SelfArgs& args, const SelfGrads& grads, const Visible& visible, std::int64_t session,
                   std::int64_t key_head, float* room);

namespace {

constexpr float log2e = 1.44269504f, ln2 = 0.69314718f;

using Half = std::uint16_t;

// Cuts a task's room into parts on boundaries of 64 bytes; with no room it adds up how much is needed.
struct Cutter {
    float* base;
    std::int64_t total = 0;

    template <class T>
    T* take(std::int64_t count) {
        auto* at = base ? reinterpret_cast<T*>(base + total) : nullptr;
        total += whole(count * static_cast<std::int64_t>(sizeof(T)), 64) / 4;
        return at;
    }
};

// The numbers that tasks of a call share.
struct Sizes {
    std::int64_t dim, wide, tall, group, blocks, columns, keys, key_blocks;

    explicit Sizes(const SelfArgs& a)
        : dim(a.dim), wide(whole(a.dim, pairs)), tall(a.dim / side), group(a.heads / a.kv_heads),
          blocks(whole(a.queries, pairs) / side), columns(group * blocks * side), keys(whole(a.keys, pairs)),
          key_blocks(keys / pairs) {}
};

inline __m512 numbers(const Half* p) { return intrinsic(from_bf16(load<vh>(p))); }

// Tokens [first, last) of one head as rows of `wide` numbers; zeros behind them and up to `rows`. Whole rows of a tile at a
// time: what is read as 64 bytes soon after it was written as two halves waits for the cache.
inline void take_rows(const View& x, std::int64_t session, std::int64_t head, std::int64_t first, std::int64_t last,
               std::int64_t rows, const Sizes& n, Half* to) {
    const Half* from = static_cast<const Half*>(x.data) + session * x.batch + first * x.token + head * x.head;
    const std::int64_t there = std::clamp<std::int64_t>(last - first, 0, rows);
    for (std::int64_t d = 0; d < n.wide; d += pairs) {
        const __mmask32 some = n.dim - d < pairs ? 0xffffu : 0xffffffffu;
        for (std::int64_t r = 0; r < there; ++r)
            _mm512_storeu_si512(to + r * n.wide + d, _mm512_maskz_loadu_epi16(some, from + r * x.token + d));
        for (std::int64_t r = there; r < rows; ++r) _mm512_storeu_si512(to + r * n.wide + d, _mm512_setzero_si512());
    }
}

// Rows of 16 tokens as packed tiles [wide / 32]: second factors of a product over dims.
inline void pack_rows(const Half* rows, const Sizes& n, std::uint32_t* to) {
    for (std::int64_t d = 0; d < n.wide; d += pairs) transpose(rows + d, n.wide * 2, to + d / pairs * words);
}

// Rows of 32 tokens as woven tiles [wide / 16] of 16 dims: second factors of a product over tokens.
inline void weave_rows(const Half* rows, const Sizes& n, std::uint32_t* to) {
    for (std::int64_t d = 0; d < n.wide; d += pairs, to += 2 * words)
        for (std::int64_t i = 0; i < side; ++i)
            weave(_mm512_loadu_si512(rows + 2 * i * n.wide + d), _mm512_loadu_si512(rows + (2 * i + 1) * n.wide + d),
                  to + i * side, to + words + i * side);
}

// Rows of 32 tokens as tiles [wide / 16] of 16 dims x 32 tokens: first factors of a product over tokens. `woven` is scratch.
inline void turn_rows(const Half* rows, const Sizes& n, std::uint32_t* woven, std::uint32_t* to) {
    weave_rows(rows, n, woven);
    for (std::int64_t i = 0; i < n.wide / side; ++i) transpose(woven + i * words, 64, to + i * words);
}

// [32 keys][16 queries] of fp32 = rows x packed queries; of the rows the second half is left out where there is none.
inline void score_keys(const Half* rows, const std::uint32_t* packed, std::int64_t wide, bool second, float* out) {
    _tile_zero(0);
    _tile_zero(1);
    for (std::int64_t d = 0; d < wide; d += pairs) {
        _tile_loadd(6, packed + d / pairs * words, 64);
        _tile_loadd(4, rows + d, wide * 2);
        _tile_dpbf16ps(0, 4, 6);
        if (second) {
            _tile_loadd(5, rows + side * wide + d, wide * 2);
            _tile_dpbf16ps(1, 5, 6);
        }
    }
    _tile_stored(0, out, 64);
    if (second) _tile_stored(1, out + words, 64);
}

// out[tall][16 dims][16 queries] (+)= sum over blocks of keys i of turned keys x packed weights; `at(i)` is the packed tile of
// a block, or nullptr where there is none.
template <class At>
inline void add_keys(const std::uint32_t* turned, const Sizes& n, std::int64_t first, std::int64_t last, bool add,
                     float* out, const At& at) {
    const std::int64_t each = n.wide / side * words;
    for (std::int64_t d = 0; d < n.tall; d += 4) {
        const std::int64_t left = n.tall - d;
        float* to = out + d * words;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        if (add) {
            _tile_loadd(0, to, 64);
            if (left > 1) _tile_loadd(1, to + words, 64);
            if (left > 2) _tile_loadd(2, to + 2 * words, 64);
            if (left > 3) _tile_loadd(3, to + 3 * words, 64);
        }
        for (std::int64_t i = first; i < last; ++i) {
            const void* packed = at(i);
            if (!packed) continue;
            const std::uint32_t* tile = turned + i * each + d * words;
            _tile_loadd(6, packed, 64);
            _tile_loadd(4, tile, 64);
            _tile_dpbf16ps(0, 4, 6);
            if (left == 1) continue;
            _tile_loadd(5, tile + words, 64);
            _tile_dpbf16ps(1, 5, 6);
            if (left == 2) continue;
            _tile_loadd(4, tile + 2 * words, 64);
            _tile_dpbf16ps(2, 4, 6);
            if (left == 3) continue;
            _tile_loadd(5, tile + 3 * words, 64);
            _tile_dpbf16ps(3, 5, 6);
        }
        _tile_stored(0, to, 64);
        if (left > 1) _tile_stored(1, to + words, 64);
        if (left > 2) _tile_stored(2, to + 2 * words, 64);
        if (left > 3) _tile_stored(3, to + 3 * words, 64);
    }
}

// out [tall][16 dims][16 queries] times `factor` of each query, to the tokens from `first` on of those before `last`.
inline void give_queries(const float* out, const Sizes& n, vf factor, const View& x, std::int64_t session, std::int64_t head,
                  std::int64_t first, std::int64_t last) {
    Half* to = static_cast<Half*>(x.data) + session * x.batch + head * x.head;
    float scaled[words], rows[words];
    for (std::int64_t d = 0; d < n.tall; ++d) {
        for (std::int64_t i = 0; i < side; ++i) store(scaled + i * side, load<vf>(out + d * words + i * side) * factor);
        transpose(scaled, 64, rows);
        for (std::int64_t t = first; t < last; ++t)
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + t * x.token + d * side),
                                (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(rows + (t - first) * side)));
    }
}

// The natural logarithm of a finite number from 1 on, to 1e-6 of it.
inline vf log_of(vf x) {
    const __m512 y = intrinsic(x);
    const vf n = (vf)_mm512_getexp_ps(y), m = (vf)_mm512_getmant_ps(y, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_src);
    const vf e = pick<vf>(m < 1.0f, n + 1.0f, n);  // y = m 2^e with m from 0.75 on
    const vf f = (m - 1.0f) / (m + 1.0f), s = f * f;  // log(m) = 2 artanh(f), f within 1/5
    return e * ln2 + 2.0f * f * (1.0f + s * (0.33333333f + s * (0.2f + s * (0.14285714f + s * 0.11111111f))));
}

// Whether the mask of a block must be looked at: two rows are done at a time, and the one beyond the last is no key.
inline bool is_masked(Sight sight, std::int64_t rows) { return sight == Sight::some || rows % 2; }

}  // namespace
}  // namespace amx
}  // namespace flexlam
