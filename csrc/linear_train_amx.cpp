// csrc/linear_train.h by AMX. Of the two factors one is turned, so that its columns are rows of tiles, and one is woven;
// turning costs more, so the narrower one is turned. Both are packed for a block of rows at a time, which stays in the cache
// of the thread that multiplies.
#include "linear_train.h"

#include "prefill.h"

#ifdef FLEXLAM_X86_VARIANTS
#define FLEXLAM_VARIANT amx
#define FLEXLAM_LANES 16
#include <immintrin.h>

#include <algorithm>
#include <vector>

#include "parallel.h"
#include "vectors.inl"

#include "tiles.h"

namespace flexlam {
namespace amx {
namespace {

using Half = std::uint16_t;

constexpr std::int64_t depth = 8;                     // row blocks of 32 that are packed at a time
constexpr std::int64_t panel = depth * words + side;  // words of 16 columns, packed; an odd number of lines apart

struct Factor {
    const Half* data;
    std::int64_t row, width;
};

// The rows are summed in two halves, each from its first block to its last, and the halves then added: one half for each of
// two threads. More threads share the columns of the woven factor besides, which changes no sum.
class LinearProduct {
public:
    LinearProduct(const LinearGrads& a, int threads)
        : a_(a), swapped_(a.inner < a.outer), grad_{static_cast<const Half*>(a.grad), a.grad_row, a.outer},
          x_{static_cast<const Half*>(a.x), a.x_row, a.inner}, turned_(swapped_ ? x_ : grad_), woven_(swapped_ ? grad_ : x_),
          blocks_((a.rows + depth * pairs - 1) / (depth * pairs)), down_(turned_.width / pairs),
          across_(woven_.width / pairs), products_(down_ * across_), units_(products_ + (a.bias ? a.outer / pairs : 0)),
          halves_(blocks_ > 1 ? 2 : 1), groups_(std::clamp<std::int64_t>(threads / 2, 1, across_)) {}

    std::int64_t tasks() const { return halves_ * groups_; }
    std::int64_t rows() const { return down_; }
    std::int64_t room_of_sums() const { return halves_ * units_ * unit; }
    std::int64_t room_of_task() const { return (turned_.width + woven_.width) / side * panel + turned_.width * side; }

    // One half of the rows times a group of columns; `room` is the thread's own.
    void sum(std::int64_t task, std::uint32_t* room, float* sums) const {
        const Tiles configured;
        const std::int64_t half = task % halves_, group = task / halves_;
        const std::int64_t from = across_ * group / groups_, to = across_ * (group + 1) / groups_;
        std::uint32_t *woven = room + turned_.width / side * panel, *scratch = woven + woven_.width / side * panel;
        sums += half * units_ * unit;
        for (std::int64_t b = blocks_ * half / halves_; b < blocks_ * (half + 1) / halves_; ++b) {
            const bool first = b == blocks_ * half / halves_;
            const std::int64_t deep = std::min(depth, (a_.rows + pairs - 1) / pairs - b * depth);
            pack(b * depth, deep, from, to, room, woven, scratch);
            for (std::int64_t m = 0; m < down_; ++m)
                for (std::int64_t n = from; n < to; ++n)
                    multiply(room + 2 * m * panel, woven + 2 * n * panel, deep, first, sums + (m * across_ + n) * unit);
            if (!a_.bias) continue;
            float* rows = sums + products_ * unit;
            if (swapped_) {
                for (std::int64_t n = from; n < to; ++n) add_rows(woven + 2 * n * panel, deep, first, rows + n * unit);
            } else if (!group) {
                for (std::int64_t m = 0; m < down_; ++m) add_rows(room + 2 * m * panel, deep, first, rows + m * unit);
            }
        }
    }

