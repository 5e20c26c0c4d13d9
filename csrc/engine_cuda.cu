#include "engine_cuda.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "engine_device.cuh"
#include "engine_phases.cuh"

namespace flexlam {
namespace {

constexpr std::int64_t patience = 1 << 24;  // looks at a barrier, a third of a microsecond and more each: 5 s at least

template <class F, class P, int S>
__global__ void __launch_bounds__(engine_threads, 1) block_kernel(const __grid_constant__ EngineLaunch launch) {
    extern __shared__ __align__(16) char memory[];
    Worker<F, P, S>(launch, memory).run();
}

using Kernel = void (*)(EngineLaunch);

template <class F, int S>
Kernel kernel_for(Float pages) {
    return pages == Float::f32   ? block_kernel<F, float, S>
           : pages == Float::f16 ? block_kernel<F, f16, S>
                                 : block_kernel<F, bf16, S>;
}

template <int S>
Kernel kernel_for(Float type, Float pages) {
    return type == Float::f32   ? kernel_for<float, S>(pages)
           : type == Float::f16 ? kernel_for<f16, S>(pages)
                                : kernel_for<bf16, S>(pages);
}

Kernel kernel_for(Float type, Float pages, std::int64_t sessions) {
    return sessions == 1 ? kernel_for<1>(type, pages) : kernel_for<engine_sessions>(type, pages);
}

void expect(cudaError_t error, const char* what) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // or the next call, somebody else's perhaps, would be told of it
    throw std::runtime_error(std::string("sequence engine: ") + what + ": " + cudaGetErrorString(error));
}

void check_border(const char* name, const void* p) {
    if (reinterpret_cast<std::uintptr_t>(p) % 16)
        throw std::invalid_argument(std::string(name) + ": expected an address on a border of 16 bytes, got " +
                                    std::to_string(reinterpret_cast<std::uintptr_t>(p) % 16) + " beyond one");
}

void check_borders(const ModelWeights& weights) {
    for (const LayerWeights& l : weights.layers) {
        check_border("qkv", l.qkv), check_border("out", l.out);
        check_border("gate_up", l.gate_up), check_border("down", l.down);
    }
    check_border("head", weights.head);
}

// Multiprocessors of the current device, each of which must hold a block of the kernel for all to be there at once.
int blocks_of(Float type, Float pages, const EnginePlan& plan) {
    int device = 0, processors = 0, together = 0, resident = 0;
    expect(cudaGetDevice(&device), "no device");
    expect(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "no device");
    expect(cudaDeviceGetAttribute(&together, cudaDevAttrCooperativeLaunch, device), "no device");
    if (!together) throw std::runtime_error("device: expected one that launches blocks together, got one that cannot");
    for (const int sessions : {1, engine_sessions}) {
        const auto* entry = reinterpret_cast<const void*>(kernel_for(type, pages, sessions));
        expect(cudaFuncSetAttribute(entry, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared), "shared memory");
        expect(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, entry, engine_threads, plan.shared),
               "occupancy");
        if (resident < 1)
            throw std::runtime_error("device: expected room for one block a multiprocessor, got none for " +
                                     std::to_string(plan.shared) + " bytes of shared memory");
    }
    return processors;
}

// Where the parts of an engine's own device memory begin.
struct Parts {
    std::size_t layers, frequency, end;
    Parts(std::size_t depth, std::size_t half)
        : layers(sizeof(EngineState)), frequency(layers + depth * sizeof(LayerWeights)),
          end(frequency + half * sizeof(double)) {}
};

}  // namespace

std::string cuda_engine_refusal(const ModelShape& shape, Float pages, std::int64_t page, std::int64_t entries) {
    const std::string refusal = engine_refusal(shape, pages, page, entries);
    if (!refusal.empty()) return refusal;
    try {
        blocks_of(shape.type, pages, engine_plan(shape, pages, page, entries));
    } catch (const std::runtime_error& error) {
        return error.what();
    }
    return "";
}

