// The parts of csrc/decode.h that threads share out, compiled once per instruction set (vectors.inl says how).
// Numbers are fp32 inside and rounded to their type where the model's modules round; a token's result is summed in one
// order, whoever else is there.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "decode_parts.h"
#include "vectors.inl"

namespace flexlam {
namespace FLEXLAM_VARIANT {
namespace {

template <Float F>
struct Stored {
    using type = std::uint16_t;
};
template <>
struct Stored<Float::f32> {
    using type = float;
};

// One vector of numbers of type F from element `i` on.
template <Float F>
inline vf load_as(const void* p, std::int64_t i) {
    const auto* at = static_cast<const typename Stored<F>::type*>(p) + i;
    if constexpr (F == Float::f32) return load<vf>(at);
    if constexpr (F == Float::bf16) return from_bf16(load<vh>(at));
    return from_f16(load<vh>(at));
}

template <Float F>
inline void store_as(void* p, std::int64_t i, vf x) {
    auto* at = static_cast<typename Stored<F>::type*>(p) + i;
    if constexpr (F == Float::f32) store(at, x);
    if constexpr (F == Float::bf16) store(at, to_bf16(x));
    if constexpr (F == Float::f16) store(at, to_f16(x));
}

// The first `count` of a vector, zeros behind them.
template <Float F>
inline vf load_some(const void* p, std::int64_t i, std::int64_t count) {
    if (count >= V) return load_as<F>(p, i);
    typename Stored<F>::type some[V] = {};
    std::copy_n(static_cast<const typename Stored<F>::type*>(p) + i, count, some);
    return load_as<F>(some, 0);
}

template <Float F>
inline void store_some(void* p, std::int64_t i, vf x, std::int64_t count) {
    if (count >= V) return store_as<F>(p, i, x);
    typename Stored<F>::type some[V];
    store_as<F>(some, 0, x);
    std::copy_n(some, count, static_cast<typename Stored<F>::type*>(p) + i);
}

template <Float F>
inline vf rounded(vf x) {
    if constexpr (F == Float::bf16) return from_bf16(to_bf16(x));
    if constexpr (F == Float::f16) return from_f16(to_f16(x));
    return x;
}

inline float sum_of(vf x) {
    for (int lanes = V; lanes > 1; lanes /= 2) x = add_pairs(x, x);
    return x[0];
}

// Products of V rows of `w`, `stride` elements apart from element `first` on, with x [inner] (zeros up to whole vectors):
// lane r is row r, and where there are fewer rows than lanes the last is taken again.
template <Float F>
inline vf dots(const void* w, std::int64_t first, std::int64_t stride, std::int64_t rows, std::int64_t inner,
               const float* x) {
    vf sum[V] = {};
    std::int64_t at[V];
    for (int r = 0; r < V; ++r) at[r] = first + stride * std::min<std::int64_t>(r, rows - 1);
    std::int64_t i = 0;
    for (; i + V <= inner; i += V) {
        const vf part = load<vf>(x + i);
        for (int r = 0; r < V; ++r) sum[r] += load_as<F>(w, at[r] + i) * part;
    }
    if (i < inner) {
        const vf part = load<vf>(x + i);
        for (int r = 0; r < V; ++r) sum[r] += load_some<F>(w, at[r] + i, inner - i) * part;
    }
    for (int left = V; left > 1; left /= 2)
        for (int r = 0; r < left / 2; ++r) sum[r] = add_pairs(sum[2 * r], sum[2 * r + 1]);
    return sum[0];
}

// The root mean square norm of x [n] from element `first` on, times `weight`, into `out` (zeros up to whole vectors).
template <Float F>
void norm_row(const void* x, std::int64_t first, const void* weight, std::int64_t n, float eps, float* out) {
    vf squares{};
    for (std::int64_t i = 0; i < n; i += V) {
        const vf v = load_some<F>(x, first + i, n - i);
        squares += v * v;
    }
    const float scale = 1.0f / std::sqrt(sum_of(squares) / static_cast<float>(n) + eps);
    for (std::int64_t i = 0; i < n; i += V) {
        const vf y = rounded<F>(load_some<F>(x, first + i, n - i) * scale);
        store(out + i, rounded<F>(load_some<F>(weight, i, n - i) * y));
    }
}

// The exponential of anything; 1e-38 below -87.
inline vf exp_of(vf y) {
    const vf low = pick<vf>(y < -87.0f, vf{} - 87.0f, y);
    const vf e = exp_within(pick<vf>(low > 88.0f, vf{} + 88.0f, low));
    return pick<vf>(y > 88.0f, vf{} + std::numeric_limits<float>::infinity(), e);
}

inline vf silu(vf x) { return x / (1.0f + exp_of(-x)); }

template <Float F>
void rows_of(const LinearArgs& a, float* y) {
    const std::int64_t wide = padded(a.inner);
    for (std::int64_t r = 0; r < a.rows; ++r) {
        if (a.norm) {
            norm_row<F>(a.x, r * a.inner, a.norm, a.inner, a.eps, y + r * wide);
            continue;
        }
        for (std::int64_t i = 0; i < a.inner; i += V)
            store(y + r * wide + i, load_some<F>(a.x, r * a.inner + i, a.inner - i));
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
            if (a.residual) sum += load_some<F>(a.residual, at, count);
            a.fp32_out ? store_some<Float::f32>(a.out, at, sum, count) : store_some<F>(a.out, at, sum, count);
        }
    }
}

// Element of type F at `i`.
template <Float F>
inline void put(void* p, std::int64_t i, float x) {
    store_some<F>(p, i, vf{} + x, 1);
}

template <Float F>
void write_token(const WriteArgs& a, const double* frequency, std::int64_t token) {
    const std::int64_t half = a.dim / 2, row = a.rows[token];
    const std::int64_t from = token * (a.heads + 2 * a.kv_heads) * a.dim;
    thread_local std::vector<float> buffer;
    buffer.resize(static_cast<std::size_t>(2 * padded(a.dim)));
    float *cosine = buffer.data(), *sine = cosine + half, *y = cosine + padded(a.dim);
    for (std::int64_t i = 0; i < half; ++i) {
        const double angle = static_cast<double>(a.positions[token]) * frequency[i];
        cosine[i] = static_cast<float>(std::cos(angle)), sine[i] = static_cast<float>(std::sin(angle));
    }
    const bool stored = row >= 0 && row < a.pool;
    for (std::int64_t h = 0; h < a.heads + a.kv_heads; ++h) {
        const bool query = h < a.heads;
        if (!query && !stored) break;
        norm_row<F>(a.qkv, from + h * a.dim, query ? a.q_norm : a.k_norm, a.dim, a.eps, y);
        for (std::int64_t i = 0; i < half; ++i) {
            const float first = y[i], second = y[half + i];
            y[i] = first * cosine[i] - second * sine[i];
            y[half + i] = second * cosine[i] + first * sine[i];
        }
        void* out = query ? a.q : a.k;
        const std::int64_t at = (query ? token * a.heads + h : row * a.kv_heads + h - a.heads) * a.dim;
        for (std::int64_t i = 0; i < a.dim; i += V) store_some<F>(out, at + i, load<vf>(y + i), a.dim - i);
    }
    if (!stored) return;
    using T = typename Stored<F>::type;
    const std::int64_t values = a.kv_heads * a.dim;
    std::copy_n(static_cast<const T*>(a.qkv) + from + (a.heads + a.kv_heads) * a.dim, values,
                static_cast<T*>(a.v) + row * values);
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

template <Float F>
inline void add_head(const void* v, std::int64_t first, std::int64_t stride, const float* weights, std::int64_t tokens,
                     std::int64_t dim, float* sum) {
    std::int64_t i = 0;
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
            store(q + h * wide + i, load_some<F>(a.q, (query * a.heads + h) * a.dim + i, a.dim - i) * scale);
    for (std::int64_t t = 0; t < count;) {
        const Run run = run_of(a, session, from, t, count);
        for (std::int64_t u = 0; u < run.count; u += V)
            for (std::int64_t h = 0; h < a.heads; ++h) {
                const std::int64_t first = (run.row + u) * stride + h / group * a.dim;
                const vf s = dots<F>(a.k, first, stride, run.count - u, a.dim, q + h * wide);
                store(scores + h * room + t + u, s);
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

template <Float F>
void join_parts(const AttendArgs& a, const Parts& p, std::int64_t query) {
    for (std::int64_t h = 0; h < a.heads; ++h) {
        float* parts = p.sums + (query * p.splits * a.heads + h) * p.width;
        const auto part = [&](std::int64_t s) { return parts + s * a.heads * p.width; };
        float largest = -std::numeric_limits<float>::infinity(), total = 0.0f;
        const auto used = [&](std::int64_t s) { return p.total(part(s)) != 0.0f; };
        for (std::int64_t s = 0; s < p.splits; ++s)
            if (used(s)) largest = std::max(largest, p.largest(part(s)));
        for (std::int64_t s = 0; s < p.splits; ++s)
            if (used(s)) total += p.total(part(s)) * (p.scale(part(s)) = std::exp(p.largest(part(s)) - largest));
        for (std::int64_t i = 0; i < a.dim; i += V) {
            vf sum{};
            for (std::int64_t s = 0; s < p.splits; ++s)
                if (used(s)) sum += p.scale(part(s)) * load<vf>(part(s) + i);
            if (total != 0.0f) sum /= total;
            store_some<F>(a.out, (query * a.heads + h) * a.dim + i, sum, a.dim - i);
        }
    }
}

}  // namespace

const DecodeKernels& decode_kernels(Float type) {
#define FLEXLAM_KERNELS(F) \
    { rows_of<F>, outs_of<F>, write_token<F>, part_of<F>, join_parts<F> }
    static const DecodeKernels f32 = FLEXLAM_KERNELS(Float::f32), f16 = FLEXLAM_KERNELS(Float::f16),
                               bf16 = FLEXLAM_KERNELS(Float::bf16);
#undef FLEXLAM_KERNELS
    return type == Float::f32 ? f32 : type == Float::f16 ? f16 : bf16;
}

}  // namespace FLEXLAM_VARIANT
}  // namespace flexlam
