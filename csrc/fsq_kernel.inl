// One chunk of FSQ, compiled once per instruction set (vectors.inl says how the including file chooses it).
// Floating-point contraction is off (CMakeLists.txt), so every variant returns the same bits.
#include <cmath>
#include <cstring>

#include "fsq.h"
#include "vectors.inl"

namespace flexlam {
namespace FLEXLAM_VARIANT {
namespace {

constexpr int W = LevelPattern::lanes;  // tokens of a tile
constexpr int max_dim = 8;
static_assert(W % V == 0);

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
    const vf e = exp_within(y);
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
