#include "fsq_cuda.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace flexlam {
namespace {

constexpr int threads = 256;
constexpr int partials = 132 * 8;  // blocks of the backward grid: fixed, so that the null's gradient is a fixed sum

__device__ float to_float(float x) { return x; }
__device__ float to_float(__half x) { return __half2float(x); }
__device__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
template <class T>
__device__ T from_float(float x);
template <>
__device__ float from_float<float>(float x) { return x; }
template <>
__device__ __half from_float<__half>(float x) { return __float2half_rn(x); }
template <>
__device__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

// As many tokens as a 16-byte word has elements: then every group starts and ends on a 16-byte border.
template <class T>
constexpr int group = 16 / static_cast<int>(sizeof(T));

template <class T, int D>
struct alignas(16) Words {
    T x[group<T> * D];
};

template <class T, int D>
__device__ void load(const T* p, std::int64_t first, int tokens, bool whole, T (&x)[group<T> * D]) {
    if (whole) {
        const uint4* from = reinterpret_cast<const uint4*>(p + first * D);
        Words<T, D> w;
#pragma unroll
        for (int i = 0; i < D; ++i) reinterpret_cast<uint4*>(&w)[i] = __ldcs(from + i);
#pragma unroll
        for (int i = 0; i < group<T> * D; ++i) x[i] = w.x[i];
    } else {
#pragma unroll
        for (int i = 0; i < group<T> * D; ++i) x[i] = i < tokens * D ? p[first * D + i] : from_float<T>(0.0f);
    }
}

template <class T, int D>
__device__ void save(T* p, std::int64_t first, int tokens, bool whole, const T (&x)[group<T> * D]) {
    if (whole) {
        Words<T, D> w;
#pragma unroll
        for (int i = 0; i < group<T> * D; ++i) w.x[i] = x[i];
        uint4* to = reinterpret_cast<uint4*>(p + first * D);
#pragma unroll
        for (int i = 0; i < D; ++i) __stcs(to + i, reinterpret_cast<const uint4*>(&w)[i]);
    } else {
#pragma unroll
        for (int i = 0; i < group<T> * D; ++i)
            if (i < tokens * D) p[first * D + i] = x[i];
    }
}

// Which tokens of a group are retained, one bit each.
template <int G>
__device__ unsigned retained(const Prefix& prefix, std::int64_t first, int tokens) {
    if (!prefix.keep) return ~0u;
    std::int64_t block = first / prefix.slots;
    std::int64_t slot = first - block * prefix.slots;
    int keep = prefix.keep[block];
    unsigned bits = 0;
#pragma unroll
    for (int i = 0; i < G; ++i) {
        bits |= static_cast<unsigned>(slot < keep) << i;
        if (++slot == prefix.slots && i + 1 < tokens) slot = 0, keep = prefix.keep[++block];
    }
    return bits;
}

template <class T, int D>
__global__ void __launch_bounds__(threads) forward_kernel(const __grid_constant__ CudaLevels levels, ForwardArgs a, bool aligned) {
    constexpr int G = group<T>;
    const std::int64_t first = (static_cast<std::int64_t>(blockIdx.x) * threads + threadIdx.x) * G;
    if (first >= a.tokens) return;
    const int tokens = a.tokens - first < G ? static_cast<int>(a.tokens - first) : G;
    const bool whole = aligned && tokens == G;

    T x[G * D];
    load<T, D>(static_cast<const T*>(a.z), first, tokens, whole, x);
    const unsigned kept = retained<G>(a.prefix, first, tokens);

    int codes[G] = {};
#pragma unroll
    for (int c = 0; c < D; ++c) {
        const int n = levels.levels[c], half_width = n / 2;
        const float null = a.prefix.keep ? a.prefix.null[c] : 0.0f;
        int digit[G] = {};
        for (int j = 0; j < n - 1; ++j) {
            const float at = levels.threshold[c][j];
#pragma unroll
            for (int t = 0; t < G; ++t) digit[t] += to_float(x[t * D + c]) >= at;
        }
#pragma unroll
        for (int t = 0; t < G; ++t) {
            codes[t] += digit[t] * levels.weight[c];
            const float z = to_float(x[t * D + c]);
            const float value = __fdiv_rn(static_cast<float>(digit[t] - half_width), static_cast<float>(half_width));
            x[t * D + c] = from_float<T>(kept >> t & 1u ? (z != z ? z : value) : null);
        }
    }

    save<T, D>(static_cast<T*>(a.latents), first, tokens, whole, x);
    if (whole) {
#pragma unroll
        for (int t = 0; t < G; t += 4)
            __stcs(reinterpret_cast<int4*>(a.codes + first + t), make_int4(codes[t], codes[t + 1], codes[t + 2], codes[t + 3]));
    } else {
#pragma unroll
        for (int t = 0; t < G; ++t)
            if (t < tokens) a.codes[first + t] = codes[t];
    }
}

// sech(x)^2 without the cancellation of 1 - tanh(x)^2.
__device__ float slope(float x) {
    const float e = expf(-2.0f * fabsf(x)), s = 1.0f + e;
    return __fdiv_rn(4.0f * e, s * s);
}

template <class T, int D>
__global__ void __launch_bounds__(threads) backward_kernel(const __grid_constant__ CudaLevels levels, BackwardArgs a, float* grad_null, bool aligned) {
    constexpr int G = group<T>;
    const std::int64_t groups = (a.tokens + G - 1) / G, stride = static_cast<std::int64_t>(gridDim.x) * threads;
    float sum[D] = {};
    for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * threads + threadIdx.x; i < groups; i += stride) {
        const std::int64_t first = i * G;
        const int tokens = a.tokens - first < G ? static_cast<int>(a.tokens - first) : G;
        const bool whole = aligned && tokens == G;
        T z[G * D], g[G * D];
        load<T, D>(static_cast<const T*>(a.z), first, tokens, whole, z);
        load<T, D>(static_cast<const T*>(a.grad), first, tokens, whole, g);
        const unsigned kept = retained<G>(a.prefix, first, tokens);
#pragma unroll
        for (int t = 0; t < G; ++t) {
            const bool keep = kept >> t & 1u;
#pragma unroll
            for (int c = 0; c < D; ++c) {
                const float up = to_float(g[t * D + c]);
                const float down = up * levels.gain[c] * slope(to_float(z[t * D + c]) + levels.shift[c]);
                sum[c] += keep ? 0.0f : up;  // tokens beyond the end were loaded as zeros
                z[t * D + c] = from_float<T>(keep ? down : 0.0f);
            }
        }
        save<T, D>(static_cast<T*>(a.grad_z), first, tokens, whole, z);
    }
    if (!grad_null) return;

