// The parts of csrc/sequence_parts.h, compiled once per instruction set (vectors.inl says how).
// Numbers are fp32 inside and rounded once, where they are stored.
#include <cmath>
#include <vector>

#include "sequence_parts.h"
#include "elements.inl"

namespace flexlam {
namespace FLEXLAM_VARIANT {
namespace {

constexpr std::int64_t up(std::int64_t n) { return (n + V - 1) / V * V; }

// Calls `body(std::integral_constant<Float, type>)`, so that inner loops know the type.
template <class Body>
inline void with_type(Float type, Body&& body) {
    if (type == Float::f32) return body(std::integral_constant<Float, Float::f32>());
    if (type == Float::bf16) return body(std::integral_constant<Float, Float::bf16>());
    body(std::integral_constant<Float, Float::f16>());
}

// Room that a thread keeps from call to call, in whole vectors.
inline float* room(std::int64_t elements) {
    thread_local std::vector<float> kept;
    if (kept.size() < static_cast<std::size_t>(elements)) kept.resize(static_cast<std::size_t>(elements));
    return kept.data();
}

// x [2 half], each half up to whole vectors with zeros behind it, to fp32; returns the sum of squares.
template <Float F>
inline float widen(const void* x, std::int64_t at, std::int64_t half, float* out) {
    vf squares{};
    for (int side = 0; side < 2; ++side)
        for (std::int64_t i = 0; i < half; i += V) {
            const vf v = load_some<F>(x, at + side * half + i, half - i);
            squares += v * v;
            store(out + side * up(half) + i, v);
        }
    return sum_of(squares);
}

struct Angles {
    const float *cosine, *sine;
    std::int64_t second, half;

