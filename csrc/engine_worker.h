// How the threads of the CPU engine go through the layers together; of csrc/engine.cpp and csrc/append_amx.cpp. Nothing here
// has a name outside of the including file: the linker keeps one of equal inline functions, and that of a file compiled for
// AVX-512 must not be what a processor without it runs.
#pragma once

#include <algorithm>

#include "decode_parts.h"
#include "engine.h"
#include "parallel.h"

namespace flexlam {
namespace {

// The half-open range of `total` things that falls to one of `count` threads.
struct Share {
    std::int64_t first, last;
    Share(std::int64_t total, int rank, int count) : first(total * rank / count), last(total * (rank + 1) / count) {}
};

// What one block of codes needs, laid out in one piece of memory: shared by the threads, but for `y` and `attended`, of
// which each has its own.
struct Shared {
    float *x, *qkv, *q, *wide, *logits, *cosine, *sine, *scratch, *parts, *y, *attended;
    std::int64_t total = 0, y_size, attended_size;

    static std::int64_t entries_of(const BlockArgs& b) {
        AttendArgs a{};
        a.page = b.page;
        return split_entries(a);
    }

    Shared(const ModelShape& m, const BlockArgs& b, int threads, float* base) {
        const std::int64_t entries = entries_of(b), splits = (b.entries + entries - 1) / entries;
        const auto take = [&](std::int64_t n) {
            float* at = base ? base + total : nullptr;
            total += padded(b.batch * n);
            return at;
        };
        y_size = padded(std::max({m.hidden, m.inner, m.heads * m.dim})), attended_size = m.heads * m.dim;
        x = take(m.hidden), qkv = take((m.heads + 2 * m.kv_heads) * m.dim), q = take(m.heads * m.dim);
        wide = take(m.inner), logits = take(m.codes), cosine = take(m.dim / 2), sine = take(m.dim / 2);
        scratch = take(m.codes), parts = take(splits * m.heads * (padded(m.dim) + widest_vector));
        y = take(threads * y_size), attended = take(threads * attended_size);
    }
};

// One thread's part in the passes of a block. Every thread goes through the same phases; what one leaves for another in
// `Shared` lies on different sides of a barrier.
class Worker {
public:
    Worker(const ModelShape& m, const ModelWeights& w, const BlockArgs& b, const Shared& s, Variant variant, int rank,
           int count, Barrier& barrier, const std::vector<double>& frequency)
        : m_(m), w_(w), b_(b), s_(s), weights_(decode_kernels(variant, m.type)), pages_(decode_kernels(variant, b.type)),
          rank_(rank), count_(count), barrier_(barrier), frequency_(frequency),
          y_(s.y + rank * b.batch * s.y_size), attended_(s.attended + rank * b.batch * s.attended_size),
          attend_{s.q, nullptr, nullptr, b.table, b.context, nullptr, attended_, b.batch, 1, m.heads, m.kv_heads, m.dim,
                  b.page, b.entries, b.pages, Float::f32, b.type} {
        const std::int64_t entries = Shared::entries_of(b);
        parts_ = {entries, (b.entries + entries - 1) / entries, padded(m.dim) + widest_vector, s.parts};
    }

    void run() {
        for (std::int64_t slot = 0; slot < b_.budget; ++slot) {
            for (std::int64_t s = rank_; s < b_.batch; s += count_) enter(s, slot);
            barrier_.wait(count_);
            if (slot + 1 == b_.budget) return;
            for (std::size_t layer = 0; layer < w_.layers.size(); ++layer) {
                project(layer, slot);
                finish(layer, b_.starts + slot * b_.batch);
            }
            head();
        }
    }

