// AMX: matrix tiles of 16 rows of 64 bytes. For files compiled for it, which include <immintrin.h> before.
//
// Activations stand feature by feature, so that a row is a feature (or a token of keys) and a lane a token (or a query):
// norms, softmax and rotations are plain vector operations down the rows. As second factor of a product they are packed in
// tiles of 32 features x 16 tokens, each word holding a feature and the next one of a token.
#pragma once

#include <cstdint>

namespace flexlam {
namespace amx {

constexpr std::int64_t side = 16;            // rows of a tile, and words of a row
constexpr std::int64_t pairs = 32;           // numbers of bf16 in a row
constexpr std::int64_t words = side * side;  // of a tile

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
        for (int i = 0; i < 8; ++i) whole.bytes[i] = 64, whole.rows[i] = 16;
        settle(&whole);
        _tile_loadconfig(&whole);
    }
    ~Tiles() {
        if (before_.palette) {
            settle(&before_);
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

// Transposes 16 x 16 words; rows of `in` are `stride` bytes apart, those of `out` stand side by side.
inline void transpose(const void* in, std::int64_t stride, void* out) {
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
        _mm512_storeu_si512(static_cast<char*>(out) + i * 64, _mm512_shuffle_i32x4(s[i], s[i + 8], 0x88));
        _mm512_storeu_si512(static_cast<char*>(out) + (i + 8) * 64, _mm512_shuffle_i32x4(s[i], s[i + 8], 0xdd));
    }
}

// 16 words, each of the bf16 of a number of `first` and of one of `second`.
inline __m512i pack(__m512 first, __m512 second) {
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(second, first);
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5,
                                           20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, both);
}

// Numbers of two rows in one word each: the low and the high 16 words.
inline void weave(__m512i a, __m512i b, std::uint32_t* low, std::uint32_t* high) {
    const __m512i to_low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                                            37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i to_high = _mm512_add_epi16(to_low, _mm512_set1_epi16(16));
    _mm512_storeu_si512(low, _mm512_permutex2var_epi16(a, to_low, b));
    _mm512_storeu_si512(high, _mm512_permutex2var_epi16(a, to_high, b));
}

// out[32 rows][16 blocks] = 32 rows of `w` from `row` on (bf16, [., inner]) x packed [inner / 32][blocks] tiles.
inline void product(const std::uint16_t* w, std::int64_t row, std::int64_t inner, const std::uint32_t* packed,
                    std::int64_t blocks, float* out) {
    const std::uint16_t *first = w + row * inner, *second = first + side * inner;
    settle();
    for (std::int64_t b = 0; b < blocks; b += 2) {
        const std::int64_t next = b + 1 < blocks ? b + 1 : b;  // an odd block is done twice
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (std::int64_t i = 0; i < inner; i += pairs) {
            const std::uint32_t* tiles = packed + i / pairs * blocks * words;
            _tile_loadd(4, first + i, inner * 2);
            _tile_loadd(6, tiles + b * words, 64);
            _tile_loadd(5, second + i, inner * 2);
            _tile_loadd(7, tiles + next * words, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        const std::int64_t width = blocks * side;
        _tile_stored(0, out + b * side, width * 4);
        _tile_stored(1, out + next * side, width * 4);
        _tile_stored(2, out + side * width + b * side, width * 4);
        _tile_stored(3, out + side * width + next * side, width * 4);
    }
    settle();
}

}  // namespace amx
}  // namespace flexlam
