// One chunk of FSQ, compiled once per instruction set: the including file defines FLEXLAM_VARIANT and FLEXLAM_LANES, the
// fp32 numbers of one register. (GCC takes vectors wider than a register apart lane by lane: 8 times slower.)
// Floating-point contraction is off (CMakeLists.txt), so every variant returns the same bits.
#include <cmath>
#include <cstring>

#include "fsq.h"

namespace flexlam {
namespace FLEXLAM_VARIANT {
namespace {

constexpr int W = LevelPattern::lanes;  // tokens of a tile
constexpr int V = FLEXLAM_LANES;        // elements of a vector
constexpr int max_dim = 8;
static_assert(W % V == 0);
typedef float vf __attribute__((vector_size(4 * V)));
typedef std::int32_t vi __attribute__((vector_size(4 * V)));
typedef std::uint32_t vu __attribute__((vector_size(4 * V)));
typedef std::uint16_t vh __attribute__((vector_size(2 * V)));

template <class V, class T>
inline V load(const T* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
template <class V, class T>
inline void store(T* p, V v) {
    std::memcpy(p, &v, sizeof v);
}
template <class V, class U>
inline V bits(U u) {
    static_assert(sizeof(V) == sizeof(U));
    V v;
    std::memcpy(&v, &u, sizeof v);
    return v;
}
template <class T>
inline T pick(vi condition, T a, T b) {  // condition is all ones or all zeros in each lane
    return condition ? a : b;
}

inline vf from_bf16(vh h) { return bits<vf>(__builtin_convertvector(h, vu) << 16); }

inline vh to_bf16(vf x) {
    const vu u = bits<vu>(x);
    const vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    const vu quiet_nan = (u >> 16) | 0x40u;
    return __builtin_convertvector(pick<vu>(x != x, quiet_nan, rounded), vh);
}

inline vf from_f16(vh h) {
    const vu u = __builtin_convertvector(h, vu);
    const vu magnitude = (u & 0x7fffu) << 13;
    const vu finite = bits<vu>(bits<vf>(magnitude) * 0x1p112f);  // rebiases the exponent, subnormals included
    const vu special = magnitude | 0x7f800000u;
    return bits<vf>(pick<vu>((u & 0x7c00u) == 0x7c00u, special, finite) | ((u & 0x8000u) << 16));
}

inline vh to_f16(vf x) {
    const vu u = bits<vu>(x), sign = (u >> 16) & 0x8000u, m = u & 0x7fffffffu;
    const vf magnitude = bits<vf>(m);
    // 0.5 has the spacing of fp16 subnormals, so the addition rounds to them
    const vu small = bits<vu>(magnitude + 0.5f) - bits<vu>(vf{} + 0.5f);
    const vu normal = (m + 0xfffu + ((m >> 13) & 1u) - (112u << 23)) >> 13;
    vu h = pick<vu>(magnitude < 0x1p-14f, small, normal);
    h = pick<vu>(magnitude >= 65520.0f, vu{} + 0x7c00u, h);
    h = pick<vu>(x != x, vu{} + 0x7e00u, h);
    return __builtin_convertvector(h | sign, vh);
}

// `count` elements of `type` at `p`, from element `first`, to and from fp32.
inline void read(const void* p, Float type, std::int64_t first, float* out, int count) {
    if (count < 0 || count > W * max_dim) __builtin_unreachable();  // says to the compiler how long a copy can be
    if (type == Float::f32) {
        std::memcpy(out, static_cast<const float*>(p) + first, 4 * static_cast<std::size_t>(count));
        return;
    }
    const std::uint16_t* h = static_cast<const std::uint16_t*>(p) + first;
    std::uint16_t padded[W * max_dim] = {};
    if (count % V) std::memcpy(padded, h, 2 * static_cast<std::size_t>(count)), h = padded;
    for (int i = 0; i < count; i += V) {
        const vh v = load<vh>(h + i);
        store(out + i, type == Float::bf16 ? from_bf16(v) : from_f16(v));
    }
}

inline void write(void* p, Float type, std::int64_t first, const float* from, int count) {
    if (type == Float::f32) {
        std::memcpy(static_cast<float*>(p) + first, from, 4 * static_cast<std::size_t>(count));
        return;
    }
    std::uint16_t h[W * max_dim];
    for (int i = 0; i < count; i += V) {
        const vf v = load<vf>(from + i);
        store(h + i, type == Float::bf16 ? to_bf16(v) : to_f16(v));
    }
    std::memcpy(static_cast<std::uint16_t*>(p) + first, h, 2 * static_cast<std::size_t>(count));
}

// Thresholds climb, so the last one at or below x says the digit.
inline vi digits(const LevelPattern& p, vf x, int at) {
    const float* threshold = &p.threshold[static_cast<std::size_t>(at)];
    const int width = W * p.dim;
    vi q{};
    for (int j = 0; j < p.steps; ++j) q = x >= load<vf>(threshold + j * width) ? vi{} + (j + 1) : q;
    return q;
}

template <int D>
inline void sum_codes(const std::int32_t* part, std::int32_t* codes, int tokens) {
    for (int t = 0; t < tokens; ++t) {
        std::int32_t code = part[t * D];
        for (int c = 1; c < D; ++c) code += part[t * D + c];
        codes[t] = code;
    }
}

inline vi lanes_from(int first) {  // first, first + 2, ...: a constant once it is inlined
    vi v{};
    for (int i = 0; i < V; ++i) v[i] = first + 2 * i;
    return v;
}

// Adds neighbours: lanes 0 + 1, 2 + 3, ... of `a`, then those of `b`.
inline vi add_pairs(vi a, vi b) {
    const vi even = lanes_from(0), odd = lanes_from(1);
#ifdef __clang__
    vi x{}, y{};
    for (int i = 0; i < V; ++i) x[i] = even[i] < V ? a[even[i]] : b[even[i] - V], y[i] = odd[i] < V ? a[odd[i]] : b[odd[i] - V];
    return x + y;
#else
    return __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, odd);
#endif
}

// A whole tile where the channels are a power of two: neighbours are added until one number a token is left.
template <int D>
inline void sum_tile(const std::int32_t* part, std::int32_t* codes) {
    vi v[W * D / V];
    for (int i = 0; i < W * D / V; ++i) v[i] = load<vi>(part + i * V);
    for (int left = W * D / V; left > W / V; left /= 2)
        for (int i = 0; i < left / 2; ++i) v[i] = add_pairs(v[2 * i], v[2 * i + 1]);
    for (int i = 0; i < W / V; ++i) store(codes + i * V, v[i]);
}

inline void add_up(int dim, const std::int32_t* part, std::int32_t* codes, int tokens) {
    if (tokens == W && dim == 4) return sum_tile<4>(part, codes);
    if (tokens == W && dim == 8) return sum_tile<8>(part, codes);
    switch (dim) {
        case 1: return sum_codes<1>(part, codes, tokens);
        case 2: return sum_codes<2>(part, codes, tokens);
        case 3: return sum_codes<3>(part, codes, tokens);
        case 4: return sum_codes<4>(part, codes, tokens);
        case 5: return sum_codes<5>(part, codes, tokens);
        case 6: return sum_codes<6>(part, codes, tokens);
        case 7: return sum_codes<7>(part, codes, tokens);
        default: return sum_codes<8>(part, codes, tokens);
    }
}

// sech(x)^2 = 4 e / (1 + e)^2 with e = exp(-2|x|): no cancellation in the tails, where 1 - tanh(x)^2 loses every digit.
inline vf slope(vf x) {
    const vf magnitude = bits<vf>(bits<vu>(x) & 0x7fffffffu);
    vf y = magnitude * -2.0f;
    y = pick<vf>(y < -87.0f, vf{} - 87.0f, y);
    const vf n = (y * 1.44269504f + 12582912.0f) - 12582912.0f;  // the nearest integer
    const vf r = (y - n * 0.693359375f) - n * -2.12194440e-4f;   // within ln(2) / 2
    vf e = vf{} + 1.9875691500e-4f;                              // Cephes' expf
    e = e * r + 1.3981999507e-3f;
    e = e * r + 8.3334519073e-3f;
    e = e * r + 4.1665795894e-2f;
    e = e * r + 1.6666665459e-1f;
    e = e * r + 5.0000001201e-1f;
    e = e * (r * r) + r + 1.0f;
    e *= bits<vf>((__builtin_convertvector(n, vi) + 127) << 23);
    const vf s = 1.0f + e;
    const vf out = 4.0f * e / (s * s);
    return pick<vf>(x != x, x, out);  // the comparison with -87 has swallowed a NaN
}

// Fills or clears what stands beyond the retained prefix, block by block, in [first, last) tokens.
inline void each_suffix(const Prefix& prefix, std::int64_t first, std::int64_t last,
                        void (*then)(void*, std::int64_t, std::int64_t), void* state) {
    for (std::int64_t b = first / prefix.slots; b * prefix.slots < last; ++b) {
        const std::int64_t keep = prefix.keep[b] < 0 ? 0 : prefix.keep[b];
        if (keep < prefix.slots) then(state, b * prefix.slots + keep, (b + 1) * prefix.slots);
    }
}

struct Fill {
    void* out;
    const float* pattern;  // [W * d]: the null of every token of a tile
    Float type;
    int dim;
};

void fill(void* state, std::int64_t first, std::int64_t last) {
    const Fill& f = *static_cast<const Fill*>(state);
    for (std::int64_t t = first; t < last; t += W) {
        const int count = static_cast<int>(last - t < W ? last - t : W);
        write(f.out, f.type, t * f.dim, f.pattern, count * f.dim);
    }
}

struct Clear {
    const BackwardArgs* args;
    double* sums;  // [W * d] or nullptr
    int dim;
};

void clear(void* state, std::int64_t first, std::int64_t last) {
    const Clear& c = *static_cast<const Clear*>(state);
    const float zeros[W * max_dim] = {};
    alignas(64) float g[W * max_dim];
    for (std::int64_t t = first; t < last; t += W) {
        const int count = static_cast<int>(last - t < W ? last - t : W) * c.dim;
        write(c.args->grad_z, c.args->type, t * c.dim, zeros, count);
        if (!c.sums) continue;
        std::memset(g, 0, sizeof g);
        read(c.args->grad, c.args->type, t * c.dim, g, count);
        for (int i = 0; i < W * c.dim; ++i) c.sums[i] += static_cast<double>(g[i]);
    }
}

}  // namespace

void forward(const LevelPattern& p, const ForwardArgs& a, std::int64_t first, std::int64_t last) {
    alignas(64) float x[W * max_dim] = {};
    alignas(64) float out[W * max_dim];
    alignas(64) std::int32_t part[W * max_dim];
    for (std::int64_t t = first; t < last; t += W) {
        const int tokens = static_cast<int>(last - t < W ? last - t : W), count = tokens * p.dim;
        const bool direct = a.type == Float::f32 && tokens == W;  // no copy to and from a tile of fp32
        const float* from = direct ? static_cast<const float*>(a.z) + t * p.dim : x;
        float* to = direct ? static_cast<float*>(a.latents) + t * p.dim : out;
        if (!direct) read(a.z, a.type, t * p.dim, x, count);
        for (int i = 0; i < W * p.dim; i += V) {
            const vf v = load<vf>(from + i);
            const vi q = digits(p, v, i);
            const vf step = __builtin_convertvector(q, vf) - load<vf>(&p.half_width[i]);
            // by the reciprocal in two parts, which rounds as the division does: a division costs 16 cycles
            const vf value = step * load<vf>(&p.inverse_high[i]) + step * load<vf>(&p.inverse_low[i]);
            store(to + i, pick<vf>(v != v, v, value));
            store(part + i, q * load<vi>(&p.weight[i]));
        }
        if (!direct) write(a.latents, a.type, t * p.dim, out, count);
        add_up(p.dim, part, a.codes + t, tokens);
    }
    if (!a.prefix.keep) return;
    alignas(64) float pattern[W * max_dim];
    for (int i = 0; i < W * p.dim; ++i) pattern[i] = a.prefix.null[i % p.dim];
    Fill state{a.latents, pattern, a.type, p.dim};
    each_suffix(a.prefix, first, last, fill, &state);
}

void backward(const LevelPattern& p, const BackwardArgs& a, std::int64_t first, std::int64_t last, double* null) {
    alignas(64) float x[W * max_dim] = {}, g[W * max_dim] = {}, out[W * max_dim];
    for (std::int64_t t = first; t < last; t += W) {
        const int count = static_cast<int>(last - t < W ? last - t : W) * p.dim;
        const bool direct = a.type == Float::f32 && count == W * p.dim;
        const float* from = direct ? static_cast<const float*>(a.z) + t * p.dim : x;
        const float* up = direct ? static_cast<const float*>(a.grad) + t * p.dim : g;
        float* to = direct ? static_cast<float*>(a.grad_z) + t * p.dim : out;
        if (!direct) read(a.z, a.type, t * p.dim, x, count), read(a.grad, a.type, t * p.dim, g, count);
        for (int i = 0; i < W * p.dim; i += V) {
            const vf s = slope(load<vf>(from + i) + load<vf>(&p.shift[i]));
            store(to + i, load<vf>(up + i) * load<vf>(&p.gain[i]) * s);
        }
        if (!direct) write(a.grad_z, a.type, t * p.dim, out, count);
    }
    if (!a.prefix.keep) return;
    alignas(64) double sums[W * max_dim] = {};
    Clear state{&a, null ? sums : nullptr, p.dim};
    each_suffix(a.prefix, first, last, clear, &state);
    if (null)
        for (int i = 0; i < W * p.dim; ++i) null[i % p.dim] += sums[i];
}

}  // namespace FLEXLAM_VARIANT
}  // namespace flexlam
