#include "parallel.h"

#include <dlfcn.h>
#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace flexlam {
namespace {

// The entry points of GNU's OpenMP runtime; LLVM's and Intel's export them too.
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
using OmpNumber = int (*)();

template <class Entry>
Entry find(std::atomic<Entry>& found, const char* name) {
    // looked up by name: linking to one would bring a second runtime with threads of its own into the process
    Entry entry = found.load();
    if (!entry) {  // it may be loaded later than this extension
        entry = reinterpret_cast<Entry>(dlsym(RTLD_DEFAULT, name));
        found.store(entry);
    }
    return entry;
}

std::atomic<GompParallel> gomp_parallel{nullptr};
std::atomic<OmpNumber> omp_rank{nullptr}, omp_count{nullptr};
std::atomic<bool> forked{false};

// A child has none of its parent's threads, and the runtime would wait for them for ever.
const int watch_forks = pthread_atfork(nullptr, nullptr, [] { forked.store(true); });

GompParallel runtime() {
    if (watch_forks != 0 || forked.load()) return nullptr;
    const bool counts = find(omp_rank, "omp_get_thread_num") && find(omp_count, "omp_get_num_threads");
    return counts ? find(gomp_parallel, "GOMP_parallel") : nullptr;
}

struct Region {
    void (*body)(void*, int, int);
    void* state;
};

void enter(void* data) {
    const Region& region = *static_cast<Region*>(data);
    region.body(region.state, omp_rank.load()(), omp_count.load()());
}

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
}

struct Job {
    const std::function<void(std::int64_t)>* body;
    std::int64_t chunks;
    std::atomic<std::int64_t> next{0};
    std::exception_ptr error;
    std::mutex lock;
};

void work(Job& job) {
    try {
        for (std::int64_t i; (i = job.next.fetch_add(1)) < job.chunks;) (*job.body)(i);
    } catch (...) {
        const std::lock_guard<std::mutex> held(job.lock);
        job.error = std::current_exception();
    }
}

}  // namespace

#ifdef FLEXLAM_OWN_THREADS
bool has_threads() { return true; }
#else
bool has_threads() { return runtime() != nullptr; }
#endif

#ifdef FLEXLAM_OWN_THREADS  // for sanitizers, which do not see through a runtime that was not built for them

void parallel_region(int threads, void (*body)(void*, int, int), void* state) {
    std::vector<std::thread> others;
    for (int rank = 1; rank < threads; ++rank) others.emplace_back(body, state, rank, threads);
    body(state, 0, threads < 1 ? 1 : threads);
    for (std::thread& other : others) other.join();
}

#else

void parallel_region(int threads, void (*body)(void*, int, int), void* state) {
    const GompParallel entry = threads > 1 ? runtime() : nullptr;
    if (!entry) return body(state, 0, 1);
    Region region{body, state};
    entry(enter, &region, static_cast<unsigned>(threads), 0);
}

#endif

void Barrier::wait(int count) {
    if (count == 1) return;
    const unsigned epoch = epoch_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == count) {
        arrived_.store(0, std::memory_order_relaxed);
        epoch_.store(epoch + 1, std::memory_order_release);
        return;
    }
    constexpr int patience = 4000;  // pauses: some 100 us
    for (int spins = 0; epoch_.load(std::memory_order_acquire) == epoch; ++spins) {
        if (spins < patience) {
            relax();
        } else {
            sched_yield();
        }
    }
}

void parallel_for(std::int64_t chunks, int threads, const std::function<void(std::int64_t)>& body) {
    if (chunks < threads) threads = static_cast<int>(chunks);
    if (threads < 2 || !has_threads()) {
        for (std::int64_t i = 0; i < chunks; ++i) body(i);
        return;
    }
    Job job;
    job.body = &body;
    job.chunks = chunks;
    parallel_region(threads, [&](int, int) { work(job); });
    if (job.error) std::rethrow_exception(job.error);
}

}  // namespace flexlam
