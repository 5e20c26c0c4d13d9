// The parts of csrc/rows.h that threads share out, compiled once per instruction set (vectors.inl says how).
#include <cmath>
#include <type_traits>
#include <vector>

#include "elements.inl"
#include "rows_parts.h"

namespace flexlam {
namespace FLEXLAM_VARIANT {
namespace {

template <Float F>
using Of = std::integral_constant<Float, F>;

// Calls `body` with the type as a constant.
template <class Body>
inline void typed(Float type, Body&& body) {
    if (type == Float::f32) return body(Of<Float::f32>{});
    type == Float::bf16 ? body(Of<Float::bf16>{}) : body(Of<Float::f16>{});
}

// Room for `rows` rows of whole vectors, which a thread keeps from call to call.
inline float* room_for(std::int64_t rows, std::int64_t width) {
    thread_local std::vector<float> kept;
    const auto wanted = static_cast<std::size_t>(rows * whole(width));
    if (kept.size() < wanted) kept.resize(wanted);
    return kept.data();
}

inline std::int64_t start(const Rows& r, std::int64_t group, std::int64_t row) { return group * r.group + row * r.row; }

// A row in fp32: where it stands if it is that already, in whole vectors, else in `room` (zeros up to whole vectors).
inline const float* widen(const Rows& r, std::int64_t group, std::int64_t row, std::int64_t n, float* room) {
    const std::int64_t first = start(r, group, row);
    if (r.type == Float::f32 && n % V == 0) return static_cast<const float*>(r.data) + first;
    typed(r.type, [&](auto type) {
        std::int64_t i = 0;
        for (; i + V <= n; i += V) store(room + i, load_as<decltype(type)::value>(r.data, first + i));
        if (i < n) store(room + i, load_some<decltype(type)::value>(r.data, first + i, n - i));
    });
    return room;
}

// Writes `value(i)`, a vector, for every i of a row.
template <class Value>
inline void narrow(const Rows& r, std::int64_t group, std::int64_t row, std::int64_t n, Value&& value) {
    const std::int64_t first = start(r, group, row);
    typed(r.type, [&](auto type) {
        std::int64_t i = 0;
        for (; i + V <= n; i += V) store_as<decltype(type)::value>(r.data, first + i, value(i));
        if (i < n) store_some<decltype(type)::value>(r.data, first + i, value(i), n - i);
    });
}

// Zeros beyond the first `count` lanes.
inline vf within(vf x, std::int64_t count) {
    if (count >= V) return x;
    vi lane{};
    for (int i = 0; i < V; ++i) lane[i] = i;
    return pick<vf>(lane < static_cast<std::int32_t>(count), x, vf{});
}

// The sum of `value(i)`, a vector, over a row; two at a time, because each addition waits for the one before.
template <class Value>
inline float total(std::int64_t n, Value&& value) {
    vf even{}, odd{};
    std::int64_t i = 0;
    for (; i + V < n; i += 2 * V) even += value(i), odd += value(i + V);
    if (i < n) even += value(i);
    return sum_of(even + odd);
}

// The scale of a group, to be multiplied by.
inline void factors(const Rows& scale, std::int64_t group, std::int64_t n, bool one, float* room) {
    const float* from = widen(scale, group, 0, n, room);
    for (std::int64_t i = 0; i < n; i += V) store(room + i, one ? load<vf>(from + i) + 1.0f : load<vf>(from + i));
}

inline vf rounded_to(Float type, vf x) {
    if (type == Float::f32) return x;
    return type == Float::bf16 ? rounded<Float::bf16>(x) : rounded<Float::f16>(x);
}

// Sums over rows [first, last) of `width` numbers: `block(first, last, sums)` adds some rows, 16 at a time, whose sums are then
// added. One after the other, 128 would lose over twice as much in rounding.
template <class Block>
inline void sum_blocks(std::int64_t first, std::int64_t last, std::int64_t width, float* some, float* sums, Block&& block) {
    constexpr std::int64_t rows = 16;
    std::fill_n(sums, width, 0.0f);
    for (std::int64_t r = first; r < last; r += rows) {
        std::fill_n(some, width, 0.0f);
        block(r, r + rows < last ? r + rows : last, some);
        for (std::int64_t i = 0; i < width; i += V) store(sums + i, load<vf>(sums + i) + load<vf>(some + i));
    }
}

void norm(const NormArgs& a, std::int64_t group, std::int64_t first, std::int64_t last) {
    const std::int64_t n = a.extent.width, rows = a.extent.groups * a.extent.count;
    float* room = room_for(3, n);
    float *factor = room + whole(n), *offset = factor + whole(n);
    factors(a.scale, group, n, a.one, factor);
    const float* shift = a.shift.data ? widen(a.shift, group, 0, n, offset) : nullptr;
    for (std::int64_t r = first; r < last; ++r) {
        const float* x = widen(a.x, group, r, n, room);
        float mean = 0.0f;
        if (a.center) mean = total(n, [&](std::int64_t i) { return load<vf>(x + i); }) / static_cast<float>(n);
        const float squares = total(n, [&](std::int64_t i) {
            const vf d = within(load<vf>(x + i) - mean, n - i);
            return d * d;
        });
        const float rstd = 1.0f / std::sqrt(squares / static_cast<float>(n) + a.eps);
        narrow(a.out, group, r, n, [&](std::int64_t i) {
            vf y = (load<vf>(x + i) - mean) * rstd;
            if (!a.center) y = rounded_to(a.x.type, y);
            y *= load<vf>(factor + i);
            return shift ? y + load<vf>(shift + i) : y;
        });
        a.stats[group * a.extent.count + r] = rstd;
        if (a.center) a.stats[rows + group * a.extent.count + r] = mean;
    }
}

// With y = (x - mean) * rstd and h = grad * factor: dx = rstd * (h - mean(h) - y * mean(h * y)), where a root mean square has
// no mean(h); the scale's gradient sums grad * y and the shift's grad.
void norm_grad(const NormGradArgs& a, std::int64_t group, std::int64_t first, std::int64_t last, float* sums) {
    const std::int64_t n = a.extent.width, rows = a.extent.groups * a.extent.count;
    float* room = room_for(5, n);
    float *factor = room + whole(n), *other = factor + whole(n), *some = other + whole(n);
    factors(a.scale, group, n, a.one, factor);
    const float share = 1.0f / static_cast<float>(n);
    const auto add_row = [&](std::int64_t r, float* dscale, float* dshift) {
        const float *x = widen(a.x, group, r, n, room), *grad = widen(a.grad, group, r, n, other);
        const float rstd = a.stats[group * a.extent.count + r];
        const float mean = a.center ? a.stats[rows + group * a.extent.count + r] : 0.0f;
        vf level{}, slope{};
        for (std::int64_t i = 0; i < n; i += V) {
            const vf g = load<vf>(grad + i), h = g * load<vf>(factor + i), y = (load<vf>(x + i) - mean) * rstd;
            level += h;
            slope += h * y;
            const vf seen = a.center ? y : rounded_to(a.x.type, y);  // what the scale was multiplied with
            store(dscale + i, load<vf>(dscale + i) + g * seen);
            store(dshift + i, load<vf>(dshift + i) + g);
        }
        const float of_level = a.center ? sum_of(level) * share : 0.0f, of_slope = sum_of(slope) * share;
        narrow(a.dx, group, r, n, [&](std::int64_t i) {
            const vf h = load<vf>(grad + i) * load<vf>(factor + i), y = (load<vf>(x + i) - mean) * rstd;
            return (h - of_level - y * of_slope) * rstd;
        });
    };
    sum_blocks(first, last, 2 * whole(n), some, sums, [&](std::int64_t from, std::int64_t to, float* part) {
        for (std::int64_t r = from; r < to; ++r) add_row(r, part, part + whole(n));
    });
}

void gate(const GateArgs& a, std::int64_t group, std::int64_t first, std::int64_t last) {
    const std::int64_t n = a.extent.width;
    float* room = room_for(3, n);
    const float* factor = widen(a.gate, group, 0, n, room + 2 * whole(n));
    for (std::int64_t r = first; r < last; ++r) {
        const float *x = widen(a.x, group, r, n, room), *y = widen(a.y, group, r, n, room + whole(n));
        narrow(a.out, group, r, n,
               [&](std::int64_t i) { return load<vf>(x + i) + load<vf>(factor + i) * load<vf>(y + i); });
    }
}

void gate_grad(const GateGradArgs& a, std::int64_t group, std::int64_t first, std::int64_t last, float* sums) {
    const std::int64_t n = a.extent.width;
    float* room = room_for(4, n);
    const float* factor = widen(a.gate, group, 0, n, room + 2 * whole(n));
    sum_blocks(first, last, whole(n), room + 3 * whole(n), sums, [&](std::int64_t from, std::int64_t to, float* part) {
        for (std::int64_t r = from; r < to; ++r) {
            const float *grad = widen(a.grad, group, r, n, room), *y = widen(a.y, group, r, n, room + whole(n));
            narrow(a.dy, group, r, n, [&](std::int64_t i) {
                const vf g = load<vf>(grad + i);
                store(part + i, load<vf>(part + i) + g * load<vf>(y + i));
                return g * load<vf>(factor + i);
            });
        }
    });
}

void join(const Rows& out, std::int64_t group, const float* sums, std::int64_t pieces, std::int64_t stride,
          std::int64_t width) {
    constexpr std::int64_t block = 16;  // as above
    narrow(out, group, 0, width, [&](std::int64_t i) {
        vf sum{};
        for (std::int64_t p = 0; p < pieces; p += block) {
            vf some{};
            for (std::int64_t q = p; q < pieces && q < p + block; ++q) some += load<vf>(sums + q * stride + i);
            sum += some;
        }
        return sum;
    });
}

// The logistic function of what lies within -87..87, and what it lacks to 1.
struct Logistic {
    vf value, rest;
};

#ifdef __AVX512F__
// exp(y) to 1e-4 of it, by a cubic for 2^x, and a reciprocal to 6e-5: half a unit of bf16's last place is 2e-3.
inline vf rough_exp(vf y) {
    const __m512 x = (__m512)(y * 1.44269504f);
    const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const vf f = (vf)_mm512_sub_ps(x, n);
    return (vf)_mm512_scalef_ps((__m512)(((0.05500886f * f + 0.24221096f) * f + 0.69328294f) * f + 1.0f), n);
}
#endif

// Of numbers that will be stored as F.
template <Float F>
inline Logistic logistic(vf y) {
#ifdef __AVX512F__
    if constexpr (F == Float::bf16) {
        const vf e = rough_exp(-y), value = (vf)_mm512_rcp14_ps((__m512)(1.0f + e));
        return {value, e * value};
    }
#endif
    const vf e = exp_within(-y), value = 1.0f / (1.0f + e);
    return {value, e * value};
}

inline vf clamped(vf x, float most) {  // NaN stays
    x = pick<vf>(x > most, vf{} + most, x);
    return pick<vf>(x < -most, vf{} - most, x);
}

// x * (1 + tanh(y)) / 2 = x * logistic(2 y), with 2 y = x (a + b x^2). At 10 the logistic function is 1 in fp32, and 1e-38
// at -10; y is 44 there, where exp is still finite.
template <Float F>
struct Gelu {
    static constexpr float a = 1.5957691216f, b = 0.0713548162f, most = 10.0f;