    // Adds the halves, and writes what belongs to 32 columns of the turned factor; the bias goes with the first.
    void give(std::int64_t m, float* sums) const {
        for (std::int64_t n = 0; n < across_; ++n) {
            float* at = added(sums, m * across_ + n);
            for (std::int64_t i = 0; i < 4; ++i) give_tile(at + i * words, 2 * m + i / 2, 2 * n + i % 2);
        }
        if (m || !a_.bias) return;
        for (std::int64_t u = products_; u < units_; ++u) {
            const float* at = added(sums, u);
            // the rows of a tile are alike where ones are the first factor, else its columns
            for (std::int64_t i = 0; i < pairs; ++i)
                a_.bias[(u - products_) * pairs + i] = at[i / side * words + i % side * (swapped_ ? 1 : side)];
        }
    }

private:
    static constexpr std::int64_t unit = 4 * words;  // two by two tiles

    // Columns [from, end) of 32 rows from `first` on as woven tiles, `apart` words from one to the next, column 0 at
    // `to`; zeros beyond the last row. Row by row, as memory is read ahead.
    void weave_rows(const Factor& f, std::int64_t first, std::int64_t from, std::int64_t end, std::uint32_t* to,
                    std::int64_t apart) const {
        alignas(64) static const Half nothing[pairs] = {};
        for (std::int64_t i = 0; i < side; ++i) {
            const std::int64_t r = first + 2 * i;
            const Half* rows[2] = {f.data + r * f.row, f.data + (r + 1) * f.row};
            const std::int64_t steps[2] = {r < a_.rows, r + 1 < a_.rows};
            for (std::int64_t half = 0; half < 2; ++half)
                if (!steps[half]) rows[half] = nothing;
            for (std::int64_t d = from; d < end; d += pairs) {
                std::uint32_t* at = to + d / side * apart + i * side;
                weave(_mm512_loadu_si512(rows[0] + d * steps[0]), _mm512_loadu_si512(rows[1] + d * steps[1]), at, at + apart);
            }
        }
    }

    // `deep` blocks of 32 rows as panels [width / 16][depth] of tiles; of the woven factor columns [32 from, 32 to).
    void pack(std::int64_t block, std::int64_t deep, std::int64_t from, std::int64_t to, std::uint32_t* turned,
              std::uint32_t* woven, std::uint32_t* scratch) const {
        for (std::int64_t k = 0; k < deep; ++k) {
            const std::int64_t first = (block + k) * pairs;
            weave_rows(turned_, first, 0, turned_.width, scratch, words);
            for (std::int64_t i = 0; i < turned_.width / side; ++i)
                transpose(scratch + i * words, 64, turned + i * panel + k * words);
            weave_rows(woven_, first, from * pairs, to * pairs, woven + k * words, panel);
        }
        settle();
    }

