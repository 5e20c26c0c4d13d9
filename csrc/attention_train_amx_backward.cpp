// The backward of csrc/attention_train_parts.h by AMX, for bf16. Weights are formed again from the log-sum-exp, 32 keys at a
// time for all queries; the gradients of these keys and values are then sums over queries in tiles, and those of the queries
// sums over keys, of slopes that are kept until there are 512 keys.
#include "attention_train_parts.h"

#ifdef FLEXLAM_X86_VARIANTS
#define FLEXLAM_VARIANT amx
#define FLEXLAM_LANES 16
#include <immintrin.h>

#include "vectors.inl"

#include "attention_train_tiles.h"

namespace flexlam {
namespace amx {
namespace {

constexpr std::int64_t chunk_blocks = 16;  // of keys, whose slopes for 512 queries fill 512 KB

// Columns are the queries of all heads of the group, each head's up to whole 32s.
struct BackwardRoom {
    Half *k, *v, *row, *out_row;                            // [keys][wide] twice, [32][wide] twice
    Half *weights, *slopes;                                 // [32 keys][columns] each: first factors over queries
    std::uint32_t *q, *grad;                                // packed tiles [columns / 16][wide / 32]
    std::uint32_t *woven_q, *woven_grad;                    // woven tiles [columns / 32][wide / 16]
    std::uint32_t *turned_k, *packed, *woven;               // turned tiles; slopes [chunk][columns / 16] tiles; scratch
    float *log_sums, *deltas, *sums, *dq;                   // [columns] twice, [32][dim], [columns / 16][dim][16]
    float* scores[2];                                       // of a block of queries and of the next: [64][16]
    std::int64_t stride, total;

    BackwardRoom(const Sizes& n, float* base) : stride(n.columns + pairs) {  // not a multiple of 4 KB
        Cutter cut{base};
        k = cut.take<Half>(n.keys * n.wide), v = cut.take<Half>(n.keys * n.wide);
        row = cut.take<Half>(pairs * n.wide), out_row = cut.take<Half>(pairs * n.wide);
        weights = cut.take<Half>(pairs * stride), slopes = cut.take<Half>(pairs * stride);
        const std::int64_t all = n.columns * n.wide / 2;
        q = cut.take<std::uint32_t>(all), grad = cut.take<std::uint32_t>(all);
        woven_q = cut.take<std::uint32_t>(all), woven_grad = cut.take<std::uint32_t>(all);
        turned_k = cut.take<std::uint32_t>(n.keys * n.wide / 2);
        packed = cut.take<std::uint32_t>(std::min(chunk_blocks, n.key_blocks) * n.columns * side);
        woven = cut.take<std::uint32_t>(n.wide * side);
        log_sums = cut.take<float>(n.columns), deltas = cut.take<float>(n.columns);
        for (float*& each : scores) each = cut.take<float>(4 * words);
        sums = cut.take<float>(pairs * n.dim);
        dq = cut.take<float>(n.columns * n.dim);
        total = cut.total;
    }
};

// The gradients of one head of keys and values and of the heads of queries that share it.
class Backward {
public:
    Backward(const SelfArgs& a, const SelfGrads& g, const Visible& visible, std::int64_t session, std::int64_t key_head,
             float* base)
        : a_(a), g_(g), visible_(visible), session_(session), key_head_(key_head), n_(a), room_(n_, base) {}

    void run() {
        take_rows(a_.k, session_, key_head_, 0, a_.keys, n_.keys, n_, room_.k);
        take_rows(a_.v, session_, key_head_, 0, a_.keys, n_.keys, n_, room_.v);
        for (std::int64_t i = 0; i < n_.key_blocks; ++i)
            turn_rows(room_.k + i * pairs * n_.wide, n_, room_.woven, room_.turned_k + i * n_.wide * side);
        for (std::int64_t p = 0; p < n_.columns / pairs; ++p) take_queries(p);
        for (std::int64_t first = 0; first < n_.key_blocks; first += chunk_blocks) {
            const std::int64_t last = std::min(n_.key_blocks, first + chunk_blocks);
            for (std::int64_t i = first; i < last; ++i) pass_keys(i, i - first);
            settle();
            for (std::int64_t c = 0; c < n_.columns / side; ++c) add_queries(c, first, last);
        }
        settle();
        for (std::int64_t c = 0; c < n_.columns / side; ++c) {
            const std::int64_t at = c % n_.blocks * side, end = std::min(a_.queries, at + side);
            if (at < end) give_queries(room_.dq + c * n_.dim * side, n_, vf{} + a_.scale, g_.q, session_, head(c), at, end);
        }
    }

private:
    std::int64_t head(std::int64_t column_block) const { return key_head_ * n_.group + column_block / n_.blocks; }

    const void* sighted(std::int64_t c, std::int64_t i, const void* what) const {
        return visible_.of(c % n_.blocks, i) == Sight::none ? nullptr : what;
    }

