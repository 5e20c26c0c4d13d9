// The few words of csrc/engine_phases.cuh that CUDA C++ has no name for, or a different one for each type.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace flexlam {

using f16 = __half;
using bf16 = __nv_bfloat16;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(f16 x) { return __half2float(x); }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) { return x; }
template <>
__device__ __forceinline__ f16 from_float<f16>(float x) { return __float2half_rn(x); }
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) { return __float2bfloat16_rn(x); }

// 16 bytes that no launch writes and that are used once: they go past the L1 cache.
template <class Word>
__device__ __forceinline__ Word load_weights(const void* from) {
    static_assert(sizeof(Word) == 16, "");
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(from));
    Word w;
    *reinterpret_cast<uint4*>(&w) = v;
    return w;
}

__device__ __forceinline__ void prefetch(const void* from) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
}

// 16 bytes from device into shared memory, while the thread goes on; groups of them are waited for in order.
__device__ __forceinline__ void copy_ahead(void* to, const void* from) {
    const auto at = static_cast<unsigned>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(from) : "memory");
}
__device__ __forceinline__ void close_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int Left>
__device__ __forceinline__ void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(Left) : "memory");
}

// Adds one to a counter, and waits for nothing: no result, no fence of the whole device. What this block wrote before,
// and met for in __syncthreads, is seen by whoever finds it with look_for.
__device__ __forceinline__ void arrive(unsigned long long* counter) {
    asm volatile("red.release.gpu.global.add.u64 [%0], 1;" ::"l"(counter) : "memory");
}
__device__ __forceinline__ unsigned long long look_for(const unsigned long long* counter) {
    unsigned long long now;
    asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(now) : "l"(counter) : "memory");
    return now;
}
__device__ __forceinline__ unsigned long long look_at(const unsigned long long* counter) {
    unsigned long long now;
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(now) : "l"(counter) : "memory");
    return now;
}
__device__ __forceinline__ unsigned look_at(const unsigned* flag) {
    unsigned now;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(flag) : "memory");
    return now;
}

// Says that a barrier was given up, to the blocks and to the host.
__device__ __forceinline__ void tell(unsigned* lost, unsigned* host) {
    atomicExch(lost, 1u);
    *static_cast<volatile unsigned*>(host) = 1u;
    __threadfence_system();
}

}  // namespace flexlam
