// Runs independent chunks on the threads that PyTorch already has.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <type_traits>

namespace flexlam {

// Calls `body(chunk)` once for every chunk in [0, chunks), on at most `threads` threads; returns when all are done.
// The threads are those of the OpenMP runtime in this process: a pool of our own would fight for the cores with the
// runtime's threads, which spin for a while after each parallel region. Without such a runtime: one thread.
void parallel_for(std::int64_t chunks, int threads, const std::function<void(std::int64_t)>& body);

// Calls `body(rank, count)` once on each of `count` threads at the same time, so that they may wait for each other; `count`
// is at most `threads`. Without a runtime, and in a process that was forked after one had started: one thread.
void parallel_region(int threads, void (*body)(void* state, int rank, int count), void* state);

template <class Body>
void parallel_region(int threads, Body&& body) {
    parallel_region(
        threads, [](void* state, int rank, int count) { (*static_cast<std::remove_reference_t<Body>*>(state))(rank, count); },
        &body);
}

// Where the threads of one region wait until all have come. They spin, because the next is a microsecond away; a thread
// that has lost its core to another process is given time to get it back.
class Barrier {
public:
    // `count` is the same in every call of one region.
    void wait(int count);

private:
    std::atomic<int> arrived_{0};
    std::atomic<unsigned> epoch_{0};
};

// Whether an OpenMP runtime was found.
bool has_threads();

}  // namespace flexlam
