// The parts of csrc/decode.h that threads share out, compiled once per instruction set (vectors.inl says how).
// Numbers are fp32 inside and rounded to their type where the model's modules round; a token's result is summed in one
// order, whoever else is there.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "decode_parts.h"
#include "typed.inl"

namespace flexlam {
namespace FLEXLAM_VARIANT {
namespace {

// Adds the products of V rows of `w` from element `i` of each on: x [inner] has been gone through up to there. What
// stands `ahead` elements further is asked for, because processors do not foresee the order: a block of 64 codes of the
// dmlab sizes took 114 ms with that, 130 without, and 115 with one row after the other.
template <Float F>
inline void add_products(const void* w, const std::int64_t* at, std::int64_t i, std::int64_t inner, std::int64_t ahead,
                         const float* x, vf* sum) {
    for (; i + V <= inner; i += V) {
        const vf part = load<vf>(x + i);
        for (int r = 0; r < V; ++r) {
            if (i * sizeof(typename Stored<F>::type) % 64 == 0)
                __builtin_prefetch(static_cast<const typename Stored<F>::type*>(w) + at[r] + i + ahead);
            sum[r] += load_as<F>(w, at[r] + i) * part;
        }
    }
    if (i == inner) return;
    const vf part = load<vf>(x + i);
    for (int r = 0; r < V; ++r) sum[r] += load_some<F>(w, at[r] + i, inner - i) * part;
}

// Goes through as much of x as two numbers at a time can be multiplied; returns how much.
template <Float F>
inline std::int64_t add_pair_products(const void* w, const std::int64_t* at, std::int64_t inner, std::int64_t ahead,
                                      const float* x, vf* sum) {
#ifdef __AVX512BF16__
    if constexpr (F == Float::bf16) {
        std::int64_t i = 0;
        for (; i + 2 * V <= inner; i += 2 * V) {
            const __m512bh part = _mm512_cvtne2ps_pbh((__m512)load<vf>(x + i + V), (__m512)load<vf>(x + i));
            for (int r = 0; r < V; ++r) {
                const std::uint16_t* from = static_cast<const std::uint16_t*>(w) + at[r] + i;
                __builtin_prefetch(from + ahead);
                const __m512bh row = (__m512bh)_mm512_loadu_si512(from);
                sum[r] = (vf)_mm512_dpbf16_ps((__m512)sum[r], row, part);
            }
        }
        return i;
    }
#endif
    static_cast<void>(w), static_cast<void>(at), static_cast<void>(inner), static_cast<void>(ahead);
    static_cast<void>(x), static_cast<void>(sum);
    return 0;
}

// Products of V rows of `w`, `stride` elements apart from element `first` on, with x [inner], which is rounded to F (zeros
// up to whole vectors): lane r is row r, and where there are fewer rows than lanes the last is taken again.
template <Float F>
inline vf dots(const void* w, std::int64_t first, std::int64_t stride, std::int64_t rows, std::int64_t inner,
               const float* x) {
    vf sum[V] = {};
    std::int64_t at[V];
    for (int r = 0; r < V; ++r) at[r] = first + stride * std::min<std::int64_t>(r, rows - 1);
    const std::int64_t done = add_pair_products<F>(w, at, inner, V * stride, x, sum);
    add_products<F>(w, at, done, inner, V * stride, x, sum);
    for (int left = V; left > 1; left /= 2)
        for (int r = 0; r < left / 2; ++r) sum[r] = add_pairs(sum[2 * r], sum[2 * r + 1]);
    return sum[0];
}

// The root mean square norm of x [n] of type `in` from element `first` on, times `weight`, into `out` (zeros up to whole
// vectors).
template <Float F>
void norm_row(Float in, const void* x, std::int64_t first, const void* weight, std::int64_t n, float eps, float* out) {
    vf squares{};
    for (std::int64_t i = 0; i < n; i += V) {
        const vf v = rounded<F>(load_typed(in, x, first + i, n - i));
        squares += v * v;
    }
    const float scale = 1.0f / std::sqrt(sum_of(squares) / static_cast<float>(n) + eps);
    for (std::int64_t i = 0; i < n; i += V) {
        const vf y = rounded<F>(rounded<F>(load_typed(in, x, first + i, n - i)) * scale);
        store(out + i, rounded<F>(load_some<F>(weight, i, n - i) * y));
    }
}

inline vf silu(vf x) { return x / (1.0f + exp_of(-x)); }

template <Float F>
void rows_of(const LinearArgs& a, float* y) {
    for (std::int64_t r = 0; r < a.rows; ++r) {
        float* row = y + r * padded(a.inner);
        if (a.norm) {
            norm_row<F>(a.in, a.x, r * a.inner, a.norm, a.inner, a.eps, row);
            continue;
        }
        for (std::int64_t i = 0; i < a.inner; i += V)
            store(row + i, rounded<F>(load_typed(a.in, a.x, r * a.inner + i, a.inner - i)));
    }
}

template <Float F>
void outs_of(const LinearArgs& a, const float* y, std::int64_t first, std::int64_t last) {
    for (std::int64_t n = first; n < last; n += V) {
        const std::int64_t count = std::min<std::int64_t>(V, last - n);
        for (std::int64_t r = 0; r < a.rows; ++r) {
            const float* x = y + r * padded(a.inner);
            vf sum = dots<F>(a.weight, n * a.inner, a.inner, count, a.inner, x);
            if (a.gated) sum = silu(sum) * dots<F>(a.weight, (a.outs + n) * a.inner, a.inner, count, a.inner, x);
            const std::int64_t at = r * a.outs + n;
            if (a.residual) sum += load_typed(a.to, a.residual, at, count);
            store_typed(a.to, a.out, at, sum, count);
        }
    }
}

template <Float F>
void write_token(const WriteArgs& a, std::int64_t token, std::int64_t first, std::int64_t last) {
    const std::int64_t half = a.dim / 2, row = a.rows[token], from = token * (a.heads + 2 * a.kv_heads) * a.dim;
    const float *cosine = a.cosine + token * half, *sine = a.sine + token * half;
    const bool stored = row >= 0 && row < a.pool;
    thread_local std::vector<float> buffer;
    buffer.resize(static_cast<std::size_t>(padded(a.dim)));
    float* y = buffer.data();
    for (std::int64_t h = first; h < last; ++h) {
        const bool query = h < a.heads;
        if (!query && !stored) return;
        norm_row<F>(a.in, a.qkv, from + h * a.dim, query ? a.q_norm : a.k_norm, a.dim, a.eps, y);
        for (std::int64_t i = 0; i < half; ++i) {
            const float even = y[i], odd = y[half + i];
            y[i] = even * cosine[i] - odd * sine[i];
            y[half + i] = odd * cosine[i] + even * sine[i];
        }
        const std::int64_t at = (query ? token * a.heads + h : row * a.kv_heads + h - a.heads) * a.dim;
        for (std::int64_t i = 0; i < a.dim; i += V)
            store_typed(query ? a.in : a.pages, query ? a.q : a.k, at + i, rounded<F>(load<vf>(y + i)), a.dim - i);
        for (std::int64_t i = 0; i < a.dim && !query; i += V) {
            const vf value = load_typed(a.in, a.qkv, from + (h + a.kv_heads) * a.dim + i, a.dim - i);
            store_typed(a.pages, a.v, at + i, rounded<F>(value), a.dim - i);
        }
    }
}

// sum [C vectors] += weights[t] * v[t], for tokens `stride` elements apart from element `first` on.
template <Float F, int C>
inline void add_values(const void* v, std::int64_t first, std::int64_t stride, const float* weights,
                       std::int64_t tokens, float* sum) {
    vf s[C];
    for (int c = 0; c < C; ++c) s[c] = load<vf>(sum + c * V);
    for (std::int64_t t = 0; t < tokens; ++t)
        for (int c = 0; c < C; ++c) s[c] += weights[t] * load_as<F>(v, first + t * stride + c * V);
    for (int c = 0; c < C; ++c) store(sum + c * V, s[c]);
}

// The same of 2 C vectors of bf16, which are taken apart into every other number instead of being widened.
template <int C>
inline void add_pair_values(const void* v, std::int64_t first, std::int64_t stride, const float* weights,
                            std::int64_t tokens, float* sum) {
    vf even[C] = {}, odd[C] = {};
    for (std::int64_t t = 0; t < tokens; ++t)
        for (int c = 0; c < C; ++c) {
            const vu pair = load<vu>(static_cast<const std::uint16_t*>(v) + first + t * stride + 2 * c * V);
            even[c] += weights[t] * bits<vf>(pair << 16);
            odd[c] += weights[t] * bits<vf>(pair & 0xffff0000u);
        }
    for (int c = 0; c < C; ++c)
        for (int i = 0; i < V; ++i) {
            sum[2 * (c * V + i)] += even[c][i];
            sum[2 * (c * V + i) + 1] += odd[c][i];
        }
}

template <Float F>
inline void add_head(const void* v, std::int64_t first, std::int64_t stride, const float* weights, std::int64_t tokens,
                     std::int64_t dim, float* sum) {
    std::int64_t i = 0;
    if constexpr (F == Float::bf16)
        for (; i + 4 * V <= dim; i += 4 * V) add_pair_values<2>(v, first + i, stride, weights, tokens, sum + i);
    for (; i + 4 * V <= dim; i += 4 * V) add_values<F, 4>(v, first + i, stride, weights, tokens, sum + i);
    for (; i + V <= dim; i += V) add_values<F, 1>(v, first + i, stride, weights, tokens, sum + i);
    if (i == dim) return;
    vf s = load<vf>(sum + i);
    for (std::int64_t t = 0; t < tokens; ++t) s += weights[t] * load_some<F>(v, first + t * stride + i, dim - i);
    store(sum + i, s);
}

// Where the tokens of one split stand: runs of neighbours, one for each page.
struct Run {
    std::int64_t row, at, count;  // first row of the pool, first token of the split, tokens
};

inline Run run_of(const AttendArgs& a, std::int64_t session, std::int64_t from, std::int64_t at, std::int64_t count) {
    const std::int64_t entry = (from + at) / a.page, page = a.table[session * a.entries + entry];
    const std::int64_t known = std::clamp<std::int64_t>(page, 0, a.pages - 1);
    return {known * a.page, at, std::min(a.page, count - at)};
}

// Softmax weights of scores [count] in place, relative to the largest; returns that and their sum.
inline void weigh(float* scores, std::int64_t count, float* largest, float* total) {
    for (std::int64_t t = count; t % V; ++t) scores[t] = -std::numeric_limits<float>::infinity();
    vf most = load<vf>(scores), sum{};
    for (std::int64_t t = V; t < count; t += V) {
        const vf s = load<vf>(scores + t);
        most = pick<vf>(s > most, s, most);
    }
    *largest = most[0];
    for (int i = 1; i < V; ++i) *largest = std::max(*largest, most[i]);
    for (std::int64_t t = 0; t < count; t += V) {
        const vf w = exp_of(load<vf>(scores + t) - *largest);
        store(scores + t, w);
        sum += w;  // those beyond count are 1e-38, which no sum notices that has a 1 in it
    }
    *total = sum_of(sum);
}

template <Float F>
void part_of(const AttendArgs& a, const Parts& p, std::int64_t query, std::int64_t split) {
    const std::int64_t session = query / a.tokens, stride = a.kv_heads * a.dim, group = a.heads / a.kv_heads;
    const std::int64_t own = a.start[session] + query % a.tokens + 1, from = split * p.entries * a.page;
    const std::int64_t seen = a.context[session] * a.page + std::max<std::int64_t>(own, 0);
    const std::int64_t count = std::clamp<std::int64_t>(std::min(seen, a.entries * a.page) - from, 0, p.entries * a.page);
    float* out = p.sums + (query * p.splits + split) * a.heads * p.width;
    for (std::int64_t h = 0; h < a.heads; ++h) p.total(out + h * p.width) = 0.0f;
    if (!count) return;
    const std::int64_t wide = padded(a.dim), room = padded(p.entries * a.page) + V;
    thread_local std::vector<float> buffer;
    buffer.resize(static_cast<std::size_t>(a.heads * (wide + room)));
    float *q = buffer.data(), *scores = q + a.heads * wide;
    const float scale = 1.0f / std::sqrt(static_cast<float>(a.dim));
    for (std::int64_t h = 0; h < a.heads; ++h)
        for (std::int64_t i = 0; i < a.dim; i += V)
            store(q + h * wide + i, rounded<F>(load_typed(a.in, a.q, (query * a.heads + h) * a.dim + i, a.dim - i)));
    for (std::int64_t t = 0; t < count;) {
        const Run run = run_of(a, session, from, t, count);
        for (std::int64_t u = 0; u < run.count; u += V)
            for (std::int64_t h = 0; h < a.heads; ++h) {
                const std::int64_t first = (run.row + u) * stride + h / group * a.dim;
                const vf s = dots<F>(a.k, first, stride, run.count - u, a.dim, q + h * wide);
                store(scores + h * room + t + u, s * scale);
            }
        t += run.count;
    }
    for (std::int64_t h = 0; h < a.heads; ++h) {
        float* sum = out + h * p.width;
        std::fill_n(sum, wide, 0.0f);
        weigh(scores + h * room, count, &p.largest(sum), &p.total(sum));
    }
    for (std::int64_t t = 0; t < count;) {
        const Run run = run_of(a, session, from, t, count);
        for (std::int64_t h = 0; h < a.heads; ++h)
            add_head<F>(a.v, run.row * stride + h / group * a.dim, stride, scores + h * room + t, run.count, a.dim,
                        out + h * p.width);
        t += run.count;
    }
}

// Writes nothing but the result: threads that need it all may each do it for themselves.
void join_parts(const AttendArgs& a, const Parts& p, std::int64_t query) {
    thread_local std::vector<float> factors;
    factors.resize(static_cast<std::size_t>(p.splits));
    for (std::int64_t h = 0; h < a.heads; ++h) {
        float* parts = p.sums + (query * p.splits * a.heads + h) * p.width;
        const auto part = [&](std::int64_t s) { return parts + s * a.heads * p.width; };
        const auto used = [&](std::int64_t s) { return p.total(part(s)) != 0.0f; };
        float largest = -std::numeric_limits<float>::infinity(), total = 0.0f;
        for (std::int64_t s = 0; s < p.splits; ++s)
            if (used(s)) largest = std::max(largest, p.largest(part(s)));
        for (std::int64_t s = 0; s < p.splits; ++s)
            if (used(s)) total += p.total(part(s)) * (factors[s] = std::exp(p.largest(part(s)) - largest));
        for (std::int64_t i = 0; i < a.dim; i += V) {
            vf sum{};
            for (std::int64_t s = 0; s < p.splits; ++s)
                if (used(s)) sum += factors[s] * load<vf>(part(s) + i);
            if (total != 0.0f) sum /= total;
            store_typed(a.in, a.out, (query * a.heads + h) * a.dim + i, sum, a.dim - i);
        }
    }
}

template <Float F>
void embed(const void* embedding, std::int64_t code, const void* place, std::int64_t slot, std::int64_t n, float* x) {
    for (std::int64_t i = 0; i < n; i += V) {
        vf y = load_some<F>(embedding, code * n + i, n - i);
        if (place) y = rounded<F>(y + load_some<F>(place, slot * n + i, n - i));
        store_some<Float::f32>(x, i, y, n - i);
    }
}

template <Float F>
void norm_typed(const void* x, std::int64_t row, const void* weight, std::int64_t width, float eps, void* out) {
    thread_local std::vector<float> buffer;
    buffer.resize(static_cast<std::size_t>(padded(width)));
    norm_row<F>(F, x, row * width, weight, width, eps, buffer.data());
    for (std::int64_t i = 0; i < width; i += V) store_some<F>(out, row * width + i, load<vf>(&buffer[i]), width - i);
}

template <Float F>
void swiglu_typed(const void* x, std::int64_t row, std::int64_t inner, void* out) {
    for (std::int64_t i = 0; i < inner; i += V) {
        const vf gate = load_some<F>(x, 2 * row * inner + i, inner - i);
        const vf up = load_some<F>(x, (2 * row + 1) * inner + i, inner - i);
        store_some<F>(out, row * inner + i, rounded<F>(silu(gate)) * up, inner - i);
    }
}

}  // namespace

const DecodeKernels& decode_kernels(Float type) {
#define FLEXLAM_KERNELS(F) \
    { rows_of<F>, outs_of<F>, write_token<F>, part_of<F>, join_parts, embed<F>, norm_typed<F>, swiglu_typed<F> }
    static const DecodeKernels f32 = FLEXLAM_KERNELS(Float::f32), f16 = FLEXLAM_KERNELS(Float::f16),
                               bf16 = FLEXLAM_KERNELS(Float::bf16);
#undef FLEXLAM_KERNELS
    return type == Float::f32 ? f32 : type == Float::f16 ? f16 : bf16;
}

}  // namespace FLEXLAM_VARIANT
}  // namespace flexlam
