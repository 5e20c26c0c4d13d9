#include "encoder.h"

#include "prefill.h"

#ifdef FLEXLAM_X86_VARIANTS
#define FLEXLAM_VARIANT amx
#define FLEXLAM_LANES 16
#include <immintrin.h>

#include "vectors.inl"

#include "tiles.h"
#include "tiles_attend.h"
#include "tiles_layers.h"

namespace flexlam {
namespace {

using namespace amx;

// What one call shares between threads. Columns are tokens.
struct Room {
    std::int64_t blocks, total = 0;
    float *x, *own;
    std::uint32_t *normed, *queries, *attended, *wide;  // packed tiles
    std::uint16_t *keys, *values;                       // [tokens, heads, dim]

    Room(const EncoderShape& m, std::int64_t tokens, int threads, float* base) : blocks(tokens / side) {
        const auto take = [&](std::int64_t n) {
            float* at = base ? base + total : nullptr;
            total += padded(n);
            return at;
        };
        const auto tiles = [&](std::int64_t features) {
            return reinterpret_cast<std::uint32_t*>(take(features / pairs * blocks * words));
        };
        const auto halves = [&] { return reinterpret_cast<std::uint16_t*>(take(tokens * m.width / 2)); };
        x = take(m.width * tokens), own = take(threads * own_size(m, tokens));
        normed = tiles(m.width), queries = tiles(m.width), attended = tiles(m.width), wide = tiles(m.inner);
        keys = halves(), values = halves();
    }
    static std::int64_t own_size(const EncoderShape& m, std::int64_t tokens) {
        return std::max(m.width / m.heads, pairs) * tokens;
    }
};

// One thread's part in one transition.
class Encoding : Columns {
public:
    Encoding(const EncoderShape& m, const Room& r, const AttendArgs& seen, int rank, int count, Barrier& barrier)
        : Columns(r.x, r.blocks, r.own + rank * Room::own_size(m, r.blocks * side), rank, count, barrier), m_(m), r_(r),
          seen_(seen), dim_(m.width / m.heads) {}

    void run(const std::vector<EncoderLayer>& layers, const std::uint16_t* tokens) {
        take_rows(tokens, width_, m_.width);
        wait();
        for (const EncoderLayer& w : layers) {
            norm(w.norm1, w.norm1_bias);
            project(w);
            attend();
            add_product(w.out, w.out_bias, r_.attended, m_.width, m_.width);
            norm(w.norm2, w.norm2_bias);
            widen(w);
            add_product(w.down, w.down_bias, r_.wide, m_.width, m_.inner);
        }
    }

    // The norm of the first `keep` tokens, as rows again.
    void finish(const void* weight, const void* bias, std::int64_t keep, std::uint16_t* out) {
        const Share mine((keep + side - 1) / side, rank_, count_);
        for (std::int64_t b = mine.first; b < mine.last; ++b) {
            const Spread spread = spread_of(b);
            for (std::int64_t f = 0; f < m_.width; f += side) {
                float columns[words], rows[words];
                for (std::int64_t i = 0; i < side; ++i) store(columns + i * side, normal(spread, b, f + i, weight, bias));
                transpose(columns, 64, rows);
                for (std::int64_t n = b * side; n < std::min((b + 1) * side, keep); ++n)
                    store(out + n * m_.width + f, to_bf16(load<vf>(rows + n % side * side)));
            }
        }
        wait();
    }

private:
    struct Spread {
        vf mean, scale;  // 1 / standard deviation
    };

    Spread spread_of(std::int64_t b) const {
        const float* x = x_ + b * side;
        vf sum{}, squares{};
        for (std::int64_t f = 0; f < m_.width; ++f) sum += load<vf>(x + f * width_);
        const vf mean = sum / static_cast<float>(m_.width);
        for (std::int64_t f = 0; f < m_.width; ++f) {
            const vf v = load<vf>(x + f * width_) - mean;
            squares += v * v;
        }
        const __m512 root = _mm512_sqrt_ps(intrinsic(squares / static_cast<float>(m_.width) + m_.eps));
        return {mean, (vf)_mm512_div_ps(_mm512_set1_ps(1.0f), root)};
    }

    vf normal(const Spread& s, std::int64_t b, std::int64_t f, const void* weight, const void* bias) const {
        return (load<vf>(x_ + f * width_ + b * side) - s.mean) * s.scale * number(weight, f) + number(bias, f);
    }

    void norm(const void* weight, const void* bias) {
        const Share mine(blocks_, rank_, count_);
        for (std::int64_t b = mine.first; b < mine.last; ++b) {
            const Spread s = spread_of(b);
            for (std::int64_t f = 0; f < m_.width; f += 2)
                pack_into(r_.normed, f, b, normal(s, b, f, weight, bias), normal(s, b, f + 1, weight, bias));
        }
        wait();
    }

