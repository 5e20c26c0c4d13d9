#include "attention_train.h"

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "attention_train_parts.h"
#include "parallel.h"
#include "prefill.h"
#include "variants.h"

namespace flexlam {
namespace {

const SelfKernels& kernels_of(const SelfArgs& a, const std::string& variant) {
    if (!takes_self(a.dim)) throw std::invalid_argument("dim: expected a multiple of 16 up to 128");
    const bool tiles = a.type == Float::bf16 && (variant.empty() || variant == "tiles") && has_tiles();
    if (variant == "tiles" && !tiles) throw std::invalid_argument("variant: expected AMX and bf16 for 'tiles'");
#ifdef FLEXLAM_X86_VARIANTS
    if (tiles) return amx::self_kernels();
    switch (find_variant(variant)) {
        case Variant::avx512_bf16:
        case Variant::avx512: return avx512::self_kernels();
        case Variant::avx2: return avx2::self_kernels();
        default: break;
    }
#else
    find_variant(variant);
#endif
    return portable::self_kernels();
}

// The memory behind a Visible.
class Seen {
public:
    explicit Seen(const SelfArgs& a)
        : blocks_(whole(a.queries, key_block) / query_block), keys_(whole(a.keys, key_block)),
          bits_(static_cast<std::size_t>(blocks_ * keys_)), sight_(static_cast<std::size_t>(blocks_ * keys_ / key_block)) {
        for (std::int64_t n = 0; n < a.queries; ++n) {
            std::uint16_t* row = &bits_[static_cast<std::size_t>(n / query_block * keys_)];
            const auto bit = static_cast<std::uint16_t>(1 << n % query_block);
            const std::int64_t end = a.causal ? std::min(a.keys, a.keys - a.queries + n + 1) : a.keys;
            if (const std::uint8_t* mask = a.mask ? a.mask + n * a.keys : nullptr) {
                for (std::int64_t t = 0; t < end; ++t) row[t] |= mask[t] ? bit : std::uint16_t{0};
            } else {
                for (std::int64_t t = 0; t < end; ++t) row[t] |= bit;
            }
        }
        for (std::size_t i = 0; i < sight_.size(); ++i) {
            const std::int64_t first = static_cast<std::int64_t>(i) * key_block % keys_;
            const std::uint16_t* at = &bits_[i * key_block];
            const std::int64_t count = std::min(key_block, a.keys - first);
            std::uint16_t any = 0, every = 0xffff;
            for (std::int64_t t = 0; t < count; ++t) any |= at[t], every &= at[t];
            sight_[i] = !any ? Sight::none : every == 0xffff ? Sight::all : Sight::some;
        }
    }
    Visible visible() const { return {blocks_, keys_ / key_block, bits_.data(), sight_.data()}; }

private:
    std::int64_t blocks_, keys_;
    std::vector<std::uint16_t> bits_;
    std::vector<Sight> sight_;
};

// Calls `body(session, key head, room)` for every task, each with room of its thread's own.
template <class Body>
void each_task(const SelfArgs& a, std::int64_t room, int threads, const Body& body) {
    parallel_for(a.batch * a.kv_heads, threads, [&](std::int64_t task) {
        thread_local std::vector<float> kept;
        const auto needed = static_cast<std::size_t>(room) + 16;
        if (kept.size() < needed) kept.resize(needed);
        auto* at = reinterpret_cast<float*>((reinterpret_cast<std::uintptr_t>(kept.data()) + 63) / 64 * 64);
        body(task / a.kv_heads, task % a.kv_heads, at);
    });
}

}  // namespace

void self_attention(const SelfArgs& a, int threads, const std::string& variant) {
    const SelfKernels& kernels = kernels_of(a, variant);
    const Seen seen(a);
    const Visible visible = seen.visible();
    each_task(a, kernels.forward_room(a), threads, [&](std::int64_t session, std::int64_t head, float* room) {
        kernels.forward(a, visible, session, head, room);
    });
}

void self_attention_backward(const SelfArgs& a, const SelfGrads& g, int threads, const std::string& variant) {
    const SelfKernels& kernels = kernels_of(a, variant);
    const Seen seen(a);
    const Visible visible = seen.visible();
    each_task(a, kernels.backward_room(a), threads, [&](std::int64_t session, std::int64_t head, float* room) {
        kernels.backward(a, g, visible, session, head, room);
    });
}

}  // namespace flexlam
