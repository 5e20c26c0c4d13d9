// csrc/attention_train_parts.h by AMX (tiles.h), for bf16. Scores stand as keys x queries, one query a lane; the weights and
// slopes that products of the backward take are rounded to bf16, as the products of the reference take them.
#include "attention_train_parts.h"

#ifdef FLEXLAM_X86_VARIANTS
#define FLEXLAM_VARIANT amx
#define FLEXLAM_LANES 16
#include <immintrin.h>

#include "vectors.inl"

#include "tiles.h"
#include "tiles_attend.h"

namespace flexlam {
namespace amx {
namespace {

constexpr float log2e = 1.44269504f, ln2 = 0.69314718f;
constexpr std::int64_t chunk_blocks = 16;  // of keys, whose slopes for 512 queries fill 512 KB

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

// Tokens [first, last) of one head as rows of `wide` numbers; zeros behind them and up to `rows`.
void take_rows(const View& x, std::int64_t session, std::int64_t head, std::int64_t first, std::int64_t last,
               std::int64_t rows, const Sizes& n, Half* to) {
    const Half* from = static_cast<const Half*>(x.data) + session * x.batch + head * x.head;
    for (std::int64_t r = 0; r < rows; ++r)
        for (std::int64_t d = 0; d < n.wide; d += side)
            store(to + r * n.wide + d, first + r < last && d < n.dim ? load<vh>(from + (first + r) * x.token + d) : vh{});
}

// Rows of 16 tokens as packed tiles [wide / 32]: second factors of a product over dims.
void pack_rows(const Half* rows, const Sizes& n, std::uint32_t* to) {
    for (std::int64_t d = 0; d < n.wide; d += pairs) transpose(rows + d, n.wide * 2, to + d / pairs * words);
}

// Two tokens' numbers in one word each.
inline void weave(__m512i a, __m512i b, std::uint32_t* low, std::uint32_t* high) {
    const __m512i to_low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                                            37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i to_high = _mm512_add_epi16(to_low, _mm512_set1_epi16(16));
    _mm512_storeu_si512(low, _mm512_permutex2var_epi16(a, to_low, b));
    _mm512_storeu_si512(high, _mm512_permutex2var_epi16(a, to_high, b));
}

// Rows of 32 tokens as woven tiles [wide / 16] of 16 dims: second factors of a product over tokens.
void weave_rows(const Half* rows, const Sizes& n, std::uint32_t* to) {
    for (std::int64_t d = 0; d < n.wide; d += pairs, to += 2 * words)
        for (std::int64_t i = 0; i < side; ++i)
            weave(_mm512_loadu_si512(rows + 2 * i * n.wide + d), _mm512_loadu_si512(rows + (2 * i + 1) * n.wide + d),
                  to + i * side, to + words + i * side);
}

// Rows of 32 tokens as tiles [wide / 16] of 16 dims x 32 tokens: first factors of a product over tokens. `woven` is scratch.
void turn_rows(const Half* rows, const Sizes& n, std::uint32_t* woven, std::uint32_t* to) {
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
void give_queries(const float* out, const Sizes& n, vf factor, const View& x, std::int64_t session, std::int64_t head,
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

struct ForwardRoom {
    Half *k, *row;                                // [keys][wide], [32][wide]
    std::uint32_t *values, *queries, *woven;      // turned tiles, packed tiles, scratch
    float *scores, *out;                          // [keys][16], [tall][16][16]
    std::int64_t total;

    ForwardRoom(const Sizes& n, float* base) {
        Cutter cut{base};
        k = cut.take<Half>(n.keys * n.wide), row = cut.take<Half>(pairs * n.wide);
        values = cut.take<std::uint32_t>(n.key_blocks * n.wide * side);
        queries = cut.take<std::uint32_t>(n.wide / pairs * words), woven = cut.take<std::uint32_t>(n.wide * side);
        scores = cut.take<float>(n.keys * side), out = cut.take<float>(n.tall * words);
        total = cut.total;
    }
};

// The weights of 16 queries, packed in the place of their scores; returns their sums, and the largest score of each.
vf weigh(const SelfArgs& a, const Visible& visible, std::int64_t block, float* scores, vf& largest) {
    const __m512 nothing = _mm512_set1_ps(-infinity);
    __m512 most[4] = {nothing, nothing, nothing, nothing};  // four, so that none waits for the one before
    for (std::int64_t i = 0; i < visible.key_blocks; ++i) {
        const Sight sight = visible.of(block, i);
        if (sight == Sight::none) continue;
        const std::int64_t count = std::min(pairs, a.keys - i * pairs);
        const std::uint16_t* seen = visible.rows(block, i);
        const float* at = scores + i * pairs * side;
        if (sight == Sight::all) {
            for (std::int64_t r = 0; r < count; ++r) most[r % 4] = _mm512_max_ps(_mm512_loadu_ps(at + r * side), most[r % 4]);
        } else {
            for (std::int64_t r = 0; r < count; ++r)
                most[r % 4] = _mm512_mask_max_ps(most[r % 4], seen[r], _mm512_loadu_ps(at + r * side), most[r % 4]);
        }
    }
    largest = (vf)_mm512_max_ps(_mm512_max_ps(most[0], most[1]), _mm512_max_ps(most[2], most[3]));
    const float factor = a.scale * log2e;
    const vf shift = pick<vf>(largest == vf{} - infinity, vf{}, largest) * factor;
    vf sum{};
    for (std::int64_t i = 0; i < visible.key_blocks; ++i) {
        const Sight sight = visible.of(block, i);
        if (sight == Sight::none) continue;
        const std::int64_t count = sight == Sight::all ? std::min(pairs, a.keys - i * pairs) : pairs;
        const std::uint16_t* seen = visible.rows(block, i);
        float* at = scores + i * pairs * side;
        for (std::int64_t r = 0; r < pairs; r += 2) {
            vf first{}, second{};
            if (r < count) first = power_of_two(load<vf>(at + r * side) * factor - shift);
            if (r + 1 < count) second = power_of_two(load<vf>(at + (r + 1) * side) * factor - shift);
            if (sight == Sight::some) {
                first = (vf)_mm512_maskz_mov_ps(seen[r], intrinsic(first));
                second = (vf)_mm512_maskz_mov_ps(seen[r + 1], intrinsic(second));
            }
            sum += first + second;
            _mm512_storeu_si512(at + r / 2 * side, pack(intrinsic(first), intrinsic(second)));
        }
    }
    return sum;
}

void forward(const SelfArgs& a, const Visible& visible, std::int64_t session, std::int64_t key_head, float* base) {
    const Tiles configured;
    const Sizes n(a);
    const ForwardRoom room(n, base);
    take_rows(a.k, session, key_head, 0, a.keys, n.keys, n, room.k);
    for (std::int64_t i = 0; i < n.key_blocks; ++i) {
        take_rows(a.v, session, key_head, i * pairs, a.keys, pairs, n, room.row);
        turn_rows(room.row, n, room.woven, room.values + i * n.wide * side);
    }
    for (std::int64_t h = key_head * n.group; h < (key_head + 1) * n.group; ++h)
        for (std::int64_t b = 0; b * side < a.queries; ++b) {
            take_rows(a.q, session, h, b * side, a.queries, side, n, room.row);
            pack_rows(room.row, n, room.queries);
            settle();
            for (std::int64_t i = 0; i < n.key_blocks; ++i)
                if (visible.of(b, i) != Sight::none)
                    score_keys(room.k + i * pairs * n.wide, room.queries, n.wide, a.keys - i * pairs > side,
                               room.scores + i * pairs * side);
            settle();
            vf most;
            const vf sum = weigh(a, visible, b, room.scores, most);
            settle();
            add_keys(room.values, n, 0, n.key_blocks, false, room.out, [&](std::int64_t i) -> const void* {
                return visible.of(b, i) == Sight::none ? nullptr : room.scores + i * pairs * side;
            });
            settle();
            const std::int64_t last = std::min(a.queries, (b + 1) * side);
            const vf share = pick<vf>(sum == vf{}, vf{}, 1.0f / sum);
            give_queries(room.out, n, share, a.out, session, h, b * side, last);
            const vf log_sum = pick<vf>(sum == vf{}, most, most * a.scale + log_of(sum));
            const auto lanes = static_cast<__mmask16>((1u << (last - b * side)) - 1);
            _mm512_mask_storeu_ps(a.lse + (session * a.heads + h) * a.queries + b * side, lanes, intrinsic(log_sum));
        }
}

// Columns are the queries of all heads of the group, each head's up to whole 32s.
struct BackwardRoom {
    Half *k, *v, *row, *out_row;                            // [keys][wide] twice, [32][wide] twice
    Half *weights, *slopes;                                 // [32 keys][columns] each: first factors over queries
    std::uint32_t *q, *grad;                                // packed tiles [columns / 16][wide / 32]
    std::uint32_t *woven_q, *woven_grad;                    // woven tiles [columns / 32][wide / 16]
    std::uint32_t *turned_k, *packed, *woven;               // turned tiles; slopes [chunk][columns / 16] tiles; scratch
    float *log_sums, *deltas, *scores, *sums, *dq;          // [columns] twice, [64][16], [32][dim], [columns / 16][dim][16]
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
        scores = cut.take<float>(4 * words), sums = cut.take<float>(pairs * n.dim);
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
        const bool second = a_.keys - i * pairs > side;
        const std::int64_t at = i * pairs * n_.wide, each = n_.wide / pairs * words;
        for (std::int64_t c = 0; c < n_.columns / side; ++c) {
            const Sight sight = visible_.of(c % n_.blocks, i);
            if (sight == Sight::none) {
                if (visible_.of(c % n_.blocks ^ 1, i) != Sight::none) clear(c);
                continue;
            }
            settle();
            score_keys(room_.k + at, room_.q + c * each, n_.wide, second, room_.scores);
            score_keys(room_.v + at, room_.grad + c * each, n_.wide, second, room_.scores + 2 * words);
            settle();
            std::uint32_t* packed = room_.packed + (place * n_.columns / side + c) * words;
            if (sight == Sight::all) {
                weigh<false>(i, c, packed);
            } else {
                weigh<true>(i, c, packed);
            }
        }
        gather(room_.weights, room_.woven_grad, i, second);
        give_keys(g_.v, i, 1.0f);
        gather(room_.slopes, room_.woven_q, i, second);
        give_keys(g_.k, i, a_.scale);
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

    // Scores and the gradients of weights become weights and slopes.
    template <bool Masked>
    void weigh(std::int64_t i, std::int64_t c, std::uint32_t* packed) {
        const std::uint16_t* seen = visible_.rows(c % n_.blocks, i);
        const std::int64_t count = Masked ? pairs : std::min(pairs, a_.keys - i * pairs);
        const float factor = a_.scale * log2e, *scores = room_.scores, *slopes = scores + 2 * words;
        const vf log_sum = load<vf>(room_.log_sums + c * side), delta = load<vf>(room_.deltas + c * side);
        const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                               21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
        for (std::int64_t r = 0; r < pairs; r += 2) {
            vf weight[2] = {}, slope[2] = {};
            for (std::int64_t j = 0; j < 2; ++j) {
                if (!Masked && r + j >= count) continue;
                weight[j] = power_of_two(load<vf>(scores + (r + j) * side) * factor - log_sum);
                if (Masked) weight[j] = (vf)_mm512_maskz_mov_ps(seen[r + j], intrinsic(weight[j]));
                slope[j] = weight[j] * (load<vf>(slopes + (r + j) * side) - delta);
                if (Masked) slope[j] = (vf)_mm512_maskz_mov_ps(seen[r + j], intrinsic(slope[j]));
            }
            const __m512i two = (__m512i)_mm512_cvtne2ps_pbh(intrinsic(slope[1]), intrinsic(slope[0]));
            store_two(room_.weights + r * room_.stride + c * side, room_.stride,
                      (__m512i)_mm512_cvtne2ps_pbh(intrinsic(weight[1]), intrinsic(weight[0])));
            store_two(room_.slopes + r * room_.stride + c * side, room_.stride, two);
            _mm512_storeu_si512(packed + r / 2 * side, _mm512_permutexvar_epi16(order, two));
        }
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

std::int64_t forward_room(const SelfArgs& a) { return ForwardRoom(Sizes(a), nullptr).total; }
std::int64_t backward_room(const SelfArgs& a) { return BackwardRoom(Sizes(a), nullptr).total; }

void backward(const SelfArgs& a, const SelfGrads& g, const Visible& visible, std::int64_t session, std::int64_t key_head,
              float* base) {
    const Tiles configured;
    Backward(a, g, visible, session, key_head, base).run();
}

}  // namespace

const SelfKernels& self_kernels() {
    static const SelfKernels kernels = {forward_room, backward_room, forward, backward};
    return kernels;
}

}  // namespace amx
}  // namespace flexlam

#endif
