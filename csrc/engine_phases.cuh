// The phases of a block of codes on a GPU, and the order in which a launch goes through them. Every block of the launch
// goes through every phase; what one leaves for another lies on different sides of a barrier of the whole grid. A phase
// has three parts: read what the last one left, compute in fp32 and round where the model's modules round, leave the
// result. What does not depend on the last phase, weights and the pages' keys and values, is prefetched between the two
// halves of the barrier, while others arrive. The work is small and the chain of phases long: loads that can be under way
// together stand side by side.
//
// Includes nothing of CUDA: the includer has brought csrc/engine_device.cuh, or the emulation of tests/native.
#pragma once

#include <climits>
#include <cstdint>

#include "engine_plan.h"
#include "engine_warp.cuh"

namespace flexlam {

// What blocks of one engine meet at; it lives as long as the engine and is never set back.
struct EngineState {
    unsigned long long arrived;  // grows by one a block and barrier, over all launches
    unsigned lost;               // not 0: a barrier was given up, and nothing that came after it counts
};

// One launch: pointers and sizes as in csrc/engine.h; what changes from decision to decision lies behind pointers.
struct EngineLaunch {
    const LayerWeights* layers;
    const void *embedding, *place, *norm, *head;
    const double* frequency;  // [dim / 2]: theta^(-2i / dim)
    BlockArgs block;          // of all sessions: rows of starts, rows and positions are `block.batch` long
    EnginePlan plan;
    float* room;
    EngineState* state;
    unsigned* told;         // host memory that says `lost` without being asked
    std::int64_t patience;  // looks at a barrier before it is given up
    std::int32_t depth, hidden, inner, heads, kv_heads, dim, codes;
    std::int32_t first, sessions;  // those of this launch
    float eps;
};

// Weights of type F, pages of type P, at most S sessions: one alone is half the code, which caches hold.
template <class F, class P, int S>
class Worker {
public:
    __device__ Worker(const EngineLaunch& launch, char* shared)
        : a(launch), b(launch.block), thread(threadIdx.x), warp(threadIdx.x / 32), lane(threadIdx.x % 32),
          block(blockIdx.x), blocks(gridDim.x), sessions(launch.sessions), staged(reinterpret_cast<float*>(shared)),
          tiles(shared + a.plan.tiles), gains(reinterpret_cast<float*>(shared + a.plan.gains)),
          query(reinterpret_cast<float*>(shared + a.plan.query)),
          scores(reinterpret_cast<float*>(shared + a.plan.scores)),
          sums(reinterpret_cast<float*>(shared + a.plan.sums)), fed(reinterpret_cast<int*>(shared + a.plan.codes)),
          x(a.room + a.plan.x), qkv(a.room + a.plan.qkv), wide(a.room + a.plan.wide), logits(a.room + a.plan.logits),
          angles(a.room + a.plan.angles), parts(a.room + a.plan.parts), stats(a.room + a.plan.stats) {}

    __device__ void run() {
        // a launch that is given up leaves codes that are codes
        for (int s = block; s < sessions; s += blocks)
#pragma unroll 1
            for (int j = thread; j < b.budget; j += engine_threads) b.chosen[(a.first + s) * b.budget + j] = 0;
        if (__syncthreads_or(thread == 0 && look_at(&a.state->lost))) return;
        // rounds of earlier launches are whole; of this launch's first one this block's part is still to come
        if (thread == 0) target = look_at(&a.state->arrived) / blocks * blocks;
        if (b.budget > 1) fetch(block, 0, 0, 0);
        Held<1> held = hold<1>(a.layers[0].qkv, qkv_width(), a.hidden, by_warp());
        for (int slot = 0;; ++slot) {
            enter(slot);
            if (slot + 1 == b.budget) return;
            for (int layer = 0; layer < a.depth; ++layer)
                if (!pass(layer, slot, held)) return;
            stage_norm(a.norm, [&](int s, int i) { return __ldcg(x + s * a.hidden + i); });
            products<1>(held, a.head, a.codes, a.hidden, by_warp(), blocks * warps, 0, sessions, Nothing{},
                        [&](int s, int n, float sum, float, float) { logits[s * a.codes + n] = sum; });
            leave();
            if (slot + 2 < b.budget) fetch(block, 0, slot + 1, 0);
            held = hold<1>(a.layers[0].qkv, qkv_width(), a.hidden, by_warp());
            if (!meet()) return;
        }
    }

private:
    static constexpr int warps = engine_threads / 32;
    static constexpr int V = Word<F>::size, VP = Word<P>::size;
    static constexpr int most_pairs = 4;  // of a head, that a lane turns
    static constexpr int held_words = 4;  // of each row, that a lane has before the barrier