    __shared__ float parts[threads / 32][D];
#pragma unroll
    for (int c = 0; c < D; ++c) {
        for (int lane = 16; lane; lane /= 2) sum[c] += __shfl_xor_sync(~0u, sum[c], lane);
        if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32][c] = sum[c];
    }
    __syncthreads();
    if (threadIdx.x < D) {
        float total = 0.0f;
        for (int w = 0; w < threads / 32; ++w) total += parts[w][threadIdx.x];
        grad_null[blockIdx.x * D + threadIdx.x] = total;
    }
}

bool on_border(const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; }

void check(const char* what) {
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": CUDA refused the launch: " + cudaGetErrorString(error));
}

template <class T, int D>
void launch_forward(const CudaLevels& levels, const ForwardArgs& a, cudaStream_t stream) {
    const std::int64_t per_block = static_cast<std::int64_t>(threads) * group<T>;
    const bool aligned = on_border(a.z) && on_border(a.latents) && on_border(a.codes);
    forward_kernel<T, D><<<static_cast<unsigned>((a.tokens + per_block - 1) / per_block), threads, 0, stream>>>(levels, a, aligned);
    check("fsq forward");
}

template <class T, int D>
void launch_backward(const CudaLevels& levels, const BackwardArgs& a, float* grad_null, cudaStream_t stream) {
    const bool aligned = on_border(a.z) && on_border(a.grad) && on_border(a.grad_z);
    backward_kernel<T, D><<<partials, threads, 0, stream>>>(levels, a, grad_null, aligned);
    check("fsq backward");
}

template <class T, int D>
struct Kind {
    using type = T;
    static constexpr int dim = D;
};

template <class T, class Call>
void by_dim(int dim, const Call& call) {
    switch (dim) {
        case 1: return call(Kind<T, 1>{});
        case 2: return call(Kind<T, 2>{});
        case 3: return call(Kind<T, 3>{});
        case 4: return call(Kind<T, 4>{});
        case 5: return call(Kind<T, 5>{});
        case 6: return call(Kind<T, 6>{});
        case 7: return call(Kind<T, 7>{});
        case 8: return call(Kind<T, 8>{});
        default: throw std::invalid_argument("levels: expected 1..8 channels, got " + std::to_string(dim));
    }
}

template <class Call>
void by_type(Float type, int dim, const Call& call) {
    if (type == Float::f32) return by_dim<float>(dim, call);
    if (type == Float::f16) return by_dim<__half>(dim, call);
    by_dim<__nv_bfloat16>(dim, call);
}

}  // namespace

int cuda_partials() { return partials; }

CudaLevels cuda_levels(const LevelPattern& p) {
    if (p.steps >= cuda_max_levels)
        throw std::invalid_argument("levels: expected at most " + std::to_string(cuda_max_levels) + " a channel on CUDA, got " + std::to_string(p.steps + 1));
    CudaLevels out{};
    out.dim = p.dim;
    for (int c = 0; c < p.dim; ++c) {
        out.levels[c] = p.levels[c];
        out.weight[c] = static_cast<int>(p.basis[c]);
        out.shift[c] = p.shift[c];
        out.gain[c] = p.gain[c];
        for (int j = 0; j < p.levels[c] - 1; ++j)
            out.threshold[c][j] = p.threshold[static_cast<std::size_t>(j) * LevelPattern::lanes * p.dim + c];
    }
    return out;
}

void fsq_forward_cuda(const CudaLevels& levels, const ForwardArgs& a, void* stream) {
    if (!a.tokens) return;
    by_type(a.type, levels.dim, [&](auto kind) {
        launch_forward<typename decltype(kind)::type, decltype(kind)::dim>(levels, a, static_cast<cudaStream_t>(stream));
    });
}

void fsq_backward_cuda(const CudaLevels& levels, const BackwardArgs& a, float* grad_null, void* stream) {
    by_type(a.type, levels.dim, [&](auto kind) {
        launch_backward<typename decltype(kind)::type, decltype(kind)::dim>(levels, a, grad_null, static_cast<cudaStream_t>(stream));
    });
}

}  // namespace flexlam
