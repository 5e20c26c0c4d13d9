// Attention of many tokens by AMX tiles of 16 x 16. Scores are formed as keys x queries, so that a row is a token and a lane
// a query: maxima and sums over tokens are plain vector operations. Values x weights are formed as dims x queries.
#include "prefill.h"

#ifdef FLEXLAM_X86_VARIANTS
#define FLEXLAM_VARIANT amx
#define FLEXLAM_LANES 16
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu_features.h"
#include "decode_parts.h"
#include "parallel.h"
#include "vectors.inl"

namespace flexlam {
namespace {

using namespace amx;

constexpr std::int64_t side = 16;           // rows and columns of a tile of fp32
constexpr std::int64_t pairs = 32;          // numbers of bf16 in a row
constexpr std::int64_t split_tokens = 256;  // of keys, whose scores for 16 queries fill 16 KB
constexpr float infinity = std::numeric_limits<float>::infinity();
constexpr std::int64_t words = side * side;  // 32-bit words of a tile

bool ask_for_tiles() {
    const auto features = cpu_features();
    const auto has = [&](const char* name) {
        return std::any_of(features.begin(), features.end(), [&](const auto& f) { return f.first == name && f.second; });
    };
    if (!has("amx_tile") || !has("amx_bf16") || !has("avx512_bf16") || !has("avx512bw") || !has("avx512vl")) return false;
    constexpr int request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM: Linux wants to be asked once a process
    return syscall(SYS_arch_prctl, request, tile_data) == 0;
}

struct alignas(64) TileConfig {
    std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
    std::uint16_t bytes[16] = {};
    std::uint8_t rows[16] = {};
};

// What tiles load and store is not known to the compiler: what was written before must be in memory by then.
inline void settle(const void* what = nullptr) { __asm__ volatile("" ::"r"(what) : "memory"); }

// All eight tiles with 16 rows of 64 bytes while this lives; then again what other code on this thread had.
class Tiles {
public:
    Tiles() {
        _tile_storeconfig(&before_);
        settle(&before_);
        TileConfig whole;
        std::fill_n(whole.bytes, 8, std::uint16_t{64}), std::fill_n(whole.rows, 8, std::uint8_t{16});
        settle(&whole);
        _tile_loadconfig(&whole);
    }
    ~Tiles() {
        if (before_.palette) {
            _tile_loadconfig(&before_);
        } else {
            _tile_release();
        }
    }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;

private:
    TileConfig before_;
};

// Transposes 16 x 16 words; rows of `in` are `stride` bytes apart.
inline void transpose(const void* in, std::int64_t stride, std::uint32_t* out) {
    __m512i r[16], s[16];
    for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(static_cast<const char*>(in) + i * stride);
    for (int i = 0; i < 16; i += 2) {
        s[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        s[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(s[i], s[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(s[i], s[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(s[i + 1], s[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(s[i + 1], s[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        s[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        s[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        s[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        s[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 8; ++i) {
        _mm512_storeu_si512(out + i * 16, _mm512_shuffle_i32x4(s[i], s[i + 8], 0x88));
        _mm512_storeu_si512(out + (i + 8) * 16, _mm512_shuffle_i32x4(s[i], s[i + 8], 0xdd));
    }
}

// Two tokens' numbers in one word each: 32 numbers of both become two vectors of 16 words.
inline void weave(const std::uint16_t* first, const std::uint16_t* second, std::uint32_t* low, std::uint32_t* high) {
    const __m512i a = _mm512_loadu_si512(first), b = _mm512_loadu_si512(second);
    const __m512i to_low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                            5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i to_high = _mm512_add_epi16(to_low, _mm512_set1_epi16(16));
    _mm512_storeu_si512(low, _mm512_permutex2var_epi16(a, to_low, b));
    _mm512_storeu_si512(high, _mm512_permutex2var_epi16(a, to_high, b));
}

inline vf softmax_weight(vf x) { return exp_within(pick<vf>(x < -87.0f, vf{} - 87.0f, x)); }

// One session's attention for the query heads of one key head, over all of its tokens.
class Head {
public:
    Head(const AttendArgs& a, std::int64_t session, std::int64_t key_head)
        : a_(a), session_(session), group_(key_head), blocks_((a.tokens + side - 1) / side),
          seen_(a.context[session] * a.page), own_(a.start[session]) {
        thread_local std::vector<float> kept;
        const std::int64_t heads = a.heads / a.kv_heads, queries = heads * blocks_;
        const std::int64_t sizes[] = {queries * a.dim * side / 2, queries * a.dim * side, 2 * queries * side,
                                      split_tokens * side, split_tokens * a.dim / 2, a.dim * side, 2 * words};
        std::int64_t total = 16;
        for (const std::int64_t size : sizes) total += size;
        if (kept.size() < static_cast<std::size_t>(total)) kept.resize(static_cast<std::size_t>(total));
        float* at = reinterpret_cast<float*>((reinterpret_cast<std::uintptr_t>(kept.data()) + 63) / 64 * 64);
        float** const parts[] = {&queries_, &sums_, &states_, &scores_, &values_, &added_, &woven_};
        for (std::size_t i = 0; i < std::size(sizes); ++i) *parts[i] = at, at += sizes[i];
    }

    void run() {
        const std::int64_t heads = a_.heads / a_.kv_heads, queries = heads * blocks_;
        for (std::int64_t h = 0; h < heads; ++h) pack_queries(h);
        std::fill_n(sums_, queries * a_.dim * side, 0.0f);
        for (std::int64_t i = 0; i < queries; ++i)
            for (std::int64_t l = 0; l < side; ++l) largest(i)[l] = -infinity, total(i)[l] = 0;
        const std::int64_t all = limit(a_.tokens - 1);
        for (std::int64_t from = 0; from < all; from += split_tokens) {
            pack_values(from, std::min(split_tokens, all - from));
            for (std::int64_t h = 0; h < heads; ++h)
                for (std::int64_t b = 0; b < blocks_; ++b) {
                    const std::int64_t count = limit(std::min(a_.tokens, (b + 1) * side) - 1) - from;
                    if (count > 0) add_split(h * blocks_ + b, b, from, std::min(split_tokens, count));
                }
        }
        for (std::int64_t h = 0; h < heads; ++h)
            for (std::int64_t b = 0; b < blocks_; ++b) store_block(h, b);
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

    void pack_queries(std::int64_t h) {
        const auto* q = static_cast<const std::uint16_t*>(a_.q);
        const std::int64_t head = group_ * (a_.heads / a_.kv_heads) + h, stride = a_.heads * a_.dim;
        for (std::int64_t b = 0; b < blocks_; ++b)
            for (std::int64_t d = 0; d < a_.dim; d += pairs) {
                std::uint16_t some[side * pairs] = {};
                const std::int64_t count = std::min(side, a_.tokens - b * side);
                for (std::int64_t n = 0; n < count; ++n)
                    std::copy_n(q + (session_ * a_.tokens + b * side + n) * stride + head * a_.dim + d, pairs, some + n * pairs);
                auto* to = reinterpret_cast<std::uint32_t*>(queries_) + ((h * blocks_ + b) * a_.dim / pairs + d / pairs) * words;
                transpose(some, 64, to);
            }
    }

    // Values of a split as tiles of 16 dims x 32 tokens; zeros for tokens beyond `count`.
    void pack_values(std::int64_t from, std::int64_t count) {
        const auto* v = static_cast<const std::uint16_t*>(a_.v);
        const std::vector<std::uint16_t>& nothing = zeros();
        auto* woven = reinterpret_cast<std::uint32_t*>(woven_);
        for (std::int64_t t = 0; t < count; t += pairs) {
            const std::uint16_t* rows[pairs];
            for (std::int64_t i = 0; i < pairs; ++i) rows[i] = t + i < count ? v + place(from + t + i) : nothing.data();
            for (std::int64_t d = 0; d < a_.dim; d += pairs) {
                for (std::int64_t i = 0; i < side; ++i)
                    weave(rows[2 * i] + d, rows[2 * i + 1] + d, woven + i * side, woven + words + i * side);
                auto* to = reinterpret_cast<std::uint32_t*>(values_) + (t / pairs * (a_.dim / side) + d / side) * words;
                transpose(woven, 64, to), transpose(woven + words, 64, to + words);
            }
        }
    }

    static const std::vector<std::uint16_t>& zeros() {
        static const std::vector<std::uint16_t> none(128, 0);
        return none;
    }

    // Scores of 16 queries for `count` tokens from `from` on, scaled, with what a query does not see at minus infinity.
    void form_scores(std::int64_t i, std::int64_t block, std::int64_t from, std::int64_t count) {
        const auto* k = static_cast<const std::uint16_t*>(a_.k);
        const auto* q = reinterpret_cast<const std::uint32_t*>(queries_) + i * (a_.dim / pairs) * words;
        const std::int64_t stride = a_.kv_heads * a_.dim * 2;
        settle();
        for (std::int64_t t = 0; t < count; t += 2 * side) {
            // the second half may lie beyond what is seen: any page will do, for the mask covers it
            const auto *first = k + place(from + t), *second = k + place(std::min(from + t + side, last_row(from + count - 1)));
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
        const float scale = 1.0f / std::sqrt(static_cast<float>(a_.dim));
        const std::int64_t whole = limit(block * side) - from;  // tokens that all 16 see
        vi ends;
        for (int n = 0; n < side; ++n) ends[n] = static_cast<std::int32_t>(limit(std::min(a_.tokens - 1, block * side + n)) - from);
        vf most = load<vf>(largest(i));
        const std::int64_t room = (count + 2 * side - 1) / (2 * side) * (2 * side);
        for (std::int64_t t = 0; t < room; ++t) {
            vf s = load<vf>(scores_ + t * side) * scale;
            if (t >= whole) s = pick<vf>(vi{} + static_cast<std::int32_t>(t) < ends, s, vf{} - infinity);
            store(scores_ + t * side, s);
            most = pick<vf>(s > most, s, most);
        }
        store(largest(i), most);
    }

    std::int64_t last_row(std::int64_t t) const { return t / side * side; }

    void add_split(std::int64_t i, std::int64_t block, std::int64_t from, std::int64_t count) {
        const vf before = load<vf>(largest(i));
        form_scores(i, block, from, count);
        // a query that has seen nothing yet has weights of nothing: any finite reference will do
        vf most = load<vf>(largest(i));
        most = pick<vf>(most == vf{} - infinity, vf{}, most);
        vf sum{};
        const auto* values = reinterpret_cast<const std::uint32_t*>(values_);
        const std::int64_t tall = a_.dim / side;
        for (std::int64_t d = 0; d < tall; d += 4) {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            for (std::int64_t t = 0; t < count; t += pairs) {
                if (d == 0) sum += weigh(t, most);
                settle();
                _tile_loadd(4, weights_of(t), 64);
                const std::uint32_t* tile = values + (t / pairs * tall + d) * words;
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
        const vf factor = pick<vf>(before == vf{} - infinity, vf{}, softmax_weight(before - most));
        store(total(i), load<vf>(total(i)) * factor + sum);
        float* out = sums_ + i * a_.dim * side;
        for (std::int64_t d = 0; d < a_.dim; ++d)
            store(out + d * side, load<vf>(out + d * side) * factor + load<vf>(added_ + d * side));
    }

    // Weights of 32 tokens take the place of their scores: a tile of words, each of two tokens, of which the sum is returned.
    vf weigh(std::int64_t t, vf most) {
        vf sum{};
        float* at = scores_ + t * side;
        for (std::int64_t r = 0; r < side; ++r) {
            const vf s0 = load<vf>(at + 2 * r * side), s1 = load<vf>(at + (2 * r + 1) * side);
            const vf w0 = weight_of(s0, most), w1 = weight_of(s1, most);
            sum += w0 + w1;
            const vu low = __builtin_convertvector(to_bf16(w0), vu), high = __builtin_convertvector(to_bf16(w1), vu);
            store(reinterpret_cast<std::uint32_t*>(at) + r * side, low | (high << 16));
        }
        return sum;
    }

    static vf weight_of(vf s, vf most) {
        const vf w = softmax_weight(s - most);
        return pick<vf>(s == vf{} - infinity, vf{}, w);
    }

    const float* weights_of(std::int64_t t) const { return scores_ + t * side; }

    void store_block(std::int64_t h, std::int64_t b) {
        const std::int64_t i = h * blocks_ + b, head = group_ * (a_.heads / a_.kv_heads) + h;
        auto* out = static_cast<std::uint16_t*>(a_.out);
        const vf sum = load<vf>(total(i)), share = pick<vf>(sum == vf{}, vf{}, 1.0f / sum);
        for (std::int64_t d = 0; d < a_.dim; d += side) {
            float* tile = sums_ + (i * a_.dim + d) * side;
            for (std::int64_t r = 0; r < side; ++r) store(tile + r * side, load<vf>(tile + r * side) * share);
            transpose(tile, 64, reinterpret_cast<std::uint32_t*>(added_));
            for (std::int64_t n = 0; n < std::min(side, a_.tokens - b * side); ++n)
                store(out + ((session_ * a_.tokens + b * side + n) * a_.heads + head) * a_.dim + d,
                      to_bf16(load<vf>(added_ + n * side)));
        }
    }

    const AttendArgs& a_;
    const std::int64_t session_, group_, blocks_, seen_, own_;
    float *queries_, *sums_, *states_, *scores_, *values_, *added_, *woven_;
};

}  // namespace

bool has_tiles() {
    static const bool found = ask_for_tiles();
    return found;
}

bool takes_tiles(const AttendArgs& a) {
    return a.type == Float::bf16 && a.in == Float::bf16 && a.dim % pairs == 0 && a.dim <= 128 && a.page % side == 0;
}

void tiles_attend(const AttendArgs& a, int threads) {
    parallel_for(a.batch * a.kv_heads, threads, [&](std::int64_t i) {
        const Tiles configured;
        Head(a, i / a.kv_heads, i % a.kv_heads).run();
    });
}

}  // namespace flexlam

#else

namespace flexlam {

bool has_tiles() { return false; }
bool takes_tiles(const AttendArgs&) { return false; }
void tiles_attend(const AttendArgs&, int) {}

}  // namespace flexlam

#endif