    template <int Side>
    vf cos(std::int64_t i) const {
        return load_some<Float::f32>(cosine, Side * second + i, half - i);
    }
    template <int Side>
    vf sin(std::int64_t i) const {
        return load_some<Float::f32>(sine, Side * second + i, half - i);
    }
};

inline Angles angles_of(const RotaryArgs& a, std::int64_t batch, std::int64_t token) {
    const std::int64_t at = batch * a.angle_by_batch + token * a.angle_by_token;
    return {a.cosine + at, a.sine + at, a.second, a.dim / 2};
}

inline std::int64_t place(const Heads& h, std::int64_t batch, std::int64_t token, std::int64_t head) {
    return batch * h.by_batch + token * h.by_token + head * h.by_head;
}

inline float scale_of(float squares, const RotaryArgs& a) {
    return 1.0f / std::sqrt(squares / static_cast<float>(a.dim) + a.eps);
}

template <Float In, Float Out>
void rotate_heads(const RotaryForward& f, int which, std::int64_t line, float* y) {
    const RotaryArgs& a = f.shared;
    const Heads& h = a.x[which];
    const std::int64_t batch = line / a.tokens, token = line % a.tokens, half = a.dim / 2, wide = up(half);
    const Angles r = angles_of(a, batch, token);
    const float* w = a.weight[which];
    for (std::int64_t head = 0; head < h.heads; ++head) {
        const float scale = scale_of(widen<In>(h.x, place(h, batch, token, head), half, y), a);
        const std::int64_t to = (line * h.heads + head) * a.dim;
        for (std::int64_t i = 0; i < half; i += V) {
            const vf y1 = load<vf>(y + i) * scale * load_some<Float::f32>(w, i, half - i);
            const vf y2 = load<vf>(y + wide + i) * scale * load_some<Float::f32>(w, half + i, half - i);
            store_some<Out>(f.out[which], to + i, y1 * r.cos<0>(i) - y2 * r.sin<0>(i), half - i);
            store_some<Out>(f.out[which], to + half + i, y2 * r.cos<1>(i) + y1 * r.sin<1>(i), half - i);
        }
    }
}

void rotate(const RotaryForward& f, std::int64_t first, std::int64_t last) {
    float* y = room(2 * up(f.shared.dim / 2));
    for (int which = 0; which < 2; ++which)
        with_type(f.shared.x[which].type, [&](auto in) {
            with_type(f.to, [&](auto out) {
                for (std::int64_t line = first; line < last; ++line) rotate_heads<in(), out()>(f, which, line, y);
            });
        });
}

// Of y = w n, n = x s and the rotation: dy is the gradient turned back, dw += dy n, dx = s (dn - n mean(dn n)).
template <Float In, Float Grad>
void rotate_heads_back(const RotaryBackward& b, int which, std::int64_t line, float* n, float* sums) {
    const RotaryArgs& a = b.shared;
    const Heads &h = a.x[which], &g = b.grad[which];
    const std::int64_t batch = line / a.tokens, token = line % a.tokens, half = a.dim / 2, wide = up(half);
    const Angles r = angles_of(a, batch, token);
    const float* w = a.weight[which];
    float* dn = n + 2 * wide;
    for (std::int64_t head = 0; head < h.heads; ++head) {
        const float scale = scale_of(widen<In>(h.x, place(h, batch, token, head), half, n), a);
        const std::int64_t from = place(g, batch, token, head), to = (line * h.heads + head) * a.dim;
        vf along{};
        for (std::int64_t i = 0; i < half; i += V) {
            const vf g1 = load_some<Grad>(g.x, from + i, half - i), g2 = load_some<Grad>(g.x, from + half + i, half - i);
            const vf dy1 = g1 * r.cos<0>(i) + g2 * r.sin<1>(i), dy2 = g2 * r.cos<1>(i) - g1 * r.sin<0>(i);
            const vf n1 = load<vf>(n + i) * scale, n2 = load<vf>(n + wide + i) * scale;
            store(sums + i, load<vf>(sums + i) + dy1 * n1);
            store(sums + wide + i, load<vf>(sums + wide + i) + dy2 * n2);
            const vf d1 = dy1 * load_some<Float::f32>(w, i, half - i), d2 = dy2 * load_some<Float::f32>(w, half + i, half - i);
            along += d1 * n1 + d2 * n2;
            store(n + i, n1), store(n + wide + i, n2), store(dn + i, d1), store(dn + wide + i, d2);
        }
        const float mean = sum_of(along) / static_cast<float>(a.dim);
        for (int side = 0; side < 2; ++side)
            for (std::int64_t i = 0; i < half; i += V) {
                const vf dx = scale * (load<vf>(dn + side * wide + i) - load<vf>(n + side * wide + i) * mean);
                store_some<In>(b.out[which], to + side * half + i, dx, half - i);
            }
    }
}

constexpr std::int64_t few = 4;  // tokens whose sums are added up before they meet larger ones, which keeps their digits

void rotate_back(const RotaryBackward& b, std::int64_t first, std::int64_t last, float* sums) {
    const std::int64_t half = b.shared.dim / 2, wide = up(half);
    float *n = room(6 * wide), *own = n + 4 * wide;
    for (int which = 0; which < 2; ++which)
        for (std::int64_t start = first; start < last; start += few) {
            for (std::int64_t i = 0; i < 2 * wide; ++i) own[i] = 0.0f;
            with_type(b.shared.x[which].type, [&](auto in) {
                with_type(b.grad[which].type, [&](auto grad) {
                    for (std::int64_t line = start; line < std::min(start + few, last); ++line)
                        rotate_heads_back<in(), grad()>(b, which, line, n, own);
                });
            });
            for (std::int64_t i = 0; i < half; ++i) {
                sums[which * b.shared.dim + i] += own[i];
                sums[which * b.shared.dim + half + i] += own[wide + i];
            }
        }
}

// exp(x) of what is at most about 0, and exactly 0 of what lies below every fp32 sum with a 1 in it.
inline vf exp_or_zero(vf x) { return pick<vf>(x < -87.0f, vf{}, exp_of(x)); }

// A row's largest logit, and the sum of exponentials relative to it; the second pass finds the row in the cache.
template <Float F>
void largest_and_sum(const void* logits, std::int64_t at, std::int64_t codes, float* out) {
    const float none = -std::numeric_limits<float>::infinity();
    const std::int64_t whole = codes / V * V, stretch = 256;  // short sums are added up first, which keeps their digits
    vf most = vf{} + none;
    for (std::int64_t i = 0; i < whole; i += V) {
        const vf x = load_as<F>(logits, at + i);
        most = pick<vf>(x > most, x, most);
    }
    vf rest = vf{} + none;
    for (std::int64_t i = whole; i < codes; ++i) rest[i - whole] = load_some<F>(logits, at + i, 1)[0];
    most = pick<vf>(rest > most, rest, most);
    float largest = most[0];
    for (int i = 1; i < V; ++i) largest = std::max(largest, most[i]);
    vf sum{};
    for (std::int64_t start = 0; start < whole; start += stretch) {
        vf part{};
        for (std::int64_t i = start; i < std::min(start + stretch, whole); i += V)
            part += exp_or_zero(load_as<F>(logits, at + i) - largest);
        sum += part;
    }
    const vf e = exp_or_zero(rest - largest);
    for (std::int64_t i = whole; i < codes; ++i) sum[i - whole] += e[i - whole];
    out[0] = largest, out[1] = sum_of(sum);
}

template <Float F>
LossPart loss_rows(const LossArgs& a, std::int64_t first, std::int64_t last) {
    const float nan = std::numeric_limits<float>::quiet_NaN();
    LossPart part{0.0, 0};
    for (std::int64_t row = first; row < last; ++row) {
        const std::int64_t target = a.target[row], at = row * a.stride;
        const bool inside = target >= 0 && target < a.codes, counts = target != a.ignored;
        float* kept = a.kept + 2 * row;
        largest_and_sum<F>(a.logits, at, a.codes, kept);
        if (!counts) continue;
        if (!inside) kept[1] = nan;
        const float picked = inside ? load_some<F>(a.logits, at + target, 1)[0] : nan;
        part.sum += static_cast<double>(std::log(kept[1])) + (static_cast<double>(kept[0]) - static_cast<double>(picked));
        ++part.count;
    }
    return part;
}

LossPart loss(const LossArgs& a, std::int64_t first, std::int64_t last) {
    LossPart part{0.0, 0};
    with_type(a.type, [&](auto type) { part = loss_rows<type()>(a, first, last); });
    return part;
}

template <Float F>
void loss_rows_back(const LossArgs& a, float scale, void* out, std::int64_t first, std::int64_t last) {
    for (std::int64_t row = first; row < last; ++row) {
        const std::int64_t target = a.target[row], at = row * a.stride, to = row * a.codes;
        const bool counts = target != a.ignored;
        const float largest = a.kept[2 * row], inverse = 1.0f / a.kept[2 * row + 1];
        for (std::int64_t i = 0; i < a.codes; i += V) {
            const std::int64_t count = a.codes - i;
            vf share = counts ? exp_or_zero(load_some<F>(a.logits, at + i, count) - largest) * inverse : vf{};
            if (counts && target >= i && target < i + V) share[target - i] -= 1.0f;
            store_some<F>(out, to + i, share * scale, count);
        }
    }
}

void loss_back(const LossArgs& a, float scale, void* out, std::int64_t first, std::int64_t last) {
    with_type(a.type, [&](auto type) { loss_rows_back<type()>(a, scale, out, first, last); });
}

}  // namespace

const SequenceKernels& sequence_kernels() {
    static const SequenceKernels kernels{rotate, rotate_back, loss, loss_back};
    return kernels;
}

}  // namespace FLEXLAM_VARIANT
}  // namespace flexlam
