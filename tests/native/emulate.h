// Just enough of CUDA on a host to run csrc/engine_phases.cuh as it stands: a thread of the host for every block, and
// within it a fiber for every thread of the block, which gives way where the kernel waits for others. Anything that
// depends on the order in which threads run, on memory that was never written or on a copy that was not waited for
// shows: shared memory starts as NaNs, copies happen as late as they may, and fibers can be run in either order.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#define __device__
#define __forceinline__ inline

struct float2 {
    float x, y;
};
struct float4 {
    float x, y, z, w;
};

namespace emulate {

constexpr int warp_size = 32;
constexpr std::size_t stack_bytes = 256 * 1024;

struct Copy {
    void* to;
    const void* from;
};

struct Fiber {
    ucontext_t context;
    jmp_buf at;
    std::vector<char> stack;
    std::vector<std::vector<Copy>> copies{1};  // groups, of which the last is open
    const unsigned* watched = nullptr;         // runs on once this has changed from `was`
    unsigned was = 0;
    bool begun = false, ended = false;
};

// Threads that wait for each other: what each brings lies there until all have taken it.
struct Meeting {
    unsigned arrived = 0, round = 0;
    std::uint64_t brought[2][warp_size];
    bool any[2] = {false, false};
};

struct Index {
    int x;
};

struct Block {
    int index, count, threads;
    bool backwards;
    std::vector<Fiber> fibers;
    std::vector<Meeting> warps;
    Meeting all;
    int running = 0;
    jmp_buf home;
    void (*entry)(void*) = nullptr;
    void* argument = nullptr;
};

inline thread_local Block* block = nullptr;

inline bool runnable(const Fiber& f) { return !f.ended && (!f.watched || *f.watched != f.was); }

// The next fiber that can go on; -1 if all have ended.
inline int next_fiber() {
    bool left = false;
    for (int i = 1; i <= block->threads; ++i) {
        const int step = block->backwards ? block->threads - i : i;
        const Fiber& other = block->fibers[(block->running + step) % block->threads];
        if (runnable(other)) return static_cast<int>(&other - block->fibers.data());
        left = left || !other.ended;
    }
    if (!left) return -1;
    std::fprintf(stderr, "emulate: threads wait for some that never come\n");
    std::abort();
}

inline void start() {
    block->entry(block->argument);
    Fiber& self = block->fibers[block->running];
    self.ended = true;
    const int next = next_fiber();
    if (next < 0) _longjmp(block->home, 1);
    block->running = next;
    Fiber& other = block->fibers[next];
    other.begun ? _longjmp(other.at, 1) : (other.begun = true, setcontext(&other.context), std::abort());
}

inline void give_way() {
    Fiber& self = block->fibers[block->running];
    const int next = next_fiber();
    if (next == block->running) return;
    if (_setjmp(self.at)) return;
    block->running = next;
    Fiber& other = block->fibers[next];
    if (other.begun) _longjmp(other.at, 1);
    other.begun = true;
    setcontext(&other.context);
    std::abort();
}

// Waits until `size` threads have come here; returns the parity of the round.
inline unsigned meet(Meeting& m, int size) {
    const unsigned round = m.round;
    if (++m.arrived == static_cast<unsigned>(size)) {
        m.arrived = 0;
        m.any[~round & 1] = false;
        ++m.round;
        return round & 1;
    }
    Fiber& self = block->fibers[block->running];
    self.watched = &m.round, self.was = round;
    give_way();
    self.watched = nullptr;
    return round & 1;
}

template <class Body>
void run_block(int index, int count, int threads, bool backwards, const Body& body) {
    Block here{};
    here.index = index, here.count = count, here.threads = threads, here.backwards = backwards;
    here.fibers = std::vector<Fiber>(threads), here.warps = std::vector<Meeting>(threads / warp_size);
    here.entry = [](void* p) { (*static_cast<const Body*>(p))(); };
    here.argument = const_cast<Body*>(&body);
    block = &here;
    for (Fiber& f : here.fibers) {
        f.stack.resize(stack_bytes);
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = f.stack.data(), f.context.uc_stack.ss_size = f.stack.size();
        f.context.uc_link = nullptr;
        makecontext(&f.context, start, 0);
    }
    if (!_setjmp(here.home)) {
        here.fibers[0].begun = true;
        setcontext(&here.fibers[0].context);
    }
    block = nullptr;
}

// Runs `body` on `present` of `count` blocks at once: a grid of which some blocks may never come.
template <class Body>
void run_grid(int count, int present, int threads, bool backwards, const Body& body) {
    std::vector<std::thread> hosts;
    for (int i = 0; i < present; ++i)
        hosts.emplace_back([&, i] { run_block(i, count, threads, backwards, body); });
    for (std::thread& host : hosts) host.join();
}

}  // namespace emulate

#define threadIdx (emulate::Index{emulate::block->running})
#define blockIdx (emulate::Index{emulate::block->index})
#define gridDim (emulate::Index{emulate::block->count})