    // Of 32 queries what the products take, their log-sum-exp for powers of two, and sum over dims of gradient times result.
    void take_queries(std::int64_t pair) {
        const std::int64_t c = 2 * pair, first = c % n_.blocks * side, each = n_.wide / pairs * words;
        take_rows(a_.q, session_, head(c), first, a_.queries, pairs, n_, room_.row);
        weave_rows(room_.row, n_, room_.woven_q + pair * n_.wide * side);
        for (std::int64_t i = 0; i < 2; ++i) pack_rows(room_.row + i * side * n_.wide, n_, room_.q + (c + i) * each);
        take_rows(g_.grad, session_, head(c), first, a_.queries, pairs, n_, room_.row);
        weave_rows(room_.row, n_, room_.woven_grad + pair * n_.wide * side);
        for (std::int64_t i = 0; i < 2; ++i) pack_rows(room_.row + i * side * n_.wide, n_, room_.grad + (c + i) * each);
        take_rows(a_.out, session_, head(c), first, a_.queries, pairs, n_, room_.out_row);
        const float* lse = a_.lse + (session_ * a_.heads + head(c)) * a_.queries;
        for (std::int64_t i = 0; i < pairs; ++i)
            room_.log_sums[c * side + i] = first + i < a_.queries ? lse[first + i] * log2e : 0.0f;
        for (std::int64_t i = 0; i < pairs; i += side) {
            vf sum[side];
            for (std::int64_t r = 0; r < side; ++r) {
                const std::int64_t at = (i + r) * n_.wide;
                sum[r] = vf{};
                for (std::int64_t d = at; d < at + n_.dim; d += side)
                    sum[r] += (vf)numbers(room_.row + d) * (vf)numbers(room_.out_row + d);
            }
            for (int left = side; left > 1; left /= 2)
                for (int r = 0; r < left / 2; ++r) sum[r] = add_pairs(sum[2 * r], sum[2 * r + 1]);
            store(room_.deltas + c * side + i, sum[0]);
        }
    }

    // Weights and slopes of 32 keys for all queries, and from them the gradients of these keys and values.
    void pass_keys(std::int64_t i, std::int64_t place) {
        const std::int64_t all = n_.columns / side;
        const auto next = [&](std::int64_t c) {  // the next block of queries of which some see some of these keys
            while (c < all && visible_.of(c % n_.blocks, i) == Sight::none) {
                if (visible_.of((c % n_.blocks) ^ 1, i) != Sight::none) clear(c);
                ++c;
            }
            return c;
        };
        std::int64_t c = next(0);
        if (c < all) score(i, c, room_.scores[0]);
        for (int turn = 0; c < all; turn ^= 1) {
            const std::int64_t following = next(c + 1);
            if (following < all) score(i, following, room_.scores[turn ^ 1]);  // on its way while this one is weighed
            const std::int64_t rows = std::min(pairs, a_.keys - i * pairs);
            std::uint32_t* packed = room_.packed + (place * all + c) * words;
            if (is_masked(visible_.of(c % n_.blocks, i), rows)) {
                weigh<true>(i, c, room_.scores[turn], rows, packed);
            } else {
                weigh<false>(i, c, room_.scores[turn], rows, packed);
            }
            c = following;
        }
        const bool second = a_.keys - i * pairs > side;
        gather(room_.weights, room_.woven_grad, i, second);
        give_keys(g_.v, i, 1.0f);
        gather(room_.slopes, room_.woven_q, i, second);
        give_keys(g_.k, i, a_.scale);
    }

    // Scores [32 keys][16 queries], and behind them the gradients of the weights.
    void score(std::int64_t i, std::int64_t c, float* out) const {
        const std::int64_t at = i * pairs * n_.wide, each = n_.wide / pairs * words;
        const bool second = a_.keys - i * pairs > side;
        settle();
        score_keys(room_.k + at, room_.q + c * each, n_.wide, second, out);
        score_keys(room_.v + at, room_.grad + c * each, n_.wide, second, out + 2 * words);
        settle();
    }

    // No weights for a block of queries.
    void clear(std::int64_t c) {
        for (std::int64_t r = 0; r < pairs; ++r) {
            store(room_.weights + r * room_.stride + c * side, vh{});
            store(room_.slopes + r * room_.stride + c * side, vh{});
        }
    }