    // One split of one session's table, for one head of keys.
    struct Item {
        int session, head, split, count;  // `count` tokens are seen
        int own;                          // which is the one that enters; elsewhere: negative, or at least count
    };

    // The first words of this lane's share of R rows of weights.
    template <int R>
    struct Held {
        Word<F> w[R][held_words];
    };

    struct Nothing {
        __device__ float operator()(int, int) const { return 0.0f; }
    };

    __device__ int qkv_width() const { return (a.heads + 2 * a.kv_heads) * a.dim; }
    // Rows of weights go round the blocks first, so that all have as much to read.
    __device__ int by_warp() const { return warp * blocks + block; }
    __device__ P* pages_of(void* pages, int layer) const {
        return static_cast<P*>(pages) + static_cast<std::int64_t>(layer) * b.pages * b.page * a.kv_heads * a.dim;
    }

    // The first half of a barrier: this block's results are there. Nothing waits; what is asked for between the halves is
    // under way while others arrive. The counter only grows, whatever launches came before, so that it needs no setting
    // back and a captured launch can be replayed.
    __device__ void leave() {
        __syncthreads();
        if (thread == 0) arrive(&a.state->arrived), target += blocks;
    }

    // The second half: waits for every block's results; false once a barrier was given up.
    __device__ bool meet() {
        bool lost = false;
        if (thread == 0) {
            for (std::int64_t looks = 1; look_for(&a.state->arrived) < target; ++looks) {
                if (looks % 1024 == 0 && look_at(&a.state->lost)) lost = true;
                if (looks >= a.patience) lost = true;
                if (!lost) continue;
                tell(&a.state->lost, a.told);
                break;
            }
        }
        return !__syncthreads_or(lost);
    }

    // --- what a session enters the passes with

    // The code of a row of logits, as csrc/engine.h's choose_code has it, by a warp; `kept` [codes] is this warp's own.
    __device__ int choose(const float* from, const float* noise, float* kept) const {
        constexpr int together = 8;
        Best best{-INFINITY, INT_MAX};
        for (int i = lane; i < a.codes; i += 32 * together) {
            float v[together];
#pragma unroll
            for (int j = 0; j < together; ++j) v[j] = i + 32 * j < a.codes ? __ldcg(from + i + 32 * j) : 0.0f;
#pragma unroll
            for (int j = 0; j < together; ++j)
                if (i + 32 * j < a.codes) best = better(best, {kept[i + 32 * j] = v[j], i + 32 * j});
        }
        best = warp_best(best);
        const float top = best.value;
        if (!noise || top != top) return best.at;
        const unsigned floor = 0 < b.top_k && b.top_k < a.codes ? kth_largest(kept, static_cast<int>(b.top_k)) : 0;
        best = {-INFINITY, INT_MAX};
        for (int i = lane; i < a.codes; i += 32) {
            const float scaled = kept[i] == top ? 0.0f : __fmul_rn(__fadd_rn(kept[i], -top), b.inverse);
            const bool out = ordered(kept[i]) < floor;
            best = better(best, {out ? -INFINITY : __fadd_rn(scaled, noise[i]), i});
        }
        return warp_best(best).at;
    }

    // The `count`-th largest of kept [codes] as an ordered number, bit by bit.
    __device__ unsigned kth_largest(const float* kept, int count) const {
        unsigned found = 0;
        for (unsigned bit = 0x80000000u; bit; bit >>= 1)
            if (has_so_many(kept, a.codes, lane, found | bit, count)) found |= bit;
        return found;
    }

    __device__ float embedded(int code, int slot, int i) const {
        const float e = to_float(static_cast<const F*>(a.embedding)[static_cast<std::int64_t>(code) * a.hidden + i]);
        if (!a.place) return e;
        return rounded<F>(e + to_float(static_cast<const F*>(a.place)[static_cast<std::int64_t>(slot) * a.hidden + i]));
    }

    // Every block chooses every session's code, which is cheaper than telling it; one of them writes it down.
    __device__ void enter(int slot) {
        if constexpr (S == 1)
            enter_alone(slot);
        else
            enter_each(slot);
    }

    __device__ void enter_each(int slot) {
#pragma unroll 1
        for (int s = warp; s < sessions; s += warps) {
            const std::int64_t session = a.first + s, at = session * b.budget + slot;
            const float* from = slot ? logits + s * a.codes : b.first + session * a.codes;
            float* kept = staged + s * a.plan.row;
            const int code = choose(from, b.noise ? b.noise + at * a.codes : nullptr, kept);
            const int next = b.given ? b.given[at] : code;
            if (lane == 0) fed[s] = next;
            if (s % blocks != block) continue;
            if (lane == 0) b.chosen[at] = code;
#pragma unroll 4
            for (int i = lane; i < a.codes && b.logits; i += 32) b.logits[at * a.codes + i] = kept[i];
#pragma unroll 1
            for (int i = lane; i < a.hidden; i += 32) x[s * a.hidden + i] = embedded(next, slot, i);
            turn(s, b.positions[slot * b.batch + session]);
        }
        __syncthreads();
    }