inline void __syncthreads() { emulate::meet(emulate::block->all, emulate::block->threads); }
inline bool __syncthreads_or(bool mine) {
    emulate::Meeting& all = emulate::block->all;
    all.any[all.round & 1] |= mine;
    return all.any[emulate::meet(all, emulate::block->threads)];
}

template <class T>
T __shfl_xor_sync(unsigned, T mine, int mask) {
    emulate::Meeting& warp = emulate::block->warps[emulate::block->running / emulate::warp_size];
    const int lane = emulate::block->running % emulate::warp_size;
    std::memcpy(&warp.brought[warp.round & 1][lane], &mine, sizeof(T));
    const unsigned parity = emulate::meet(warp, emulate::warp_size);
    T other;
    std::memcpy(&other, &warp.brought[parity][lane ^ mask], sizeof(T));
    return other;
}

template <class T>
T __ldcg(const T* p) { return *p; }
inline float __fmul_rn(float a, float b) { volatile float c = a * b; return c; }
inline float __fadd_rn(float a, float b) { volatile float c = a + b; return c; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline unsigned __float_as_uint(float x) {
    unsigned bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}
inline void __threadfence() { std::atomic_thread_fence(std::memory_order_acq_rel); }
inline void sincospi(double x, double* sine, double* cosine) {
    *sine = std::sin(x * 3.14159265358979323846), *cosine = std::cos(x * 3.14159265358979323846);
}
using std::fma;
using std::max;
using std::min;
using std::rint;

namespace flexlam {

struct f16 {
    std::uint16_t bits;
};
struct bf16 {
    std::uint16_t bits;
};

inline float float_of(std::uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return float_of(static_cast<std::uint32_t>(x.bits) << 16); }
inline float to_float(f16 x) {
    const int exponent = x.bits >> 10 & 31, digits = x.bits & 1023;
    const float size = exponent == 31 ? (digits ? NAN : INFINITY)
                       : exponent     ? std::ldexp(1024.0f + static_cast<float>(digits), exponent - 25)
                                      : std::ldexp(static_cast<float>(digits), -24);
    return x.bits & 0x8000 ? -size : size;
}
template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) { return x; }
template <>
inline bf16 from_float<bf16>(float x) {
    const std::uint32_t bits = __float_as_uint(x);
    if (x != x) return {0x7fc0};
    return {static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
inline f16 from_float<f16>(float x) {
    const auto sign = static_cast<std::uint16_t>(__float_as_uint(x) >> 16 & 0x8000);
    const float size = std::fabs(x);
    if (x != x) return {0x7e00};
    if (size >= 65520.0f) return {static_cast<std::uint16_t>(sign | 0x7c00)};
    if (size < 6.103515625e-05f)
        return {static_cast<std::uint16_t>(sign | static_cast<int>(std::nearbyint(std::ldexp(size, 24))))};
    int exponent;
    std::frexp(size, &exponent);
    const int digits = static_cast<int>(std::nearbyint(std::ldexp(size, 11 - exponent)));  // 1024..2048
    return {static_cast<std::uint16_t>(sign | (((exponent + 14) << 10) + digits - 1024))};
}

template <class Word>
Word load_weights(const void* from) {
    if (reinterpret_cast<std::uintptr_t>(from) % 16) std::abort();  // the device would stop here too
    Word w;
    std::memcpy(&w, from, 16);
    return w;
}

// Reads, so that a prefetch beyond what is there shows where that is looked for.
inline void prefetch(const void* from) { static_cast<void>(*static_cast<const volatile char*>(from)); }

// A copy lands no earlier than it is waited for.
inline void copy_ahead(void* to, const void* from) {
    if (reinterpret_cast<std::uintptr_t>(from) % 16 || reinterpret_cast<std::uintptr_t>(to) % 16) std::abort();
    std::memset(to, 0xff, 16);
    emulate::block->fibers[emulate::block->running].copies.back().push_back({to, from});
}
inline void close_copies() { emulate::block->fibers[emulate::block->running].copies.emplace_back(); }
template <int Left>
void wait_copies() {
    auto& groups = emulate::block->fibers[emulate::block->running].copies;
    while (groups.size() > Left + 1) {
        for (const emulate::Copy& c : groups.front()) std::memcpy(c.to, c.from, 16);
        groups.erase(groups.begin());
    }
}

inline void arrive(unsigned long long* counter) { __atomic_fetch_add(counter, 1, __ATOMIC_RELEASE); }
inline unsigned long long look_for(const unsigned long long* counter) {
    std::this_thread::yield();
    return __atomic_load_n(counter, __ATOMIC_ACQUIRE);
}
template <class T>
T look_at(const T* p) {
    std::this_thread::yield();
    return __atomic_load_n(p, __ATOMIC_RELAXED);
}
inline void tell(unsigned* lost, unsigned* host) {
    __atomic_store_n(lost, 1u, __ATOMIC_RELEASE);
    __atomic_store_n(host, 1u, __ATOMIC_RELEASE);
}

}  // namespace flexlam
