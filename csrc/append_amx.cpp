// The append of observed tokens by AMX: all layers in one call, features by tokens throughout (tiles.h says why), so that
// nothing is transposed but keys and values on their way into pages. Only the last token of the last layer is asked for,
// and that one goes the way of a code.
#include "engine.h"
#include "prefill.h"

#ifdef FLEXLAM_X86_VARIANTS
#define FLEXLAM_VARIANT amx
#define FLEXLAM_LANES 16
#include <immintrin.h>

#include "engine_worker.h"
#include "vectors.inl"

#include "tiles.h"
#include "tiles_attend.h"
#include "tiles_layers.h"

namespace flexlam {
namespace {

using namespace amx;

// What one session's append shares between threads. Columns are tokens, `width` of them: up to whole blocks of 16.
struct Room {
    std::int64_t blocks, width, total = 0;
    float *x, *cosine, *sine, *own;                   // [hidden, width], [dim / 2, width] twice, scratch of each thread
    std::uint32_t *normed, *queries, *attended, *wide;  // packed tiles

    Room(const ModelShape& m, std::int64_t tokens, int threads, float* base)
        : blocks((tokens + side - 1) / side), width(blocks * side) {
        const auto take = [&](std::int64_t n) {
            float* at = base ? base + total : nullptr;
            total += padded(n);
            return at;
        };
        const auto tiles = [&](std::int64_t features) {
            return reinterpret_cast<std::uint32_t*>(take(features / pairs * blocks * words));
        };
        x = take(m.hidden * width), cosine = take(m.dim / 2 * width), sine = take(m.dim / 2 * width);
        own = take(threads * own_size(m, width));
        normed = tiles(m.hidden), queries = tiles(m.heads * m.dim), attended = tiles(m.heads * m.dim);
        wide = tiles(m.inner);
    }
    static std::int64_t own_size(const ModelShape& m, std::int64_t width) {
        return std::max<std::int64_t>(m.dim, 2 * pairs) * width;
    }
};

// One thread's part in the append of one session.
class Appender : Columns {
public:
    Appender(const ModelShape& m, const ModelWeights& w, const AppendArgs& a, const Room& r, std::int64_t session,
             const std::vector<double>& frequency, int rank, int count, Barrier& barrier)
        : Columns(r.x, r.blocks, r.own + rank * Room::own_size(m, r.width), rank, count, barrier), m_(m), w_(w), a_(a),
          r_(r), session_(session), frequency_(frequency) {}

    // All layers; of the last one the projections alone, whose last token's queries go to `q` and input to `x`.
    void run(float* q, float* x) {
        enter();
        for (std::size_t layer = 0; layer < w_.layers.size(); ++layer) {
            const bool last = layer + 1 == w_.layers.size();
            norm(w_.layers[layer].norm1);
            project(layer, last ? q : nullptr);
            if (last) break;
            attend(layer);
            add_product(w_.layers[layer].out, nullptr, r_.attended, m_.hidden, m_.heads * m_.dim);
            norm(w_.layers[layer].norm2);
            widen(w_.layers[layer].gate_up);
            add_product(w_.layers[layer].down, nullptr, r_.wide, m_.hidden, m_.inner);
        }
        const Share mine(m_.hidden, rank_, count_);
        for (std::int64_t f = mine.first; f < mine.last; ++f) x[f] = r_.x[f * r_.width + a_.tokens - 1];
        wait();
    }

private:
    // Tokens as columns, zeros beyond them; and the rotation of each.
    void enter() {
        take_rows(static_cast<const std::uint16_t*>(a_.x) + session_ * a_.tokens * m_.hidden, a_.tokens, m_.hidden);
        const Share tokens(r_.width, rank_, count_);
        const std::int64_t half = m_.dim / 2;
        float* angles = own_;  // the thread's own room is free so far
        for (std::int64_t n = tokens.first; n < tokens.last; ++n) {
            const std::int64_t token = std::min(n, a_.tokens - 1);
            angles_at(a_.positions[session_ * a_.tokens + token], frequency_, angles, angles + half);
            for (std::int64_t i = 0; i < half; ++i)
                r_.cosine[i * r_.width + n] = angles[i], r_.sine[i * r_.width + n] = angles[half + i];
        }
        wait();
    }

