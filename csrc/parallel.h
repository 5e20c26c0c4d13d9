// Runs independent chunks on the threads that PyTorch already has.
#pragma once

#include <cstdint>
#include <functional>

namespace flexlam {

// Calls `body(chunk)` once for every chunk in [0, chunks), on at most `threads` threads; returns when all are done.
// The threads are those of the OpenMP runtime in this process: a pool of our own would fight for the cores with the
// runtime's threads, which spin for a while after each parallel region. Without such a runtime: one thread.
void parallel_for(std::int64_t chunks, int threads, const std::function<void(std::int64_t)>& body);

// Whether an OpenMP runtime was found.
bool has_threads();

}  // namespace flexlam