    // The best of all threads' own, in the order of better(), which is that of no thread; `bests` [warps] is free.
    __device__ Best block_best(Best mine, Best* bests) const {
        mine = warp_best(mine);
        if (lane == 0) bests[warp] = mine;
        __syncthreads();
        return warp_best(lane < warps ? bests[lane] : Best{-INFINITY, INT_MAX});
    }

    // choose() by all warps for the one session there is.
    __device__ int choose_alone(const float* from, const float* noise, float* kept) const {
        constexpr int together = 4;
        auto* bests = reinterpret_cast<Best*>(sums);
        Best best{-INFINITY, INT_MAX};
        for (int i = thread; i < a.codes; i += engine_threads * together) {
            float v[together];
#pragma unroll
            for (int j = 0; j < together; ++j)
                v[j] = i + engine_threads * j < a.codes ? __ldcg(from + i + engine_threads * j) : 0.0f;
#pragma unroll
            for (int j = 0; j < together; ++j)
                if (const int n = i + engine_threads * j; n < a.codes) best = better(best, {kept[n] = v[j], n});
        }
        best = block_best(best, bests);
        const float top = best.value;
        if (!noise || top != top) return best.at;
        const unsigned floor = 0 < b.top_k && b.top_k < a.codes ? kth_largest(kept, static_cast<int>(b.top_k)) : 0;
        best = {-INFINITY, INT_MAX};
        for (int i = thread; i < a.codes; i += engine_threads) {
            const float scaled = kept[i] == top ? 0.0f : __fmul_rn(__fadd_rn(kept[i], -top), b.inverse);
            const bool out = ordered(kept[i]) < floor;
            best = better(best, {out ? -INFINITY : __fadd_rn(scaled, noise[i]), i});
        }
        return block_best(best, bests + warps).at;
    }

    __device__ void enter_alone(int slot) {
        const std::int64_t at = a.first * b.budget + slot;
        // the position is known: another warp's fp64 while the code is chosen
        if (block == 0 && warp == warps - 1) turn(0, b.positions[slot * b.batch + a.first]);
        const float* from = slot ? logits : b.first + static_cast<std::int64_t>(a.first) * a.codes;
        const int code = choose_alone(from, b.noise ? b.noise + at * a.codes : nullptr, staged);
        const int next = b.given ? b.given[at] : code;
        if (thread == 0) fed[0] = next;
        if (block == 0) {
            if (thread == 0) b.chosen[at] = code;
            for (int i = thread; i < a.codes && b.logits; i += engine_threads) b.logits[at * a.codes + i] = staged[i];
            for (int i = thread; i < a.hidden; i += engine_threads) x[i] = embedded(next, slot, i);
        }
        __syncthreads();
    }

    // Cosines and sines of a position: angles in fp64, whole turns taken off by products without a rounding.
    __device__ void turn(int s, std::int64_t position) {
        const int half = a.dim / 2;
#pragma unroll 1
        for (int i = lane; i < half; i += 32) {
            const double angle = static_cast<double>(position) * a.frequency[i];
            const double turns = rint(angle * 0.15915494309189535);
            const double left = fma(-turns, 2.4492935982947064e-16, fma(-turns, 6.283185307179586, angle));
            double sine, cosine;
            sincospi(left * 0.3183098861837907, &sine, &cosine);
            angles[s * a.dim + i] = static_cast<float>(cosine);
            angles[s * a.dim + half + i] = static_cast<float>(sine);
        }
    }

    // --- products

    // Where element `i` of a staged row lies: lanes with a word of weights each then read, side by side, four floats.
    __device__ static int place_of(int i) {
        const int word = i / V, e = i % V;
        return word / 32 * 32 * V + e / 4 * 128 + word % 32 * 4 + e % 4;
    }

    // The root mean square norm of each session's hidden row, staged: get(session, i) gives its elements.
    template <class Get>
    __device__ void stage_norm(const void* weight, const Get& get) {
        if constexpr (S == 1)
            norm_alone(static_cast<const F*>(weight), get);
        else
            norm_each(static_cast<const F*>(weight), get);
    }

