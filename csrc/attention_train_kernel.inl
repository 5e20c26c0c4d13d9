// csrc/attention_train_parts.h for vectors of one instruction set (vectors.inl says how); fp32 inside, whatever the type.
//
// Scores stand as keys x queries: a row is a key and its 16 lanes a block of queries, so that softmax, log-sum-exp and masks
// are plain vector operations down the rows. Every product is rows of 16 lanes, added up in one order.
#include <algorithm>
#include <limits>

#include "attention_train_parts.h"
#include "vectors.inl"

namespace flexlam {
namespace FLEXLAM_VARIANT {
namespace {

constexpr std::int64_t lanes = query_block;
constexpr int parts = 16 / V;  // vectors of 16 lanes
constexpr int tall = V == 16 ? 8 : V == 8 ? 4 : 2;  // rows at once: 8 sums, so that none waits for the one before
constexpr float infinity = std::numeric_limits<float>::infinity();

inline vf take(Float type, const void* p, std::int64_t i) {
    if (type == Float::f32) return load<vf>(static_cast<const float*>(p) + i);
    const vh h = load<vh>(static_cast<const std::uint16_t*>(p) + i);
    return type == Float::bf16 ? from_bf16(h) : from_f16(h);
}

inline void give(Float type, void* p, std::int64_t i, vf x) {
    if (type == Float::f32) return store(static_cast<float*>(p) + i, x);
    store(static_cast<std::uint16_t*>(p) + i, type == Float::bf16 ? to_bf16(x) : to_f16(x));
}

inline vf larger(vf a, vf b) { return pick<vf>(a > b, a, b); }

// The exponential of what is 0 at most, and NaN of NaN; below -87 it is 1e-38, which no sum notices that has a 1 in it.
inline vf exp_below(vf y) { return exp_within(pick<vf>(y < -87.0f, vf{} - 87.0f, y)); }

// The natural logarithm of a finite number from 1 on (Cephes' logf), and NaN of NaN.
inline vf log_above(vf x) {
    const vi u = bits<vi>(x), n = (u - 0x3f3504f3) >> 23;  // x / 2^n lies within sqrt(1/2) .. sqrt(2)
    const vf m = bits<vf>(u - (n << 23)) - 1.0f, e = __builtin_convertvector(n, vf), z = m * m;
    vf y = vf{} + 7.0376836292e-2f;
    y = y * m - 1.1514610310e-1f;
    y = y * m + 1.1676998740e-1f;
    y = y * m - 1.2420140846e-1f;
    y = y * m + 1.4249322787e-1f;
    y = y * m - 1.6668057665e-1f;
    y = y * m + 2.0000714765e-1f;
    y = y * m - 2.4999993993e-1f;
    y = y * m + 3.3333331174e-1f;
    y = y * m * z + e * -2.12194440e-4f - 0.5f * z;
    return pick<vf>(x < infinity, m + y + e * 0.693359375f, x);
}

// c[rows][16] (+)= a x b: number (i, t) of a stands at i * across + t * along, and row t of b at t * b_stride.
template <bool Add>
inline void product(const float* a, std::int64_t across, std::int64_t along, std::int64_t rows, std::int64_t steps,
                    const float* b, std::int64_t b_stride, float* c, std::int64_t c_stride) {
    for (std::int64_t i = 0; i < rows; i += tall) {
        vf sum[tall][parts];
        for (int r = 0; r < tall; ++r)
            for (int j = 0; j < parts; ++j) sum[r][j] = Add ? load<vf>(c + (i + r) * c_stride + j * V) : vf{};
        for (std::int64_t t = 0; t < steps; ++t) {
            vf right[parts];
            for (int j = 0; j < parts; ++j) right[j] = load<vf>(b + t * b_stride + j * V);
            for (int r = 0; r < tall; ++r) {
                const float left = a[(i + r) * across + t * along];
                for (int j = 0; j < parts; ++j) sum[r][j] += left * right[j];
            }
        }
        for (int r = 0; r < tall; ++r)
            for (int j = 0; j < parts; ++j) store(c + (i + r) * c_stride + j * V, sum[r][j]);
    }
}

// Tokens [first, last) of one head as rows of fp32; zeros up to `rows`.
void take_rows(Float type, const View& x, std::int64_t session, std::int64_t head, std::int64_t first, std::int64_t last,
               std::int64_t rows, std::int64_t dim, float* to) {
    for (std::int64_t r = 0; r < rows; ++r) {
        const std::int64_t at = session * x.batch + (first + r) * x.token + head * x.head;
        for (std::int64_t d = 0; d < dim; d += V) store(to + r * dim + d, first + r < last ? take(type, x.data, at + d) : vf{});
    }
}

// Row `r` of 16 lanes: what it holds times `factor` becomes token `first + r`, of those before `last`.
void give_rows(Float type, const View& x, std::int64_t session, std::int64_t head, std::int64_t first, std::int64_t last,
               std::int64_t dim, float factor, const float* from) {
    for (std::int64_t n = first; n < last; ++n) {
        const std::int64_t at = session * x.batch + n * x.token + head * x.head;
        for (std::int64_t d = 0; d < dim; d += V) give(type, x.data, at + d, load<vf>(from + (n - first) * dim + d) * factor);
    }
}

// [rows][columns] of fp32 the other way round; both are whole 16s.
void turn(const float* from, std::int64_t rows, std::int64_t columns, float* to) {
    for (std::int64_t j = 0; j < columns; ++j)
        for (std::int64_t i = 0; i < rows; ++i) to[j * rows + i] = from[i * columns + j];
}

// Which lanes of part `j` see the key.
inline vi seeing(std::uint16_t seen, int j) {
    vi mine{};
    for (int i = 0; i < V; ++i) mine[i] = 1 << (j * V + i);
    return ((vi{} + static_cast<std::int32_t>(seen)) & mine) != 0;
}

// A head of keys and values, a block of queries, and its scores.
class Block {
public:
    static std::int64_t room(const SelfArgs& a) { return rows_of(a) * (2 * a.dim + lanes) + 2 * lanes * a.dim; }