    void project(const EncoderLayer& w) {
        for (std::int64_t h = rank_; h < 3 * m_.heads; h += count_) {
            for (std::int64_t i = 0; i < dim_; i += pairs)
                product(static_cast<const std::uint16_t*>(w.qkv), h * dim_ + i, m_.width, r_.normed, blocks_, row(i));
            for (std::int64_t i = 0; i < dim_; ++i) {
                const float shift = number(w.qkv_bias, h * dim_ + i);
                for (std::int64_t n = 0; n < width_; n += side) store(row(i) + n, load<vf>(row(i) + n) + shift);
            }
            for (std::int64_t b = 0; b < blocks_; ++b) {
                if (h < m_.heads) {
                    give_query(h, b);
                } else {
                    give_rows(h < 2 * m_.heads ? r_.keys : r_.values, h % m_.heads, b);
                }
            }
        }
        wait();
    }

    void give_query(std::int64_t head, std::int64_t b) {
        std::uint32_t* tiles = r_.queries + (head * blocks_ + b) * (dim_ / pairs) * words;
        for (std::int64_t i = 0; i < dim_; i += 2)
            _mm512_storeu_si512(tiles + i / pairs * words + i % pairs / 2 * side,
                                pack(intrinsic(load<vf>(row(i) + b * side)), intrinsic(load<vf>(row(i + 1) + b * side))));
    }

    void give_rows(std::uint16_t* to, std::int64_t head, std::int64_t b) {
        for (std::int64_t d = 0; d < dim_; d += side) {
            float rows[words];
            transpose(row(d) + b * side, width_ * 4, rows);
            for (std::int64_t n = 0; n < side; ++n)
                store(to + ((b * side + n) * m_.heads + head) * dim_ + d, to_bf16(load<vf>(rows + n * side)));
        }
    }

    void attend() {
        for (std::int64_t h = rank_; h < m_.heads; h += count_)
            Head(seen_, 0, h, r_.queries + h * blocks_ * (dim_ / pairs) * words)
                .run([&](std::int64_t head, std::int64_t b, float* rows) {
                    for (std::int64_t d = 0; d < dim_; d += 2)
                        pack_into(r_.attended, head * dim_ + d, b, load<vf>(rows + d * side), load<vf>(rows + (d + 1) * side));
                });
        wait();
    }

    // GELU by tanh: x / (1 + exp(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3).
    static vf gelu(vf x) {
        const vf y = -1.5957691216f * (x + 0.044715f * x * x * x);
        const vf low = pick<vf>(y < -87.0f, vf{} - 87.0f, y);
        return x / (1.0f + exp_within(pick<vf>(low > 87.0f, vf{} + 87.0f, low)));
    }

    void widen(const EncoderLayer& w) {
        const Share mine(m_.inner / pairs, rank_, count_);
        for (std::int64_t f = mine.first * pairs; f < mine.last * pairs; f += pairs) {
            product(static_cast<const std::uint16_t*>(w.up), f, m_.width, r_.normed, blocks_, own_);
            for (std::int64_t i = 0; i < pairs; i += 2) {
                const float first = number(w.up_bias, f + i), second = number(w.up_bias, f + i + 1);
                for (std::int64_t b = 0; b < blocks_; ++b)
                    pack_into(r_.wide, f + i, b, gelu(load<vf>(row(i) + b * side) + first),
                              gelu(load<vf>(row(i + 1) + b * side) + second));
            }
        }
        wait();
    }

    const EncoderShape& m_;
    const Room& r_;
    const AttendArgs& seen_;
    const std::int64_t dim_;
};

}  // namespace

void EncoderEngine::run(const void* x, void* out, std::int64_t batch, std::int64_t tokens, std::int64_t keep, int threads) {
    const std::lock_guard<std::mutex> alone(busy_);
    const std::size_t needed = static_cast<std::size_t>(Room(shape_, tokens, threads, nullptr).total) + 16;
    if (kept_.size() < needed) kept_.resize(needed);
    const Room room(shape_, tokens, threads,
                    reinterpret_cast<float*>((reinterpret_cast<std::uintptr_t>(kept_.data()) + 63) / 64 * 64));
    // every token sees all: one page of a context, and no token's own
    const std::int32_t table = 0, context = 1, start = static_cast<std::int32_t>(-tokens);
    const AttendArgs seen{nullptr, room.keys, room.values, &table, &context, &start, nullptr, 1, tokens, shape_.heads,
                          shape_.heads, shape_.width / shape_.heads, tokens, 1, 1, Float::bf16, Float::bf16};
    const std::int64_t each = tokens * shape_.width;
    Barrier barrier;
    parallel_region(threads, [&](int rank, int count) {
        const Tiles configured;
        for (std::int64_t i = 0; i < batch; ++i) {
            Encoding encoding(shape_, room, seen, rank, count, barrier);
            encoding.run(layers_, static_cast<const std::uint16_t*>(x) + i * each);
            encoding.finish(norm_, norm_bias_, keep, static_cast<std::uint16_t*>(out) + i * keep * shape_.width);
        }
    });
}

}  // namespace flexlam

#else

namespace flexlam {

void EncoderEngine::run(const void*, void*, std::int64_t, std::int64_t, std::int64_t, int) {}

}  // namespace flexlam

#endif