    // Every warp sums the squares for itself, in one order: none waits for another.
    template <class Get>
    __device__ void norm_alone(const F* weight, const Get& get) {
        float squares = 0.0f;
#pragma unroll 8
        for (int i = lane; i < a.hidden; i += 32) {
            const float v = rounded<F>(get(0, i));
            squares += v * v;
        }
        const float scale = 1.0f / sqrtf(warp_sum(squares) / static_cast<float>(a.hidden) + a.eps);
#pragma unroll 1
        for (int i = thread; i < a.hidden; i += engine_threads)
            staged[place_of(i)] = rounded<F>(to_float(weight[i]) * rounded<F>(rounded<F>(get(0, i)) * scale));
        __syncthreads();
    }

    // A warp a session.
    template <class Get>
    __device__ void norm_each(const F* weight, const Get& get) {
#pragma unroll 1
        for (int i = thread; i < a.hidden; i += engine_threads) {
            float v[S];
            const float gain = to_float(weight[i]);
#pragma unroll
            for (int s = 0; s < S; ++s) v[s] = s < sessions ? get(s, i) : 0.0f;
            gains[i] = gain;
#pragma unroll
            for (int s = 0; s < S; ++s)
                if (s < sessions) staged[s * a.plan.row + place_of(i)] = rounded<F>(v[s]);
        }
        __syncthreads();
#pragma unroll 1
        for (int s = warp; s < sessions; s += warps) {
            float *row = staged + s * a.plan.row, squares = 0.0f;
            for (int i = lane; i < a.hidden; i += 32) squares += row[place_of(i)] * row[place_of(i)];
            const float scale = 1.0f / sqrtf(warp_sum(squares) / static_cast<float>(a.hidden) + a.eps);
            for (int i = lane; i < a.hidden; i += 32) {
                float& v = row[place_of(i)];
                v = rounded<F>(gains[i] * rounded<F>(v * scale));
            }
        }
        __syncthreads();
    }

    __device__ void stage_plain(const float* from, int n) {
#pragma unroll 4
        for (int i = 4 * thread; i < sessions * n; i += 4 * engine_threads) {
            const float4 v = __ldcg(reinterpret_cast<const float4*>(from + i));
            float* to = staged + i / n * a.plan.row + place_of(i % n);
            *reinterpret_cast<float4*>(to) =
                float4{rounded<F>(v.x), rounded<F>(v.y), rounded<F>(v.z), rounded<F>(v.w)};
        }
        __syncthreads();
    }

    // Asks for this lane's first words of row n, and of row outs + n if R is 2, of the next phase's [R outs, inner].
    template <int R>
    __device__ Held<R> hold(const void* weight, int outs, int inner, int n) const {
        Held<R> held{};
        const F* rows = static_cast<const F*>(weight) + static_cast<std::int64_t>(n) * inner;
#pragma unroll
        for (int c = 0; c < held_words; ++c)
#pragma unroll
            for (int r = 0; r < R; ++r)
                if (const int i = (lane + 32 * c) * V; n < outs && i < inner)
                    held.w[r][c] = load_weights<Word<F>>(rows + static_cast<std::int64_t>(r) * outs * inner + i);
        return held;
    }

    // Rows n = from, from + step, ... of weights [R outs, inner], a warp each, times the staged rows of sessions
    // [low, high), which lie at row 0 on; `held` is of row `from`. put(session, n, sum, sum of row outs + n if R is 2,
    // before(session, n)) gets each result once; before() is asked before the product.
    template <int R, class Before, class Put>
    __device__ void products(const Held<R>& held, const void* weight, int outs, int inner, int from, int step, int low,
                             int high, const Before& before, const Put& put) const {
        const int count = high - low;
#pragma unroll 1
        for (int n = from; n < outs; n += step) {
            const float old = lane < count ? before(low + lane, n) : 0.0f;
            const Held<R> words = n == from ? held : hold<R>(weight, outs, inner, n);
            float sum[R][S] = {};
#pragma unroll
            for (int c = 0; c < held_words; ++c)
                if ((lane + 32 * c) * V < inner) add_words<R>(words, c, lane + 32 * c, count, sum);
            const F* rows = static_cast<const F*>(weight) + static_cast<std::int64_t>(n) * inner;
#pragma unroll 2
            for (int word = lane + 32 * held_words; word * V < inner; word += 32) {
                Held<R> one;
#pragma unroll
                for (int r = 0; r < R; ++r)
                    one.w[r][0] = load_weights<Word<F>>(rows + static_cast<std::int64_t>(r) * outs * inner + word * V);
                add_words<R>(one, 0, word, count, sum);
            }
#pragma unroll
            for (int s = 0; s < S; ++s) {
                if (s >= count) continue;
                const float one = warp_sum(sum[0][s]), two = R == 2 ? warp_sum(sum[R - 1][s]) : 0.0f;
                if (lane == s) put(low + s, n, one, two, old);
            }
        }
    }

