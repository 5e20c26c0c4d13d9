// A whole block of codes on a GPU in one cooperative launch: csrc/engine.h's job, by csrc/engine_phases.cuh. Not yet
// run on a GPU. Everything that changes from decision to decision is read from device memory, and nothing is allocated
// or waited for, so that a launch can be captured in a CUDA graph and replayed.
#pragma once

#include <cstdint>
#include <string>

#include "engine.h"
#include "engine_plan.h"

namespace flexlam {

// Why the engine does not take a model over such pages on the current device, in one sentence; "" if it does.
std::string cuda_engine_refusal(const ModelShape& shape, Float pages, std::int64_t page, std::int64_t entries);

class CudaSequenceEngine {
public:
    // Weights are device pointers; `pages` is the type of the pages, which hold `page` tokens and of which a session
    // has `entries`. Belongs to the current device. Throws std::invalid_argument in engine_refusal's words, or where a
    // pointer is on no border of 16 bytes, and std::runtime_error where the device cannot hold one block a
    // multiprocessor at once.
    CudaSequenceEngine(ModelShape shape, const ModelWeights& weights, Float pages, std::int64_t page,
                       std::int64_t entries);
    ~CudaSequenceEngine();
    CudaSequenceEngine(const CudaSequenceEngine&) = delete;
    CudaSequenceEngine& operator=(const CudaSequenceEngine&) = delete;

    // Bytes of device memory, on a border of 16, that a launch leaves its phases' results in.
    std::int64_t room() const { return 4 * plan_.room; }
    int blocks() const { return blocks_; }

    // Generates `budget` codes of every session on `stream`: device pointers all. Sessions beyond 8 are further
    // launches. Launches of one engine must not overlap. Throws as check() does, and with CUDA's words where a launch
    // is refused.
    void generate(const BlockArgs& block, void* room, void* stream);

    // Throws std::runtime_error if a barrier was given up in a launch that has run, captured ones included: zeros stand
    // in place of its later codes, and of all codes of later launches. Waits for nothing.
    void check() const;

private:
    ModelShape shape_;
    ModelWeights weights_;
    Float pages_;
    std::int64_t page_, entries_;
    EnginePlan plan_;
    int blocks_ = 0;
    void *memory_ = nullptr, *told_ = nullptr, *told_by_device_ = nullptr;
};

}  // namespace flexlam