    Block(const SelfArgs& a, const Visible& visible, std::int64_t session, std::int64_t key_head, float* room)
        : a_(a), visible_(visible), session_(session), rows_(rows_of(a)), k(room), v(k + rows_ * a.dim),
          scores(v + rows_ * a.dim), q(scores + rows_ * lanes), turned_(q + lanes * a.dim) {
        take_rows(a.type, a.k, session, key_head, 0, a.keys, rows_, a.dim, k);
        take_rows(a.type, a.v, session, key_head, 0, a.keys, rows_, a.dim, v);
    }

    // Calls `body(key, rows)` for the runs of keys of which some query of block `b` sees some; rows are whole 16s.
    template <class Body>
    void each_run(std::int64_t b, const Body& body) const {
        for (std::int64_t i = 0; i < visible_.key_blocks; ++i)
            if (visible_.of(b, i) != Sight::none) body(i * key_block, std::min(key_block, rows_ - i * key_block));
    }

    // Queries of block `b` and, scaled, their scores.
    void score(std::int64_t head, std::int64_t b) {
        take_rows(a_.type, a_.q, session_, head, b * lanes, a_.queries, lanes, a_.dim, q);
        turn(q, lanes, a_.dim, turned_);
        each_run(b, [&](std::int64_t t, std::int64_t rows) {
            product<false>(k + t * a_.dim, a_.dim, 1, rows, a_.dim, turned_, lanes, scores + t * lanes, lanes);
            for (std::int64_t i = t * lanes; i < (t + rows) * lanes; i += V)
                store(scores + i, load<vf>(scores + i) * a_.scale);
        });
    }

    // Calls `body(key, part, which lanes see it)` for every row of the runs of block `b`.
    template <class Body>
    void each_row(std::int64_t b, const Body& body) const {
        each_run(b, [&](std::int64_t t, std::int64_t rows) {
            const std::uint16_t* seen = visible_.rows(b, t / key_block);
            for (std::int64_t r = 0; r < rows; ++r)
                for (int j = 0; j < parts; ++j) body(t + r, j, seeing(seen[r], j));
        });
    }

protected:
    static std::int64_t rows_of(const SelfArgs& a) { return whole(a.keys, 16); }