    static void store_two(Half* at, std::int64_t stride, __m512i both) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), _mm512_castsi512_si256(both));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(at + stride), _mm512_extracti64x4_epi64(both, 1));
    }

    // Scores and the gradients of weights become weights and slopes: as first factors over queries, and as packed ones over
    // keys, where there are zeros beyond the last.
    template <bool Masked>
    void weigh(std::int64_t i, std::int64_t c, const float* scores, std::int64_t rows, std::uint32_t* packed) const {
        const std::uint16_t* seen = visible_.rows(c % n_.blocks, i);
        const std::int64_t stride = room_.stride;
        Half *weights = room_.weights + c * side, *slopes = room_.slopes + c * side;
        const float* gradients = scores + 2 * words;
        const vf factor = vf{} + a_.scale * log2e;
        const vf log_sum = load<vf>(room_.log_sums + c * side), delta = load<vf>(room_.deltas + c * side);
        const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                               21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
        std::int64_t r = 0;
        for (; r < rows; r += 2) {
            vf weight[2], slope[2];
            for (int j = 0; j < 2; ++j) {
                weight[j] = power_of_two(load<vf>(scores + (r + j) * side) * factor - log_sum);
                if (Masked) weight[j] = (vf)_mm512_maskz_mov_ps(seen[r + j], intrinsic(weight[j]));
                slope[j] = weight[j] * (load<vf>(gradients + (r + j) * side) - delta);
                if (Masked) slope[j] = (vf)_mm512_maskz_mov_ps(seen[r + j], intrinsic(slope[j]));
            }
            const __m512i two = (__m512i)_mm512_cvtne2ps_pbh(intrinsic(slope[1]), intrinsic(slope[0]));
            store_two(weights, stride, (__m512i)_mm512_cvtne2ps_pbh(intrinsic(weight[1]), intrinsic(weight[0])));
            store_two(slopes, stride, two);
            _mm512_storeu_si512(packed, _mm512_permutexvar_epi16(order, two));
            weights += 2 * stride, slopes += 2 * stride, packed += side;
        }
        for (; r < pairs; r += 2, packed += side) _mm512_storeu_si512(packed, _mm512_setzero_si512());
    }

    // sums [32 keys][dim] = rows [32 keys][columns] x woven queries.
    void gather(const Half* rows, const std::uint32_t* woven, std::int64_t i, bool second) {
        const std::int64_t each = n_.wide * side, bytes = room_.stride * 2;
        settle();
        for (std::int64_t d = 0; d < n_.tall; d += 2) {
            const bool two = d + 1 < n_.tall;
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            for (std::int64_t c = 0; c < n_.columns / side; c += 2) {
                const std::int64_t b = c % n_.blocks;
                if (visible_.of(b, i) == Sight::none && visible_.of(b + 1, i) == Sight::none) continue;
                const std::uint32_t* tile = woven + c / 2 * each + d * words;
                _tile_loadd(4, rows + c * side, bytes);
                _tile_loadd(6, tile, 64);
                _tile_dpbf16ps(0, 4, 6);
                if (two) {
                    _tile_loadd(7, tile + words, 64);
                    _tile_dpbf16ps(1, 4, 7);
                }
                if (!second) continue;
                _tile_loadd(5, rows + side * room_.stride + c * side, bytes);
                _tile_dpbf16ps(2, 5, 6);
                if (two) _tile_dpbf16ps(3, 5, 7);
            }
            float* to = room_.sums + d * side;
            _tile_stored(0, to, n_.dim * 4);
            _tile_stored(2, to + side * n_.dim, n_.dim * 4);
            if (two) {
                _tile_stored(1, to + side, n_.dim * 4);
                _tile_stored(3, to + side * n_.dim + side, n_.dim * 4);
            }
        }
        settle();
    }

    void give_keys(const View& x, std::int64_t i, float factor) {
        Half* to = static_cast<Half*>(x.data) + session_ * x.batch + key_head_ * x.head;
        for (std::int64_t t = i * pairs; t < std::min(a_.keys, (i + 1) * pairs); ++t)
            for (std::int64_t d = 0; d < n_.dim; d += side) {
                const vf sum = load<vf>(room_.sums + (t - i * pairs) * n_.dim + d) * factor;
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + t * x.token + d), (__m256i)_mm512_cvtneps_pbh(intrinsic(sum)));
            }
    }

    // The gradient of a block of queries from blocks [first, last) of keys, added to that from earlier ones.
    void add_queries(std::int64_t c, std::int64_t first, std::int64_t last) {
        add_keys(room_.turned_k, n_, first, last, first > 0, room_.dq + c * n_.dim * side, [&](std::int64_t i) {
            return sighted(c, i, room_.packed + ((i - first) * n_.columns / side + c) * words);
        });
    }

    const SelfArgs& a_;
    const SelfGrads& g_;
    const Visible& visible_;
    const std::int64_t session_, key_head_;
    const Sizes n_;
    const BackwardRoom room_;
};

}  // namespace

std::int64_t self_backward_room(const SelfArgs& a) { return BackwardRoom(Sizes(a), nullptr).total; }

void self_backward(const SelfArgs& a, const SelfGrads& g, const Visible& visible, std::int64_t session,
                   std::int64_t key_head, float* base) {
    const Tiles configured;
    Backward(a, g, visible, session, key_head, base).run();
}

}  // namespace amx
}  // namespace flexlam

#endif