    // Two by two tiles of the product, added to `sums`.
    static void multiply(const std::uint32_t* a, const std::uint32_t* b, std::int64_t deep, bool first, float* sums) {
        start(first, sums);
        for (std::int64_t k = 0; k < deep; ++k) {
            _tile_loadd(4, a + k * words, 64);
            _tile_loadd(6, b + k * words, 64);
            _tile_loadd(5, a + panel + k * words, 64);
            _tile_loadd(7, b + panel + k * words, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        stop(sums);
    }

    // Sums over rows of two panels of the gradient, as products with ones. Each block has a sum of its own, and what is lost
    // when that is added is kept for the next (Kahan): rounding in a single chain of 80,000 rows would pile up.
    void add_rows(const std::uint32_t* packed, std::int64_t deep, bool first, float* sums) const {
        alignas(64) std::uint32_t ones[words];
        alignas(64) float block[unit];
        std::fill_n(ones, words, 0x3f803f80u);
        start(true, block);
        _tile_loadd(6, ones, 64);
        for (std::int64_t k = 0; k < deep; ++k) {
            _tile_loadd(4, packed + k * words, 64);
            _tile_loadd(5, packed + panel + k * words, 64);
            if (swapped_) {
                _tile_dpbf16ps(0, 6, 4);
                _tile_dpbf16ps(1, 6, 5);
            } else {
                _tile_dpbf16ps(0, 4, 6);
                _tile_dpbf16ps(1, 5, 6);
            }
        }
        stop(block);
        for (std::int64_t i = 0; i < 2 * words; i += side) {
            float *at = sums + i, *lost = at + 2 * words;
            const __m512 sum = first ? _mm512_setzero_ps() : _mm512_loadu_ps(at);
            const __m512 more = _mm512_sub_ps(_mm512_load_ps(block + i), first ? _mm512_setzero_ps() : _mm512_loadu_ps(lost));
            const __m512 both = _mm512_add_ps(sum, more);
            _mm512_storeu_ps(lost, _mm512_sub_ps(_mm512_sub_ps(both, sum), more));
            _mm512_storeu_ps(at, both);
        }
    }

    static void start(bool first, const float* sums) {
        settle(sums);
        if (first) {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
        } else {
            _tile_loadd(0, sums, 64);
            _tile_loadd(1, sums + words, 64);
            _tile_loadd(2, sums + 2 * words, 64);
            _tile_loadd(3, sums + 3 * words, 64);
        }
    }

    static void stop(float* sums) {
        _tile_stored(0, sums, 64);
        _tile_stored(1, sums + words, 64);
        _tile_stored(2, sums + 2 * words, 64);
        _tile_stored(3, sums + 3 * words, 64);
        settle(sums);
    }

    // The tiles of a unit, both halves of the rows together, in the place of the first.
    float* added(float* sums, std::int64_t u) const {
        float *at = sums + u * unit, *other = at + units_ * unit;
        if (halves_ > 1)
            for (std::int64_t i = 0; i < unit; i += side)
                _mm512_storeu_ps(at + i, _mm512_add_ps(_mm512_loadu_ps(at + i), _mm512_loadu_ps(other + i)));
        return at;
    }

    // A tile of the product to its place in the weight's gradient.
    void give_tile(const float* tile, std::int64_t m, std::int64_t n) const {
        alignas(64) float turned[words];
        if (swapped_) {
            transpose(tile, 64, turned);
            std::swap(m, n);
        }
        const float* rows = swapped_ ? turned : tile;
        for (std::int64_t i = 0; i < side; ++i)
            _mm512_storeu_ps(a_.weight + (m * side + i) * a_.inner + n * side, _mm512_loadu_ps(rows + i * side));
    }

    const LinearGrads& a_;
    const bool swapped_;
    const Factor grad_, x_, turned_, woven_;
    const std::int64_t blocks_, down_, across_, products_, units_, halves_, groups_;
};

}  // namespace
}  // namespace amx

void linear_gradients(const LinearGrads& a, int threads) {
    if (!a.rows) {
        std::fill_n(a.weight, a.outer * a.inner, 0.0f);
        if (a.bias) std::fill_n(a.bias, a.outer, 0.0f);
        return;
    }
    const amx::LinearProduct product(a, threads);
    const auto aligned = [](std::vector<float>& kept, std::int64_t needed) {
        if (kept.size() < static_cast<std::size_t>(needed) + 16) kept.resize(static_cast<std::size_t>(needed) + 16);
        return reinterpret_cast<float*>((reinterpret_cast<std::uintptr_t>(kept.data()) + 63) / 64 * 64);
    };
    thread_local std::vector<float> kept_sums;  // from call to call
    float* sums = aligned(kept_sums, product.room_of_sums());
    parallel_for(product.tasks(), threads, [&](std::int64_t task) {
        thread_local std::vector<float> kept;
        product.sum(task, reinterpret_cast<std::uint32_t*>(aligned(kept, product.room_of_task())), sums);
    });
    parallel_for(product.rows(), threads, [&](std::int64_t m) { product.give(m, sums); });
}

}  // namespace flexlam

#else

namespace flexlam {

void linear_gradients(const LinearGrads&, int) {}

}  // namespace flexlam

#endif
