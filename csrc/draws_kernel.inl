// Normal numbers from Philox4x32-10, compiled once per instruction set (vectors.inl says how). Floating-point contraction
// is off (CMakeLists.txt), so every variant returns the bits of flexlam_fast/ops/draws.py.
#include <cstdint>

#if FLEXLAM_LANES >= 8
#include <immintrin.h>
#endif

#include "draws.h"
#include "vectors.inl"

namespace flexlam {
namespace FLEXLAM_VARIANT {
namespace {

typedef std::uint64_t vd __attribute__((vector_size(4 * V)));  // V / 2 wide words, of which the low halves count

// Low halves times a word of 32 bits.
inline vd times(vd a, std::uint32_t b) {
#if FLEXLAM_LANES == 16
    return (vd)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif FLEXLAM_LANES == 8
    return (vd)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#else
    return (a & 0xffffffffu) * static_cast<std::uint64_t>(b);
#endif
}

// Four words of V / 2 blocks. What a product leaves in the high halves is never read, so nothing is masked on the way.
struct Half {
    vd c0, c1, c2, c3;

    inline void round(std::uint32_t k0, std::uint32_t k1) {
        const vd p0 = times(c0, 0xD2511F53u), p1 = times(c2, 0xCD9E8D57u);
        c0 = (p1 >> 32) ^ c1 ^ (vd{} + k0);
        c2 = (p0 >> 32) ^ c3 ^ (vd{} + k1);
        c1 = p1, c3 = p0;
    }
};

// Low halves of both, in turns.
inline vu mixed(vd even, vd odd) { return bits<vu>((even & 0xffffffffu) | (odd << 32)); }

inline vf to_float(vu word) { return __builtin_convertvector(word, vf); }

// As ops/sampling.py's _log, whose near is x - 1 in more digits where x <= 1.
inline vf logarithm(vf x, vf near) {
    const vi u = bits<vi>(x);
    const vi exponent = (u - 0x3F3504F3) >> 23;
    vf f = bits<vf>(u - (exponent << 23)) - 1.0f;
    f = pick<vf>(exponent == 0, near, f);
    const vf square = f * f;
    vf y = f * -0.07634586095809937f + 0.12761598825454712f;
    y = y * f + -0.13160155713558197f;
    y = y * f + 0.14201752841472626f;
    y = y * f + -0.1662335991859436f;
    y = y * f + 0.20001226663589478f;
    y = y * f + -0.2500081956386566f;
    y = y * f + 0.3333333134651184f;
    y = f + (y * f * square - 0.5f * square);
    return y + __builtin_convertvector(exponent, vf) * 0.6931471824645996f;
}

inline vf root(vf x) {
#if FLEXLAM_LANES == 16
    return (vf)_mm512_sqrt_ps((__m512)x);
#elif FLEXLAM_LANES == 8
    return (vf)_mm256_sqrt_ps((__m256)x);
#else
    for (int i = 0; i < V; ++i) x[i] = __builtin_sqrtf(x[i]);
    return x;
#endif
}

// Two normal numbers a lane: their radius is of `word`, their angle of `turn`.
inline void pair(vu word, vu turn, vf& first, vf& second) {
    const vf below = (to_float(word) + 0.5f) * 0x1p-32f, above = (to_float(~word) + 0.5f) * 0x1p-32f;
    const vf radius = root(logarithm(above, 0.0f - below) * -2.0f);
    const vu quarter = (turn + 0x20000000u) >> 30;
    const vf x = __builtin_convertvector(bits<vi>(turn - (quarter << 30)), vf) * 1.4629180792671596e-09f;
    const vf square = x * x;
    vf sine = (square * -0.0001951729936990887f + 0.008332177996635437f) * square + -0.16666655242443085f;
    sine = sine * square * x + x;
    vf cosine = (square * 2.4438451873720624e-05f + -0.001388736767694354f) * square + 0.04166664555668831f;
    cosine = cosine * square * square + (1.0f - 0.5f * square);
    const vi across = bits<vi>(quarter << 31) < 0;
    const vf a = pick<vf>(across, sine, cosine), b = pick<vf>(across, cosine, sine);
    first = radius * bits<vf>(bits<vu>(a) ^ (((quarter + 1u) & 2u) << 30));
    second = radius * bits<vf>(bits<vu>(b) ^ ((quarter & 2u) << 30));
}

inline vi in_turns(int first) {  // first of a, first of b, second of a, ...: a constant once it is inlined
    vi v{};
    for (int i = 0; i < V; ++i) v[i] = first + i / 2 + (i % 2 ? V : 0);
    return v;
}

typedef std::int64_t vl __attribute__((vector_size(4 * V)));
inline vl in_turns_wide(int first) {
    vl v{};
    for (int i = 0; i < V / 2; ++i) v[i] = first + i / 2 + (i % 2 ? V / 2 : 0);
    return v;
}

// out [4 V]: lane 0 of a, b, c and d, then lane 1 of each.
inline void store_in_turns(float* out, vf a, vf b, vf c, vf d) {
#ifdef __clang__
    for (int i = 0; i < V; ++i) out[4 * i] = a[i], out[4 * i + 1] = b[i], out[4 * i + 2] = c[i], out[4 * i + 3] = d[i];
#else
    for (int half = 0; half < 2; ++half) {
        const vd ab = bits<vd>(__builtin_shuffle(a, b, in_turns(half * V / 2)));
        const vd cd = bits<vd>(__builtin_shuffle(c, d, in_turns(half * V / 2)));
        store(out + half * 2 * V, __builtin_shuffle(ab, cd, in_turns_wide(0)));
        store(out + half * 2 * V + V, __builtin_shuffle(ab, cd, in_turns_wide(V / 4)));
    }
#endif
}

}  // namespace

void draw_normal(const DrawArgs& a, std::int64_t row, std::int64_t first, std::int64_t last) {
    const auto stream = static_cast<std::uint64_t>(a.streams[row]);
    const std::uint64_t step = (a.step & 0x7fffffffu) + 0x80000000u;
    vd lanes{};
    for (int i = 0; i < V / 2; ++i) lanes[i] = static_cast<std::uint64_t>(2 * i);
    float* const out = a.out + row * a.count;
    for (std::int64_t n = first; n < last; n += 4 * V) {
        const vd block = lanes + (static_cast<std::uint64_t>(n / 4) + 0x80000000u);
        Half even{block, vd{} + step, vd{} + (stream & 0xffffffffu), vd{} + (stream >> 32)}, odd = even;
        odd.c0 = block + 1u;
        auto k0 = static_cast<std::uint32_t>(a.key), k1 = static_cast<std::uint32_t>(a.key >> 32);
        for (int i = 0; i < 10; ++i, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) even.round(k0, k1), odd.round(k0, k1);
        vf x0, x1, x2, x3;
        pair(mixed(even.c0, odd.c0), mixed(even.c1, odd.c1), x0, x1);
        pair(mixed(even.c2, odd.c2), mixed(even.c3, odd.c3), x2, x3);
        if (last - n >= 4 * V) {
            store_in_turns(out + n, x0, x1, x2, x3);
        } else {
            float some[4 * V];
            store_in_turns(some, x0, x1, x2, x3);
            std::memcpy(out + n, some, static_cast<std::size_t>(last - n) * sizeof(float));
        }
    }
}

}  // namespace FLEXLAM_VARIANT
}  // namespace flexlam