    // Adds the products of a word of each row, the `word`-th of a row and the `c`-th held, with every session's.
    template <int R>
    __device__ __forceinline__ void add_words(const Held<R>& held, int c, int word, int count,
                                              float (&sum)[R][S]) const {
        const float* at = staged + word / 32 * 32 * V + lane * 4;
#pragma unroll
        for (int s = 0; s < S; ++s) {
            if (s >= count) continue;
#pragma unroll
            for (int e = 0; e < V; e += 4) {
                const float4 v = *reinterpret_cast<const float4*>(at + s * a.plan.row + e * 32);
#pragma unroll
                for (int r = 0; r < R; ++r) {
                    const F* w = held.w[r][c].x + e;
                    sum[r][s] += to_float(w[0]) * v.x;
                    sum[r][s] += to_float(w[1]) * v.y;
                    sum[r][s] += to_float(w[2]) * v.z;
                    sum[r][s] += to_float(w[3]) * v.w;
                }
            }
        }
    }

    // Asks for the weights of a phase to come, from memory into the L2 cache: each block for its share, whoever reads.
    __device__ void ahead(const void* weight, int outs, int inner) const {
        const std::int64_t bytes = static_cast<std::int64_t>(inner) * sizeof(F);
#pragma unroll 1
        for (int n = by_warp(); n < outs; n += blocks * warps)
#pragma unroll 1
            for (std::int64_t i = lane * 128; i < bytes; i += 32 * 128)
                prefetch(static_cast<const char*>(weight) + n * bytes + i);
    }

    // --- attention

    __device__ Item item_of(int i, int slot) const {
        const int split = i % a.plan.splits, head = i / a.plan.splits % a.kv_heads;
        const int session = i / a.plan.splits / a.kv_heads, all = a.first + session;
        const int start = b.starts[slot * b.batch + all], before = b.context[all] * static_cast<int>(b.page);
        const int seen = min(before + max(start + 1, 0), static_cast<int>(b.entries * b.page));
        const int from = split * a.plan.split;
        return {session, head, split, min(max(seen - from, 0), a.plan.split), start < 0 ? -1 : before + start - from};
    }

    // Asks for an item's keys and values, 16 bytes a copy, into one of the two places for them. The warps that have
    // rows of weights last, if any, are the first to come here.
    __device__ void fetch(int i, int layer, int slot, int place) {
        if (i < sessions * a.kv_heads * a.plan.splits) {
            const Item it = item_of(i, slot);
            const int words = a.dim / VP, page = static_cast<int>(b.page), from = it.split * a.plan.split;
            const std::int32_t* table = b.table + (a.first + it.session) * b.entries;
            const P *k = pages_of(b.k, layer), *v = pages_of(b.v, layer);
            char *keys = tiles + 2 * place * a.plan.tile, *values = keys + a.plan.tile;
#pragma unroll 1
            for (int j = engine_threads - 1 - thread; j < it.count * words; j += engine_threads) {
                const int t = j / words, w = j % words, entry = (from + t) / page;
                if (t == it.own) continue;  // comes from this pass
                const std::int64_t known = min(max(table[entry], 0), static_cast<int>(b.pages) - 1);
                const std::int64_t at = ((known * page + (from + t) % page) * a.kv_heads + it.head) * a.dim + w * VP;
                copy_ahead(keys + 16 * j, k + at), copy_ahead(values + 16 * j, v + at);
            }
        }
        close_copies();
    }

    // Norms and turns one head of a session's qkv, and gives each element, rounded to F, to put(i, value). A warp.
    template <class Put>
    __device__ void head_row(int session, int head, const void* weight, const Put& put) const {
        const float *from = qkv + session * qkv_width() + head * a.dim, *turns = angles + session * a.dim;
        const F* gain = static_cast<const F*>(weight);
        const int half = a.dim / 2;
        float even[most_pairs], odd[most_pairs], c[most_pairs], s[most_pairs], low[most_pairs], high[most_pairs];
        float squares = 0.0f;
#pragma unroll
        for (int j = 0; j < most_pairs; ++j) {
            const int i = lane + 32 * j;
            if (i >= half) continue;
            even[j] = __ldcg(from + i), odd[j] = __ldcg(from + half + i);
            c[j] = __ldcg(turns + i), s[j] = __ldcg(turns + half + i);
            low[j] = to_float(gain[i]), high[j] = to_float(gain[half + i]);
        }
#pragma unroll
        for (int j = 0; j < most_pairs; ++j) {
            if (lane + 32 * j >= half) continue;
            even[j] = rounded<F>(even[j]), odd[j] = rounded<F>(odd[j]);
            squares += even[j] * even[j];
            squares += odd[j] * odd[j];
        }
        const float scale = 1.0f / sqrtf(warp_sum(squares) / static_cast<float>(a.dim) + a.eps);
#pragma unroll
        for (int j = 0; j < most_pairs; ++j) {
            const int i = lane + 32 * j;
            if (i >= half) continue;
            const float p = rounded<F>(low[j] * rounded<F>(even[j] * scale));
            const float q = rounded<F>(high[j] * rounded<F>(odd[j] * scale));
            // said outright, or the compiler might fuse another product for another S
            put(i, rounded<F>(__fmaf_rn(p, c[j], -__fmul_rn(q, s[j]))));
            put(half + i, rounded<F>(__fmaf_rn(q, c[j], __fmul_rn(p, s[j]))));
        }
    }