    // The normed input as packed tiles.
    void norm(const void* weight) {
        const Share mine(r_.blocks, rank_, count_);
        for (std::int64_t b = mine.first; b < mine.last; ++b) {
            const float* x = r_.x + b * side;
            vf squares{};
            for (std::int64_t f = 0; f < m_.hidden; ++f) {
                const vf v = rounded(load<vf>(x + f * r_.width));
                squares += v * v;
            }
            const vf scale = (vf)_mm512_div_ps(
                _mm512_set1_ps(1.0f), _mm512_sqrt_ps(intrinsic(squares / static_cast<float>(m_.hidden) + m_.eps)));
            for (std::int64_t f = 0; f < m_.hidden; f += 2) {
                const vf first = rounded(rounded(load<vf>(x + f * r_.width)) * scale) * number(weight, f);
                const vf second = rounded(rounded(load<vf>(x + (f + 1) * r_.width)) * scale) * number(weight, f + 1);
                pack_into(r_.normed, f, b, first, second);
            }
        }
        wait();
    }

    void project(std::size_t layer, float* last_q) {
        const LayerWeights& w = w_.layers[layer];
        const std::int64_t all = m_.heads + 2 * m_.kv_heads;
        for (std::int64_t h = rank_; h < all; h += count_) {
            for (std::int64_t i = 0; i < m_.dim; i += pairs)
                product(static_cast<const std::uint16_t*>(w.qkv), h * m_.dim + i, m_.hidden, r_.normed, r_.blocks, row(i));
            const bool query = h < m_.heads, value = h >= m_.heads + m_.kv_heads;
            for (std::int64_t b = 0; b < r_.blocks; ++b) {
                if (!value) turn(b, query ? w.q_norm : w.k_norm);
                if (query) {
                    give_query(h, b, last_q);
                } else {
                    give_page(value ? a_.v : a_.k, layer, (h - m_.heads) % m_.kv_heads, b);
                }
            }
        }
        wait();
    }

    // Norm and rotation of one head's rows for a block of tokens.
    void turn(std::int64_t b, const void* weight) {
        const std::int64_t half = m_.dim / 2;
        vf squares{};
        for (std::int64_t i = 0; i < m_.dim; ++i) {
            const vf v = rounded(load<vf>(row(i) + b * side));
            squares += v * v;
        }
        const vf scale = (vf)_mm512_div_ps(
            _mm512_set1_ps(1.0f), _mm512_sqrt_ps(intrinsic(squares / static_cast<float>(m_.dim) + m_.eps)));
        for (std::int64_t i = 0; i < half; ++i) {
            float *first = row(i) + b * side, *second = row(half + i) + b * side;
            const vf even = rounded(rounded(rounded(load<vf>(first)) * scale) * number(weight, i));
            const vf odd = rounded(rounded(rounded(load<vf>(second)) * scale) * number(weight, half + i));
            const vf cosine = load<vf>(r_.cosine + i * r_.width + b * side), sine = load<vf>(r_.sine + i * r_.width + b * side);
            store(first, even * cosine - odd * sine), store(second, odd * cosine + even * sine);
        }
    }

    void give_query(std::int64_t head, std::int64_t b, float* last_q) {
        std::uint32_t* tiles = r_.queries + (head * r_.blocks + b) * (m_.dim / pairs) * words;
        for (std::int64_t i = 0; i < m_.dim; i += 2)
            _mm512_storeu_si512(tiles + i / pairs * words + i % pairs / 2 * side,
                                pack(intrinsic(load<vf>(row(i) + b * side)), intrinsic(load<vf>(row(i + 1) + b * side))));
        if (!last_q || b != (a_.tokens - 1) / side) return;
        for (std::int64_t i = 0; i < m_.dim; ++i) {
            const vf lanes = rounded(load<vf>(row(i) + b * side));
            last_q[head * m_.dim + i] = lanes[(a_.tokens - 1) % side];
        }
    }

    void give_page(void* pages, std::size_t layer, std::int64_t head, std::int64_t b) {
        const std::int64_t pool = a_.pages * a_.page;
        auto* to = static_cast<std::uint16_t*>(pages) + static_cast<std::int64_t>(layer) * pool * m_.kv_heads * m_.dim;
        for (std::int64_t d = 0; d < m_.dim; d += side) {
            float tokens[words];
            transpose(row(d) + b * side, r_.width * 4, tokens);
            for (std::int64_t n = b * side; n < std::min((b + 1) * side, a_.tokens); ++n) {
                const std::int64_t at = a_.rows[session_ * a_.tokens + n];
                if (at < 0 || at >= pool) continue;
                store(to + (at * m_.kv_heads + head) * m_.dim + d, to_bf16(load<vf>(tokens + n % side * side)));
            }
        }
    }

