// What the transformers on matrix tiles share: features by tokens, and threads that go through them together. Included after
// tiles_attend.h.
#pragma once

#include "engine_worker.h"

namespace flexlam {
namespace amx {

inline float number(const void* p, std::int64_t i) {
    const std::uint32_t bits = std::uint32_t{static_cast<const std::uint16_t*>(p)[i]} << 16;
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

inline vf rounded(vf x) { return from_bf16(to_bf16(x)); }

// Activations x [features, 16 blocks] of fp32, one token a column, and one thread's part in what is done with them.
class Columns {
protected:
    Columns(float* x, std::int64_t blocks, float* own, int rank, int count, Barrier& barrier)
        : x_(x), blocks_(blocks), width_(blocks * side), own_(own), rank_(rank), count_(count), barrier_(barrier) {}

    void wait() { barrier_.wait(count_); }

    // Row of the thread's own room.
    float* row(std::int64_t i) const { return own_ + i * width_; }

    // Tokens [count, features] of bf16 become columns, with zeros behind them.
    void take_rows(const std::uint16_t* tokens, std::int64_t count, std::int64_t features) {
        const Share mine(features / side, rank_, count_);
        for (std::int64_t f = mine.first * side; f < mine.last * side; f += side)
            for (std::int64_t b = 0; b < blocks_; ++b) {
                float rows[words], columns[words];
                for (std::int64_t n = 0; n < side; ++n) {
                    const std::int64_t token = b * side + n;
                    store(rows + n * side, token < count ? from_bf16(load<vh>(tokens + token * features + f)) : vf{});
                }
                transpose(rows, 64, columns);
                for (std::int64_t i = 0; i < side; ++i)
                    store(x_ + (f + i) * width_ + b * side, load<vf>(columns + i * side));
            }
    }

    // Features `f` and `f + 1` of the 16 tokens of a block.
    void pack_into(std::uint32_t* tiles, std::int64_t f, std::int64_t b, vf first, vf second) const {
        std::uint32_t* tile = tiles + (f / pairs * blocks_ + b) * words;
        _mm512_storeu_si512(tile + f % pairs / 2 * side, pack(intrinsic(first), intrinsic(second)));
    }

    // x += weight x packed + bias, of `features` rows; `bias` may be nullptr.
    void add_product(const void* weight, const void* bias, const std::uint32_t* packed, std::int64_t features,
                     std::int64_t inner) {
        const Share mine(features / pairs, rank_, count_);
        for (std::int64_t f = mine.first * pairs; f < mine.last * pairs; f += pairs) {
            product(static_cast<const std::uint16_t*>(weight), f, inner, packed, blocks_, own_);
            for (std::int64_t i = 0; i < pairs; ++i) {
                const float shift = bias ? number(bias, f + i) : 0.0f;
                float *x = x_ + (f + i) * width_, *y = row(i);
                for (std::int64_t n = 0; n < width_; n += side) store(x + n, load<vf>(x + n) + (load<vf>(y + n) + shift));
            }
        }
        wait();
    }

    float* const x_;
    const std::int64_t blocks_, width_;
    float* const own_;
    const int rank_, count_;
    Barrier& barrier_;
};

}  // namespace amx
}  // namespace flexlam