    // Queries into shared memory; the entering token's key and value into the tile if this split has it, and into its
    // page if this item is the one that writes it.
    __device__ void own_token(const Item& it, const LayerWeights& w, int layer, int slot, P* keys, P* values) {
        const int group = a.heads / a.kv_heads;
        const std::int64_t row = b.rows[slot * b.batch + a.first + it.session];
        const bool here = 0 <= it.own && it.own < it.count;
        const bool writes = it.split == 0 && 0 <= row && row < b.pages * b.page;
        const std::int64_t to = (row * a.kv_heads + it.head) * a.dim;
        const int at = it.own * a.dim;
#pragma unroll 1
        for (int u = warp; u < group + 2; u += warps) {
            if (u < group) {
                head_row(it.session, it.head * group + u, w.q_norm,
                         [&](int i, float v) { query[u * a.dim + i] = rounded<P>(v); });
            } else if (u == group && (here || writes)) {
                P* page = pages_of(b.k, layer);
                head_row(it.session, a.heads + it.head, w.k_norm, [&](int i, float v) {
                    if (here) keys[at + i] = from_float<P>(v);
                    if (writes) page[to + i] = from_float<P>(v);
                });
            } else if (u == group + 1 && (here || writes)) {
                P* page = pages_of(b.v, layer);
                const float* from = qkv + it.session * qkv_width() + (a.heads + a.kv_heads + it.head) * a.dim;
#pragma unroll 1
                for (int i = lane; i < a.dim; i += 32) {
                    const P v = from_float<P>(rounded<F>(__ldcg(from + i)));
                    if (here) values[at + i] = v;
                    if (writes) page[to + i] = v;
                }
            }
        }
    }

    // How a warp reads a tile: lanes side by side share a token, one word each, rounded up to a power of two of them.
    struct Lanes {
        int words, lanes, part, token, tokens;
        __device__ Lanes(int words, int lane) : words(words), lanes(1) {
            while (lanes < words) lanes *= 2;
            part = lane % lanes, token = lane / lanes, tokens = 32 / lanes;
        }
    };

    __device__ static Word<P> word_of(const P* tile, int t, int count, const Lanes& l) {
        Word<P> w{};
        if (t < count && l.part < l.words) w = reinterpret_cast<const Word<P>*>(tile)[t * l.words + l.part];
        return w;
    }

    __device__ void score(const Item& it, const P* keys, const Lanes& l) {
        const int group = a.heads / a.kv_heads;
        const float scale = 1.0f / sqrtf(static_cast<float>(a.dim));
#pragma unroll 2
        for (int first = warp * l.tokens; first < it.count; first += warps * l.tokens) {
            const int t = first + l.token;
            const Word<P> key = word_of(keys, t, it.count, l);
#pragma unroll 1
            for (int h = 0; h < group; ++h) {
                const float* q = query + h * a.dim + (l.part < l.words ? l.part * VP : 0);
                float sum = 0.0f;
#pragma unroll
                for (int e = 0; e < VP; ++e) sum += to_float(key.x[e]) * q[e];
                for (int o = l.lanes / 2; o; o /= 2) sum += __shfl_xor_sync(~0u, sum, o);
                if (l.part == 0 && t < it.count) scores[h * a.plan.split + t] = sum * scale;
            }
        }
        __syncthreads();
    }

    // Scores to weights relative to the largest; leaves that and their sum for the join. A warp a head.
    __device__ void weigh(const Item& it, float* stat) {
        const int group = a.heads / a.kv_heads;
#pragma unroll 1
        for (int h = warp; h < group; h += warps) {
            float *row = scores + h * a.plan.split, most = -INFINITY, total = 0.0f;
            for (int t = lane; t < it.count; t += 32) most = fmaxf(most, row[t]);
            most = warp_largest(most);
            for (int t = lane; t < it.count; t += 32) total += row[t] = expf(row[t] - most);
            total = warp_sum(total);
            if (lane == 0) stat[2 * h] = most, stat[2 * h + 1] = total;
        }
        __syncthreads();
    }

