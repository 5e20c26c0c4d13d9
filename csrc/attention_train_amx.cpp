// The forward of csrc/attention_train_parts.h by AMX, for bf16; csrc/attention_train_amx_backward.cpp has the other half.
#include "attention_train_parts.h"

#ifdef FLEXLAM_X86_VARIANTS
#define FLEXLAM_VARIANT amx
#define FLEXLAM_LANES 16
#include <immintrin.h>

#include "vectors.inl"

#include "attention_train_tiles.h"

namespace flexlam {
namespace amx {
namespace {

struct ForwardRoom {
    Half *k, *row;                            // [keys][wide], [32][wide]
    std::uint32_t *values, *queries, *woven;  // turned tiles, packed tiles, scratch
    float *scores[2], *out;                   // [keys][16] of a block of queries and of the next, [tall][16][16]
    std::int64_t total;

    ForwardRoom(const Sizes& n, float* base) {
        Cutter cut{base};
        k = cut.take<Half>(n.keys * n.wide), row = cut.take<Half>(pairs * n.wide);
        values = cut.take<std::uint32_t>(n.key_blocks * n.wide * side);
        queries = cut.take<std::uint32_t>(n.wide / pairs * words), woven = cut.take<std::uint32_t>(n.wide * side);
        for (float*& each : scores) each = cut.take<float>(n.keys * side);
        out = cut.take<float>(n.tall * words), total = cut.total;
    }
};

// The largest scores of 16 queries in the rows that they see of one block.
template <bool Masked>
inline void add_largest(const float* scores, const std::uint16_t* seen, std::int64_t rows, __m512* most) {
    for (std::int64_t r = 0; r < rows; ++r) {
        const __m512 score = _mm512_loadu_ps(scores + r * side);
        most[r % 4] = Masked ? _mm512_mask_max_ps(most[r % 4], seen[r], score, most[r % 4]) : _mm512_max_ps(score, most[r % 4]);
    }
}

// Scores of one block become packed weights, in their place; returns their sum.
template <bool Masked>
inline vf pack_weights(float* scores, const std::uint16_t* seen, std::int64_t rows, float factor, vf shift) {
    vf sum{};
    std::int64_t r = 0;
    for (; r < rows; r += 2) {
        vf first = power_of_two(load<vf>(scores + r * side) * factor - shift);
        vf second = power_of_two(load<vf>(scores + (r + 1) * side) * factor - shift);
        if (Masked) {
            first = (vf)_mm512_maskz_mov_ps(seen[r], intrinsic(first));
            second = (vf)_mm512_maskz_mov_ps(seen[r + 1], intrinsic(second));
        }
        sum += first + second;
        _mm512_storeu_si512(scores + r / 2 * side, pack(intrinsic(first), intrinsic(second)));
    }
    for (; r < pairs; r += 2) _mm512_storeu_si512(scores + r / 2 * side, _mm512_setzero_si512());
    return sum;
}

// One head of keys and values, and the heads of queries that share it.
class Forward {
public:
    Forward(const SelfArgs& a, const Visible& visible, std::int64_t session, std::int64_t key_head, float* base)
        : a_(a), visible_(visible), session_(session), key_head_(key_head), n_(a), room_(n_, base),
          blocks_((a.queries + side - 1) / side) {}

    void run() {
        take_rows(a_.k, session_, key_head_, 0, a_.keys, n_.keys, n_, room_.k);
        for (std::int64_t i = 0; i < n_.key_blocks; ++i) {
            take_rows(a_.v, session_, key_head_, i * pairs, a_.keys, pairs, n_, room_.row);
            turn_rows(room_.row, n_, room_.woven, room_.values + i * n_.wide * side);
        }
        // the scores of the next queries are on their way while these are weighed
        score(0);
        for (std::int64_t c = 0; c < n_.group * blocks_; ++c) {
            if (c + 1 < n_.group * blocks_) score(c + 1);
            attend(c);
        }
    }

private:
    std::int64_t head(std::int64_t c) const { return key_head_ * n_.group + c / blocks_; }

