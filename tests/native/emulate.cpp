// The persistent kernel's phases on the host, for tests: called through ctypes by tests/engine_cases.py.
#include "emulate.h"

#include "../../csrc/engine_phases.cuh"

using namespace flexlam;

namespace {

// One launch as ctypes lays it out.
struct Call {
    ModelShape shape;
    const LayerWeights* layers;
    const void *embedding, *place, *norm, *head;
    const double* frequency;
    BlockArgs block;
    EngineState* state;
    std::int64_t depth, blocks, present, patience, backwards;
};

template <class F, class P>
void run(const EngineLaunch& launch, const Call& c) {
    emulate::run_grid(static_cast<int>(c.blocks), static_cast<int>(c.present), engine_threads, c.backwards, [&] {
        thread_local std::vector<float4> shared;
        if (threadIdx.x == 0) shared.resize(static_cast<std::size_t>(launch.plan.shared) / 16);
        if (threadIdx.x == 0) std::memset(static_cast<void*>(shared.data()), 0xff, shared.size() * 16);
        __syncthreads();
        char* memory = reinterpret_cast<char*>(shared.data());
        if (launch.sessions == 1) return Worker<F, P, 1>(launch, memory).run();
        Worker<F, P, engine_sessions>(launch, memory).run();
    });
}

template <class F>
void by_pages(const EngineLaunch& launch, const Call& c) {
    if (c.block.type == Float::f32) return run<F, float>(launch, c);
    c.block.type == Float::f16 ? run<F, f16>(launch, c) : run<F, bf16>(launch, c);
}

}  // namespace

// Generates the block in launches of at most 8 sessions; returns 1 if a barrier was given up. The room starts as NaNs.
extern "C" int flexlam_emulate(const Call* c) {
    const ModelShape& m = c->shape;
    const BlockArgs& b = c->block;
    const EnginePlan plan = engine_plan(m, b.type, b.page, b.entries);
    std::vector<float4> room(static_cast<std::size_t>(plan.room) / 4);
    unsigned told = 0;
    for (std::int64_t first = 0; first < b.batch; first += engine_sessions) {
        std::memset(static_cast<void*>(room.data()), 0xff, room.size() * 16);
        const auto n = [](std::int64_t x) { return static_cast<std::int32_t>(x); };
        const EngineLaunch launch{c->layers, c->embedding, c->place, c->norm, c->head, c->frequency, b, plan,
                                  &room[0].x, c->state, &told, c->patience, n(c->depth), n(m.hidden), n(m.inner),
                                  n(m.heads), n(m.kv_heads), n(m.dim), n(m.codes), n(first),
                                  n(std::min<std::int64_t>(b.batch - first, engine_sessions)), m.eps};
        if (m.type == Float::f32) by_pages<float>(launch, *c);
        if (m.type == Float::f16) by_pages<f16>(launch, *c);
        if (m.type == Float::bf16) by_pages<bf16>(launch, *c);
    }
    return static_cast<int>(told);
}

extern "C" const char* flexlam_refusal(const ModelShape* m, int pages, std::int64_t page, std::int64_t entries) {
    thread_local std::string sentence;
    sentence = engine_refusal(*m, static_cast<Float>(pages), page, entries);
    return sentence.c_str();
}

// What the counter and flag of an engine are, so that a test can carry them from launch to launch.
static_assert(sizeof(EngineState) == 16, "");