    // The weighted sum of the values, one head after the other.
    __device__ void sum_values(const Item& it, const P* values, const Lanes& l, float* out) {
        const int group = a.heads / a.kv_heads;
#pragma unroll 1
        for (int h = 0; h < group; ++h) {
            float sum[VP] = {};
#pragma unroll 2
            for (int first = warp * l.tokens; first < it.count; first += warps * l.tokens) {
                const int t = first + l.token;
                const Word<P> value = word_of(values, t, it.count, l);
                const float weight = t < it.count ? scores[h * a.plan.split + t] : 0.0f;
#pragma unroll
                for (int e = 0; e < VP; ++e) sum[e] += weight * to_float(value.x[e]);
            }
            for (int o = l.lanes; o < 32; o *= 2)
#pragma unroll
                for (int e = 0; e < VP; ++e) sum[e] += __shfl_xor_sync(~0u, sum[e], o);
            if (l.token == 0 && l.part < l.words)
#pragma unroll
                for (int e = 0; e < VP; ++e) sums[warp * a.dim + l.part * VP + e] = sum[e];
            __syncthreads();
#pragma unroll 1
            for (int i = thread; i < a.dim; i += engine_threads) {
                float total = 0.0f;
#pragma unroll
                for (int w = 0; w < warps; ++w) total += sums[w * a.dim + i];
                out[h * a.dim + i] = total;
            }
            __syncthreads();
        }
    }

    // This block's items, one after the other; the next one's keys and values are under way meanwhile.
    __device__ void attend(const LayerWeights& w, int layer, int slot) {
        const int items = sessions * a.kv_heads * a.plan.splits, group = a.heads / a.kv_heads;
        const Lanes l(a.dim / VP, lane);
        int place = 0;
#pragma unroll 1
        for (int i = block; i < items; i += blocks, place ^= 1) {
            fetch(i + blocks, layer, slot, place ^ 1);
            const Item it = item_of(i, slot);
            P* keys = reinterpret_cast<P*>(tiles + 2 * place * a.plan.tile);
            P* values = reinterpret_cast<P*>(tiles + (2 * place + 1) * a.plan.tile);
            own_token(it, w, layer, slot, keys, values);
            wait_copies<1>();
            __syncthreads();
            const int at = (it.session * a.plan.splits + it.split) * a.heads + it.head * group;
            float* stat = stats + 2 * at;
            if (it.count) {
                score(it, keys, l);
                weigh(it, stat);
                sum_values(it, values, l, parts + at * a.dim);
            } else {
                for (int h = thread; h < group; h += engine_threads) stat[2 * h + 1] = 0.0f;  // saw nothing
                __syncthreads();
            }
        }
        wait_copies<0>();
    }

    // What each split of a session weighs, by head: a warp each, into factors [heads, splits] and totals [heads].
    __device__ void weigh_splits(int s, float* factors, float* totals) const {
        const int splits = a.plan.splits;
        const auto* stat = reinterpret_cast<const float2*>(stats) + s * splits * a.heads;
        float* weights = totals + a.heads;
#pragma unroll 1
        for (int h = warp; h < a.heads; h += warps) {
            float most = -INFINITY, total = 0.0f;
            for (int i = lane; i < splits; i += 32) {
                const float2 found = __ldcg(stat + i * a.heads + h);
                factors[h * splits + i] = found.x, weights[h * splits + i] = found.y;
                if (found.y != 0.0f) most = fmaxf(most, found.x);
            }
            most = warp_largest(most);
            for (int i = lane; i < splits; i += 32) {
                float& factor = factors[h * splits + i];
                factor = weights[h * splits + i] != 0.0f ? expf(factor - most) : 0.0f;
                total += weights[h * splits + i] * factor;
            }
            total = warp_sum(total);
            if (lane == 0) totals[h] = total;
        }
        __syncthreads();
    }

