// What the lanes of a warp do together, in one order whatever the hardware: sums, the best of a row, the k-th of a row.
#pragma once

namespace flexlam {

template <class T>
struct alignas(16) Word {
    static constexpr int size = 16 / static_cast<int>(sizeof(T));
    T x[size];
};

template <class F>
__device__ __forceinline__ float rounded(float x) { return to_float(from_float<F>(x)); }

// All lanes get the same sum, in one order.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int lane = 16; lane; lane /= 2) x += __shfl_xor_sync(~0u, x, lane);
    return x;
}

__device__ __forceinline__ float warp_largest(float x) {
#pragma unroll
    for (int lane = 16; lane; lane /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, lane));
    return x;
}

struct Best {
    float value;
    int at;
};

// The first NaN, or the largest; of equals the first.
__device__ __forceinline__ Best better(Best a, Best b) {
    const bool first = a.at < b.at, odd_a = a.value != a.value, odd_b = b.value != b.value;
    if (odd_a || odd_b) return odd_a && (!odd_b || first) ? a : b;
    return a.value > b.value || (a.value == b.value && first) ? a : b;
}

__device__ __forceinline__ Best warp_best(Best mine) {
#pragma unroll
    for (int lane = 16; lane; lane /= 2)
        mine = better(mine, {__shfl_xor_sync(~0u, mine.value, lane), __shfl_xor_sync(~0u, mine.at, lane)});
    return mine;
}

// Numbers that are ordered as the floats are, both zeros being one; of no use for NaN.
__device__ __forceinline__ unsigned ordered(float x) {
    const unsigned bits = __float_as_uint(__fadd_rn(x, 0.0f));
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Whether x [n] of a warp, of which every lane looks at its own elements, has `count` of at least the ordered number.
__device__ __forceinline__ bool has_so_many(const float* x, int n, int lane, unsigned least, int count) {
    int found = 0;
    for (int i = lane; i < n; i += 32) found += ordered(x[i]) >= least;
    for (int other = 16; other; other /= 2) found += __shfl_xor_sync(~0u, found, other);
    return found >= count;
}

}  // namespace flexlam