    // What follows the queries of a layer, which stand in Shared::q: attention, output and feed-forward layer.
    void finish(std::size_t layer, const std::int32_t* starts) {
        const LayerWeights& w = w_.layers[layer];
        attend_.k = layer_of(b_.k, layer), attend_.v = layer_of(b_.v, layer), attend_.start = starts;
        for (std::int64_t i = rank_; i < b_.batch * parts_.splits; i += count_)
            pages_.part(attend_, parts_, i / parts_.splits, i % parts_.splits);
        barrier_.wait(count_);
        for (std::int64_t s = 0; s < b_.batch; ++s) pages_.join(attend_, parts_, s);
        product({attended_, nullptr, w.out, s_.x, s_.x, b_.batch, m_.heads * m_.dim, m_.hidden, Float::f32, m_.type,
                 Float::f32, false, 0.0f});
        barrier_.wait(count_);
        product({s_.x, w.norm2, w.gate_up, nullptr, s_.wide, b_.batch, m_.hidden, m_.inner, Float::f32, m_.type,
                 Float::f32, true, m_.eps});
        barrier_.wait(count_);
        product({s_.wide, nullptr, w.down, s_.x, s_.x, b_.batch, m_.inner, m_.hidden, Float::f32, m_.type, Float::f32,
                 false, 0.0f});
        barrier_.wait(count_);
    }

    // Logits of the last layer's output.
    void head() {
        product({s_.x, w_.norm, w_.head, nullptr, s_.logits, b_.batch, m_.hidden, m_.codes, Float::f32, m_.type,
                 Float::f32, false, m_.eps});
        barrier_.wait(count_);
    }

private:
    // Chooses the code of `slot`, and makes it the next pass's input.
    void enter(std::int64_t session, std::int64_t slot) {
        const std::int64_t at = session * b_.budget + slot;
        const float* logits = (slot ? s_.logits : b_.first) + session * m_.codes;
        const float* noise = b_.noise ? b_.noise + at * m_.codes : nullptr;
        b_.chosen[at] = choose_code(logits, noise, m_.codes, b_.inverse, b_.top_k, s_.scratch + session * m_.codes);
        if (b_.logits) std::copy_n(logits, m_.codes, b_.logits + at * m_.codes);
        const std::int64_t code = b_.given ? b_.given[at] : b_.chosen[at];
        float* x = s_.x + session * m_.hidden;
        weights_.embed(w_.embedding, code, w_.place, slot, m_.hidden, x);
        const std::int64_t half = session * (m_.dim / 2);
        angles_at(b_.positions[slot * b_.batch + session], frequency_, s_.cosine + half, s_.sine + half);
    }

    void product(const LinearArgs& a) {
        weights_.rows(a, y_);
        const Share blocks(padded(a.outs) / widest_vector, rank_, count_);
        weights_.outs(a, y_, blocks.first * widest_vector, std::min(a.outs, blocks.last * widest_vector));
    }

    // Queries of a layer into Shared::q, keys and values into pages.
    void project(std::size_t layer, std::int64_t slot) {
        const LayerWeights& w = w_.layers[layer];
        const std::int64_t heads = m_.heads + m_.kv_heads, wide = (heads + m_.kv_heads) * m_.dim;
        product({s_.x, w.norm1, w.qkv, nullptr, s_.qkv, b_.batch, m_.hidden, wide, Float::f32, m_.type, Float::f32, false,
                 m_.eps});
        barrier_.wait(count_);
        const WriteArgs write{s_.qkv, w.q_norm, w.k_norm, s_.cosine, s_.sine, b_.rows + slot * b_.batch,
                              layer_of(b_.k, layer), layer_of(b_.v, layer), s_.q, b_.batch, m_.heads, m_.kv_heads, m_.dim,
                              b_.pages * b_.page, Float::f32, m_.type, b_.type, m_.eps};
        const Share mine(heads, rank_, count_);
        for (std::int64_t s = 0; s < b_.batch; ++s) weights_.write(write, s, mine.first, mine.last);
        barrier_.wait(count_);
    }

    void* layer_of(void* pages, std::size_t layer) const {
        const std::int64_t bytes = b_.pages * b_.page * m_.kv_heads * m_.dim * (b_.type == Float::f32 ? 4 : 2);
        return static_cast<char*>(pages) + static_cast<std::int64_t>(layer) * bytes;
    }

    const ModelShape& m_;
    const ModelWeights& w_;
    const BlockArgs& b_;
    const Shared& s_;
    const DecodeKernels &weights_, &pages_;
    const int rank_, count_;
    Barrier& barrier_;
    const std::vector<double>& frequency_;
    float *y_, *attended_;
    AttendArgs attend_;
    Parts parts_;
};

}  // namespace
}  // namespace flexlam