    // Joins the splits of a session into a staged row, heads side by side. The first parts are under way while the splits
    // are weighed; `together` of them are all that a window of dmlab has.
    __device__ void join(int s) {
        constexpr int together = 24;
        const int splits = a.plan.splits, width = a.heads * a.dim;
        const float* part = parts + s * splits * width;
        // where the tiles lie between two attentions
        float *factors = reinterpret_cast<float*>(tiles), *totals = factors + a.heads * splits;
        float v[together];
#pragma unroll
        for (int j = 0; j < together; ++j) v[j] = j < splits && thread < width ? __ldcg(part + j * width + thread) : 0.0f;
        weigh_splits(s, factors, totals);
#pragma unroll 1
        for (int i = thread; i < width; i += engine_threads) {
            const float* factor = factors + i / a.dim * splits;
            float sum = 0.0f;
            int done = 0;
            if (i == thread) {
                done = min(together, splits);
#pragma unroll
                for (int j = 0; j < together; ++j)  // what a split that saw nothing has left is of no meaning
                    if (j < splits && factor[j] != 0.0f) sum += factor[j] * v[j];
            }
#pragma unroll 4
            for (int j = done; j < splits; ++j) {
                const float more = __ldcg(part + j * width + i);
                if (factor[j] != 0.0f) sum += factor[j] * more;
            }
            const float total = totals[i / a.dim];
            staged[place_of(i)] = rounded<F>(total != 0.0f ? sum / total : sum);
        }
        __syncthreads();
    }

    // The output projection: sessions are shared out among the blocks, and then rows, so that few join the same splits.
    __device__ int blocks_each() const { return blocks > sessions ? blocks / sessions : 1; }
    __device__ int projected() const { return warp * blocks_each() + block % blocks_each(); }

    __device__ void project(const Held<1>& held, const void* weight) {
        const int each = blocks_each(), at_once = blocks / each;
#pragma unroll 1
        for (int s = block / each; s < sessions; s += at_once) {
            join(s);
            products<1>(held, weight, a.hidden, a.heads * a.dim, projected(), warps * each, s, s + 1, residual(),
                        added());
            __syncthreads();
        }
    }

    // The residual stream, asked for before a product and written after it, by the same lane.
    __device__ auto residual() const {
        return [this](int s, int n) { return __ldcg(x + s * a.hidden + n); };
    }
    __device__ auto added() const {
        return [this](int s, int n, float sum, float, float old) { x[s * a.hidden + n] = old + sum; };
    }

    // One token of every session through a layer; false once a barrier was given up. `held` is of the layer's qkv, and
    // afterwards of what comes next: the next layer's, or the head.
    __device__ bool pass(int layer, int slot, Held<1>& held) {
        const LayerWeights w = a.layers[layer];
        const bool last = layer + 1 == a.depth;
        const void* then = last ? a.head : a.layers[layer + 1].qkv;
        if (layer == 0)
            stage_norm(w.norm1, [&](int s, int i) { return embedded(fed[s], slot, i); });
        else
            stage_norm(w.norm1, residual());
        products<1>(held, w.qkv, qkv_width(), a.hidden, by_warp(), blocks * warps, 0, sessions, Nothing{},
                    [&](int s, int n, float sum, float, float) { qkv[s * qkv_width() + n] = sum; });
        leave();
        ahead(w.out, a.hidden, a.heads * a.dim);
        if (!meet()) return false;
        attend(w, layer, slot);
        leave();
        held = hold<1>(w.out, a.hidden, a.heads * a.dim, projected());
        ahead(w.gate_up, 2 * a.inner, a.hidden);
        if (!meet()) return false;
        project(held, w.out);
        leave();
        const Held<2> both = hold<2>(w.gate_up, a.inner, a.hidden, by_warp());
        ahead(w.down, a.hidden, a.inner);
        if (!meet()) return false;
        stage_norm(w.norm2, residual());
        products<2>(both, w.gate_up, a.inner, a.hidden, by_warp(), blocks * warps, 0, sessions, Nothing{},
                    [&](int s, int n, float gate, float up, float) {
                        wide[s * a.inner + n] = gate / (1.0f + expf(-gate)) * up;
                    });
        leave();
        held = hold<1>(w.down, a.hidden, a.inner, by_warp());
        ahead(then, last ? a.codes : qkv_width(), a.hidden);
        if (!meet()) return false;
        stage_plain(wide, a.inner);
        products<1>(held, w.down, a.hidden, a.inner, by_warp(), blocks * warps, 0, sessions, residual(), added());
        leave();
        if (!last) fetch(block, layer + 1, slot, 0);
        held = hold<1>(then, last ? a.codes : qkv_width(), a.hidden, by_warp());
        return meet();
    }

    const EngineLaunch& a;
    const BlockArgs& b;
    const int thread, warp, lane, block, blocks, sessions;
    float* const staged;
    char* const tiles;
    float *const gains, *const query, *const scores, *const sums;
    int* const fed;
    float *const x, *const qkv, *const wide, *const logits, *const angles, *const parts, *const stats;
    unsigned long long target = 0;  // what the counter stands at when the last barrier was passed
};

}  // namespace flexlam
