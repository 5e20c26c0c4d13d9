// How the persistent kernel of csrc/engine_cuda.cu cuts a model up: sizes that follow from shapes alone, never from the
// device or from who else is there, so that a session's sums have one order everywhere. Plain C++, host and device.
#pragma once

#include <cstdint>
#include <string>

#include "engine.h"

namespace flexlam {

constexpr int engine_threads = 256;  // of a block; one block a multiprocessor
constexpr int engine_sessions = 8;   // of a launch: more are several launches
constexpr int engine_shared = 226 * 1024;  // bytes of shared memory a block may ask for on sm_90, less 1 KB to spare

// What a launch lays out in shared memory, in bytes from its start, and in its room in device memory, in floats.
struct EnginePlan {
    std::int32_t split;      // tokens of a session's table that one block attends to at once
    std::int32_t splits;     // so many cover the table
    std::int32_t row;        // floats of one session's staged row
    std::int32_t tile;       // bytes of a split's keys, or values, of one head
    std::int32_t tiles, gains, query, scores, sums, codes, shared;  // offsets; `shared` is the end
    std::int64_t x, qkv, wide, logits, angles, parts, stats, room;  // offsets; `room` is the end
};

EnginePlan engine_plan(const ModelShape& shape, Float pages, std::int64_t page, std::int64_t entries);

// Why the kernel does not take a model over such pages, in one sentence; "" if it does.
std::string engine_refusal(const ModelShape& shape, Float pages, std::int64_t page, std::int64_t entries);

}  // namespace flexlam
