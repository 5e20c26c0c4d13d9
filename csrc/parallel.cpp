#include "parallel.h"

#include <dlfcn.h>

#include <atomic>
#include <exception>
#include <mutex>

namespace flexlam {
namespace {

// The entry point of GNU's OpenMP runtime; LLVM's and Intel's export it too.
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

GompParallel runtime() {
    // looked up by name: linking to one would bring a second runtime with threads of its own into the process
    static std::atomic<GompParallel> found{nullptr};
    GompParallel entry = found.load();
    if (!entry) {  // it may be loaded later than this extension
        entry = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
        found.store(entry);
    }
    return entry;
}

struct Job {
    const std::function<void(std::int64_t)>* body;
    std::int64_t chunks;
    std::atomic<std::int64_t> next{0};
    std::exception_ptr error;
    std::mutex lock;
};

void work(void* data) {
    Job& job = *static_cast<Job*>(data);
    try {
        for (std::int64_t i; (i = job.next.fetch_add(1)) < job.chunks;) (*job.body)(i);
    } catch (...) {
        const std::lock_guard<std::mutex> held(job.lock);
        job.error = std::current_exception();
    }
}

}  // namespace

bool has_threads() { return runtime() != nullptr; }

void parallel_for(std::int64_t chunks, int threads, const std::function<void(std::int64_t)>& body) {
    if (chunks < threads) threads = static_cast<int>(chunks);
    if (threads < 2 || !runtime()) {
        for (std::int64_t i = 0; i < chunks; ++i) body(i);
        return;
    }
    Job job;
    job.body = &body;
    job.chunks = chunks;
    runtime()(work, &job, static_cast<unsigned>(threads), 0);
    if (job.error) std::rethrow_exception(job.error);
}

}  // namespace flexlam