    void attend(std::size_t layer) {
        const std::int64_t bytes = static_cast<std::int64_t>(layer) * a_.pages * a_.page * m_.kv_heads * m_.dim * 2;
        const AttendArgs args{nullptr, static_cast<const char*>(a_.k) + bytes, static_cast<const char*>(a_.v) + bytes,
                              a_.table, a_.context, a_.start, nullptr, a_.batch, a_.tokens, m_.heads, m_.kv_heads, m_.dim,
                              a_.page, a_.entries, a_.pages, Float::bf16, Float::bf16};
        const std::int64_t group = m_.heads / m_.kv_heads;
        for (std::int64_t g = rank_; g < m_.kv_heads; g += count_) {
            const std::uint32_t* queries = r_.queries + g * group * r_.blocks * (m_.dim / pairs) * words;
            Head(args, session_, g, queries).run([&](std::int64_t head, std::int64_t b, float* rows) {
                for (std::int64_t d = 0; d < m_.dim; d += 2)
                    pack_into(r_.attended, head * m_.dim + d, b, load<vf>(rows + d * side), load<vf>(rows + (d + 1) * side));
            });
        }
        wait();
    }

    void widen(const void* gate_up) {
        const auto* w = static_cast<const std::uint16_t*>(gate_up);
        const Share mine(m_.inner / pairs, rank_, count_);
        for (std::int64_t f = mine.first * pairs; f < mine.last * pairs; f += pairs) {
            product(w, f, m_.hidden, r_.normed, r_.blocks, row(0));
            product(w, m_.inner + f, m_.hidden, r_.normed, r_.blocks, row(pairs));
            for (std::int64_t b = 0; b < r_.blocks; ++b)
                for (std::int64_t i = 0; i < pairs; i += 2) pack_into(r_.wide, f + i, b, gated(i, b), gated(i + 1, b));
        }
        wait();
    }

    vf gated(std::int64_t i, std::int64_t b) const {
        const vf gate = load<vf>(row(i) + b * side), up = load<vf>(row(pairs + i) + b * side);
        const vf below = pick<vf>(gate < -87.0f, vf{} - 87.0f, gate);  // e^87 is finite, and -87 e^-87 as good as 0
        return below / (1.0f + exp_within(pick<vf>(below > 87.0f, vf{} - 87.0f, -below))) * up;
    }

    const ModelShape& m_;
    const ModelWeights& w_;
    const AppendArgs& a_;
    const Room& r_;
    const std::int64_t session_;
    const std::vector<double>& frequency_;
};

}  // namespace

void SequenceEngine::append(const AppendArgs& a, int threads) {
    const std::lock_guard<std::mutex> alone(busy_);
    BlockArgs one{};  // the last token, on its way through the last layer
    one.batch = one.budget = 1, one.page = a.page, one.entries = a.entries, one.pages = a.pages, one.type = a.type;
    const std::int64_t before = padded(Shared(shape_, one, threads, nullptr).total);
    float* base = room(before + Room(shape_, a.tokens, threads, nullptr).total);
    const Shared shared(shape_, one, threads, base);
    const Room space(shape_, a.tokens, threads, base + before);
    const Variant variant = find_variant("");
    Barrier barrier;
    parallel_region(threads, [&](int rank, int count) {
        const Tiles configured;
        for (std::int64_t s = 0; s < a.batch; ++s) {
            BlockArgs block = one;
            block.k = a.k, block.v = a.v, block.table = a.table + s * a.entries, block.context = a.context + s;
            const std::int32_t start = a.start[s] + static_cast<std::int32_t>(a.tokens) - 1;
            Appender(shape_, weights_, a, space, s, frequency_, rank, count, barrier).run(shared.q, shared.x);
            Worker worker(shape_, weights_, block, shared, variant, rank, count, barrier, frequency_);
            worker.finish(weights_.layers.size() - 1, &start);
            worker.head();
            if (rank == 0) std::copy_n(shared.logits, shape_.codes, a.logits + s * shape_.codes);
            barrier.wait(count);
        }
    });
}

}  // namespace flexlam

#else

namespace flexlam {

void SequenceEngine::append(const AppendArgs&, int) {}

}  // namespace flexlam

#endif
