// Vectors to and from memory of any number type, and what kernels do with them; compiled once per instruction set.
#pragma once

#include <algorithm>
#include <limits>

#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif

#include "floats.h"
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

#if FLEXLAM_LANES == 16
inline vf widened(vh h) { return (vf)_mm512_cvtph_ps((__m256i)h); }
#elif defined(__F16C__)
inline vf widened(vh h) { return (vf)_mm256_cvtph_ps((__m128i)h); }
#else
inline vf widened(vh h) { return from_f16(h); }
#endif

// One vector of numbers of type F from element `i` on.
template <Float F>
inline vf load_as(const void* p, std::int64_t i) {
    const auto* at = static_cast<const typename Stored<F>::type*>(p) + i;
    if constexpr (F == Float::f32) return load<vf>(at);
    if constexpr (F == Float::bf16) return from_bf16(load<vh>(at));
    return widened(load<vh>(at));
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

// The same of a type that is known at run time only; for what is short.
inline vf load_typed(Float type, const void* p, std::int64_t i, std::int64_t count) {
    if (type == Float::f32) return load_some<Float::f32>(p, i, count);
    return type == Float::bf16 ? load_some<Float::bf16>(p, i, count) : load_some<Float::f16>(p, i, count);
}

inline void store_typed(Float type, void* p, std::int64_t i, vf x, std::int64_t count) {
    if (type == Float::f32) return store_some<Float::f32>(p, i, x, count);
    type == Float::bf16 ? store_some<Float::bf16>(p, i, x, count) : store_some<Float::f16>(p, i, x, count);
}

template <Float F>
inline vf rounded(vf x) {
    if constexpr (F == Float::bf16) return from_bf16(to_bf16(x));
    if constexpr (F == Float::f16) return widened(to_f16(x));
    return x;
}

inline float sum_of(vf x) {
    for (int lanes = V; lanes > 1; lanes /= 2) x = add_pairs(x, x);
    return x[0];
}

// The exponential of anything; 1e-38 below -87.
inline vf exp_of(vf y) {
    const vf low = pick<vf>(y < -87.0f, vf{} - 87.0f, y);
    const vf e = exp_within(pick<vf>(low > 88.0f, vf{} + 88.0f, low));
    return pick<vf>(y > 88.0f, vf{} + std::numeric_limits<float>::infinity(), e);
}

}  // namespace
}  // namespace FLEXLAM_VARIANT
}  // namespace flexlam