CudaSequenceEngine::CudaSequenceEngine(ModelShape shape, const ModelWeights& weights, Float pages, std::int64_t page,
                                       std::int64_t entries)
    : shape_(shape), weights_(weights), pages_(pages), page_(page), entries_(entries) {
    const std::string refusal = engine_refusal(shape, pages, page, entries);
    if (!refusal.empty()) throw std::invalid_argument(refusal);
    if (weights.layers.empty()) throw std::invalid_argument("layers: expected at least one, got none");
    check_borders(weights);
    plan_ = engine_plan(shape, pages, page, entries);
    blocks_ = blocks_of(shape.type, pages, plan_);
    const std::vector<double> frequency = frequencies(shape.theta, shape.dim);
    const Parts parts(weights.layers.size(), frequency.size());
    std::vector<char> image(parts.end);  // zeros: nobody has arrived, nothing is lost
    std::copy_n(weights.layers.data(), weights.layers.size(), reinterpret_cast<LayerWeights*>(&image[parts.layers]));
    std::copy_n(frequency.data(), frequency.size(), reinterpret_cast<double*>(&image[parts.frequency]));
    try {
        expect(cudaMalloc(&memory_, parts.end), "memory");
        expect(cudaMemcpy(memory_, image.data(), parts.end, cudaMemcpyHostToDevice), "memory");
        expect(cudaHostAlloc(&told_, sizeof(unsigned), cudaHostAllocMapped), "host memory");
        *static_cast<unsigned*>(told_) = 0;
        expect(cudaHostGetDevicePointer(&told_by_device_, told_, 0), "host memory");
    } catch (...) {
        cudaFree(memory_), cudaFreeHost(told_);
        throw;
    }
}

// Both wait for launches that still read them.
CudaSequenceEngine::~CudaSequenceEngine() { cudaFree(memory_), cudaFreeHost(told_); }

void CudaSequenceEngine::check() const {
    if (*static_cast<const volatile unsigned*>(told_))
        throw std::runtime_error("sequence engine: expected all " + std::to_string(blocks_) +
                                 " blocks at a barrier, got fewer: its codes since then are zeros; make a new engine");
}

void CudaSequenceEngine::generate(const BlockArgs& b, void* room, void* stream) {
    check();
    if (b.type != pages_ || b.page != page_ || b.entries != entries_)
        throw std::invalid_argument("pages: expected those the engine was made for, " + std::to_string(entries_) +
                                    " of " + std::to_string(page_) + " tokens, got " + std::to_string(b.entries) +
                                    " of " + std::to_string(b.page));
    check_border("k_pages", b.k), check_border("v_pages", b.v), check_border("room", room);
    auto* const memory = static_cast<char*>(memory_);
    const Parts parts(weights_.layers.size(), 0);
    const auto n = [](std::int64_t x) { return static_cast<std::int32_t>(x); };
    for (std::int64_t first = 0; first < b.batch; first += engine_sessions) {
        const std::int64_t sessions = std::min<std::int64_t>(b.batch - first, engine_sessions);
        EngineLaunch launch{reinterpret_cast<const LayerWeights*>(memory + parts.layers), weights_.embedding,
                            weights_.place, weights_.norm, weights_.head,
                            reinterpret_cast<const double*>(memory + parts.frequency), b, plan_,
                            static_cast<float*>(room), reinterpret_cast<EngineState*>(memory),
                            static_cast<unsigned*>(told_by_device_), patience, n(weights_.layers.size()),
                            n(shape_.hidden), n(shape_.inner), n(shape_.heads), n(shape_.kv_heads), n(shape_.dim),
                            n(shape_.codes), n(first), n(sessions), shape_.eps};
        void* args[] = {&launch};
        const auto* entry = reinterpret_cast<const void*>(kernel_for(shape_.type, pages_, sessions));
        expect(cudaLaunchCooperativeKernel(entry, dim3(static_cast<unsigned>(blocks_)), dim3(engine_threads), args,
                                           static_cast<std::size_t>(plan_.shared), static_cast<cudaStream_t>(stream)),
               "CUDA refused the launch");
    }
}

}  // namespace flexlam