    static inline Logistic share(vf x) { return logistic<F>(x * (a + b * x * x)); }
    static inline vf value(vf x) {
        const vf share_of = share(clamped(x, most)).value;
        return x * pick<vf>(x < -most, vf{}, share_of);
    }
    static inline vf slope(vf x) {
        const vf y = clamped(x, most);
        const Logistic s = share(y);
        return s.value + y * s.value * s.rest * (a + 3.0f * b * y * y);
    }
};

template <Float F>
struct Silu {
    static constexpr float most = 87.0f;

    static inline vf value(vf x) { return x * pick<vf>(x < -most, vf{}, logistic<F>(clamped(x, most)).value); }
};

// Calls `body(i, count, type)` for every vector of a row of a map; `count` is V but for the last.
template <class Body>
inline void each_vector(const MapArgs& a, std::int64_t row, Body&& body) {
    const std::int64_t n = row == a.rows - 1 ? a.last : a.width;
    typed(a.type, [&](auto type) {
        std::int64_t i = 0;
        for (; i + V <= n; i += V) body(i, Of<decltype(type)::value>{}, std::integral_constant<std::int64_t, V>{});
        if (i < n) body(i, Of<decltype(type)::value>{}, n - i);
    });
}

void gelu(const MapArgs& a, std::int64_t row) {
    const std::int64_t from = row * a.a_row, to = row * a.width;
    each_vector(a, row, [&](std::int64_t i, auto type, auto count) {
        constexpr Float F = decltype(type)::value;
        const vf x = load_some<F>(a.a, from + i, count);
        if (!a.grad) return store_some<F>(a.out, to + i, Gelu<F>::value(x), count);
        store_some<F>(a.out, to + i, load_some<F>(a.grad, to + i, count) * Gelu<F>::slope(x), count);
    });
}

void swiglu(const MapArgs& a, std::int64_t row) {
    const std::int64_t left = row * a.a_row, right = row * a.b_row, to = row * a.width;
    each_vector(a, row, [&](std::int64_t i, auto type, auto count) {
        constexpr Float F = decltype(type)::value;
        const vf x = load_some<F>(a.a, left + i, count), up = load_some<F>(a.b, right + i, count);
        if (!a.grad) return store_some<F>(a.out, to + i, Silu<F>::value(x) * up, count);
        const vf grad = load_some<F>(a.grad, to + i, count), y = clamped(x, Silu<F>::most);
        const Logistic s = logistic<F>(y);
        store_some<F>(a.out, to + i, grad * up * s.value * (1.0f + y * s.rest), count);
        store_some<F>(a.other, to + i, grad * Silu<F>::value(x), count);
    });
}

}  // namespace

const RowKernels& row_kernels() {
    static const RowKernels kernels = {norm, norm_grad, gate, gate_grad, join, gelu, swiglu};
    return kernels;
}

}  // namespace FLEXLAM_VARIANT
}  // namespace flexlam