    void score(std::int64_t c) {
        const std::int64_t b = c % blocks_;
        take_rows(a_.q, session_, head(c), b * side, a_.queries, side, n_, room_.row);
        pack_rows(room_.row, n_, room_.queries);
        settle();
        for (std::int64_t i = 0; i < n_.key_blocks; ++i)
            if (visible_.of(b, i) != Sight::none)
                score_keys(room_.k + i * pairs * n_.wide, room_.queries, n_.wide, a_.keys - i * pairs > side,
                           room_.scores[c % 2] + i * pairs * side);
        settle();
    }

    // The weights of 16 queries in the place of their scores; returns their sums, and the largest score of each.
    vf weigh(std::int64_t b, float* scores, vf& largest) const {
        const __m512 nothing = _mm512_set1_ps(-infinity);
        __m512 most[4] = {nothing, nothing, nothing, nothing};  // four, so that none waits for the one before
        for (std::int64_t i = 0; i < n_.key_blocks; ++i) {
            const Sight sight = visible_.of(b, i);
            if (sight == Sight::none) continue;
            const std::int64_t rows = std::min(pairs, a_.keys - i * pairs);
            const auto add = is_masked(sight, rows) ? add_largest<true> : add_largest<false>;
            add(scores + i * pairs * side, visible_.rows(b, i), rows, most);
        }
        largest = (vf)_mm512_max_ps(_mm512_max_ps(most[0], most[1]), _mm512_max_ps(most[2], most[3]));
        const float factor = a_.scale * log2e;
        const vf shift = pick<vf>(largest == vf{} - infinity, vf{}, largest) * factor;
        vf sum{};
        for (std::int64_t i = 0; i < n_.key_blocks; ++i) {
            const Sight sight = visible_.of(b, i);
            if (sight == Sight::none) continue;
            const std::int64_t rows = std::min(pairs, a_.keys - i * pairs);
            const auto weights = is_masked(sight, rows) ? pack_weights<true> : pack_weights<false>;
            sum += weights(scores + i * pairs * side, visible_.rows(b, i), rows, factor, shift);
        }
        return sum;
    }

    void attend(std::int64_t c) {
        const std::int64_t b = c % blocks_, last = std::min(a_.queries, (b + 1) * side);
        float* scores = room_.scores[c % 2];
        vf most;
        const vf sum = weigh(b, scores, most);
        settle();
        add_keys(room_.values, n_, 0, n_.key_blocks, false, room_.out, [&](std::int64_t i) -> const void* {
            return visible_.of(b, i) == Sight::none ? nullptr : scores + i * pairs * side;
        });
        settle();
        const vf share = pick<vf>(sum == vf{}, vf{}, 1.0f / sum);
        give_queries(room_.out, n_, share, a_.out, session_, head(c), b * side, last);
        const vf log_sum = pick<vf>(sum == vf{}, most, most * a_.scale + log_of(sum));
        const auto lanes = static_cast<__mmask16>((1u << (last - b * side)) - 1);
        _mm512_mask_storeu_ps(a_.lse + (session_ * a_.heads + head(c)) * a_.queries + b * side, lanes, intrinsic(log_sum));
    }

    const SelfArgs& a_;
    const Visible& visible_;
    const std::int64_t session_, key_head_;
    const Sizes n_;
    const ForwardRoom room_;
    const std::int64_t blocks_;
};

std::int64_t self_forward_room(const SelfArgs& a) { return ForwardRoom(Sizes(a), nullptr).total; }

void self_forward(const SelfArgs& a, const Visible& visible, std::int64_t session, std::int64_t key_head, float* base) {
    const Tiles configured;
    Forward(a, visible, session, key_head, base).run();
}

}  // namespace

const SelfKernels& self_kernels() {
    static const SelfKernels kernels = {self_forward_room, self_backward_room, self_forward, self_backward};
    return kernels;
}

}  // namespace amx
}  // namespace flexlam

#endif