    const SelfArgs& a_;
    const Visible& visible_;
    const std::int64_t session_, rows_;

public:
    float *const k, *const v, *const scores, *const q;  // [rows, dim] twice, [rows, 16], [16, dim]

protected:
    float* const turned_;  // [dim, 16]
};

std::int64_t forward_room(const SelfArgs& a) { return Block::room(a) + 2 * lanes * a.dim; }

void forward(const SelfArgs& a, const Visible& visible, std::int64_t session, std::int64_t key_head, float* room) {
    Block block(a, visible, session, key_head, room);
    float *sums = room + Block::room(a), *out = sums + lanes * a.dim, *scores = block.scores;
    const std::int64_t group = a.heads / a.kv_heads;
    for (std::int64_t h = key_head * group; h < (key_head + 1) * group; ++h)
        for (std::int64_t b = 0; b * lanes < a.queries; ++b) {
            block.score(h, b);
            vf most[parts], total[parts] = {};
            for (vf& m : most) m = vf{} - infinity;
            block.each_row(b, [&](std::int64_t t, int j, vi seen) {
                most[j] = larger(pick<vf>(seen, load<vf>(scores + t * lanes + j * V), vf{} - infinity), most[j]);
            });
            block.each_row(b, [&](std::int64_t t, int j, vi seen) {
                float* at = scores + t * lanes + j * V;
                const vf weight = pick<vf>(seen, exp_below(load<vf>(at) - most[j]), vf{});
                store(at, weight), total[j] += weight;
            });
            std::fill_n(sums, lanes * a.dim, 0.0f);
            block.each_run(b, [&](std::int64_t t, std::int64_t rows) {
                product<true>(block.v + t * a.dim, 1, a.dim, a.dim, rows, scores + t * lanes, lanes, sums, lanes);
            });
            float log_sums[lanes];
            for (int j = 0; j < parts; ++j) {
                const vf share = pick<vf>(total[j] == vf{}, vf{}, 1.0f / total[j]);
                for (std::int64_t d = 0; d < a.dim; ++d) {
                    float* at = sums + d * lanes + j * V;
                    store(at, load<vf>(at) * share);
                }
                store(log_sums + j * V, pick<vf>(total[j] == vf{}, most[j], most[j] + log_above(total[j])));
            }
            turn(sums, a.dim, lanes, out);
            const std::int64_t last = std::min(a.queries, (b + 1) * lanes);
            give_rows(a.type, a.out, session, h, b * lanes, last, a.dim, 1.0f, out);
            std::copy_n(log_sums, last - b * lanes, a.lse + (session * a.heads + h) * a.queries + b * lanes);
        }
}

std::int64_t backward_room(const SelfArgs& a) {
    return Block::room(a) + whole(a.keys, 16) * (2 * a.dim + lanes) + 5 * lanes * a.dim;
}

// What one block of queries of head `h` adds to the gradients of keys and values, and its own.
void add_block(const SelfArgs& a, const SelfGrads& g, Block& block, std::int64_t session, std::int64_t h, std::int64_t b,
               float* dk, float* dv, float* room) {
    float *ds = room, *grad = ds + whole(a.keys, 16) * lanes, *turned = grad + lanes * a.dim, *out = turned + lanes * a.dim;
    float *dq = out + lanes * a.dim, *weights = block.scores;
    const std::int64_t last = std::min(a.queries, (b + 1) * lanes);
    block.score(h, b);
    take_rows(a.type, g.grad, session, h, b * lanes, a.queries, lanes, a.dim, grad);
    float log_sums[lanes] = {};
    std::copy_n(a.lse + (session * a.heads + h) * a.queries + b * lanes, last - b * lanes, log_sums);
    turn(grad, lanes, a.dim, turned);
    block.each_run(b, [&](std::int64_t t, std::int64_t rows) {
        product<false>(block.v + t * a.dim, a.dim, 1, rows, a.dim, turned, lanes, ds + t * lanes, lanes);
    });
    // The log-sum-exp is rounded: of scores near 1,000 the weights would all be wrong by 3e-5, so they are divided by their
    // sum. The sum over dims of gradient times result is a sum over keys too, of the very numbers it is taken from.
    vf total[parts] = {}, delta[parts] = {};
    block.each_row(b, [&](std::int64_t t, int j, vi seen) {
        float* at = weights + t * lanes + j * V;
        const vf p = pick<vf>(seen, exp_below(load<vf>(at) - load<vf>(log_sums + j * V)), vf{});
        store(at, p), total[j] += p, delta[j] += pick<vf>(seen, p * load<vf>(ds + t * lanes + j * V), vf{});
    });
    for (int j = 0; j < parts; ++j) {
        total[j] = pick<vf>(total[j] == vf{}, vf{}, 1.0f / total[j]), delta[j] *= total[j];
    }
    block.each_row(b, [&](std::int64_t t, int j, vi seen) {
        const std::int64_t at = t * lanes + j * V;
        const vf p = load<vf>(weights + at) * total[j];
        store(weights + at, p), store(ds + at, pick<vf>(seen, p * (load<vf>(ds + at) - delta[j]), vf{}));
    });
    std::fill_n(dq, lanes * a.dim, 0.0f);
    block.each_run(b, [&](std::int64_t t, std::int64_t rows) {
        for (std::int64_t d = 0; d < a.dim; d += lanes) {
            product<true>(weights + t * lanes, lanes, 1, rows, lanes, grad + d, a.dim, dv + t * a.dim + d, a.dim);
            product<true>(ds + t * lanes, lanes, 1, rows, lanes, block.q + d, a.dim, dk + t * a.dim + d, a.dim);
        }
        product<true>(block.k + t * a.dim, 1, a.dim, a.dim, rows, ds + t * lanes, lanes, dq, lanes);
    });
    turn(dq, a.dim, lanes, out);
    give_rows(a.type, g.q, session, h, b * lanes, last, a.dim, a.scale, out);
}

void backward(const SelfArgs& a, const SelfGrads& g, const Visible& visible, std::int64_t session, std::int64_t key_head,
              float* room) {
    Block block(a, visible, session, key_head, room);
    float *dk = room + Block::room(a), *dv = dk + whole(a.keys, 16) * a.dim, *rest = dv + whole(a.keys, 16) * a.dim;
    std::fill(dk, rest, 0.0f);
    const std::int64_t group = a.heads / a.kv_heads;
    for (std::int64_t h = key_head * group; h < (key_head + 1) * group; ++h)
        for (std::int64_t b = 0; b * lanes < a.queries; ++b) add_block(a, g, block, session, h, b, dk, dv, rest);
    give_rows(a.type, g.k, session, key_head, 0, a.keys, a.dim, a.scale, dk);
    give_rows(a.type, g.v, session, key_head, 0, a.keys, a.dim, 1.0f, dv);
}

}  // namespace

const SelfKernels& self_kernels() {
    static const SelfKernels kernels = {forward_room, backward_room, forward, backward};
    return kernels;
}

}  // namespace FLEXLAM_VARIANT
}  // namespace flexlam
