// One task of csrc/attention_train.h, compiled once per instruction set, and what all tasks share.
#pragma once

#include "attention_train.h"

namespace flexlam {

constexpr std::int64_t query_block = 16, key_block = 32;

constexpr std::int64_t whole(std::int64_t n, std::int64_t block) { return (n + block - 1) / block * block; }

enum class Sight : std::uint8_t { none = 0, some = 1, all = 2 };

// Which keys the queries see, the same for every session and head.
struct Visible {
    std::int64_t query_blocks, key_blocks;  // of `queries` up to whole 32s, and of keys
    const std::uint16_t* bits;              // [query blocks, key blocks x 32]: bit i is query i of the block; 0 beyond the ends
    const Sight* sight;                     // [query blocks, key blocks]; `all` is of the keys that there are

    Sight of(std::int64_t queries, std::int64_t keys) const { return sight[queries * key_blocks + keys]; }
    const std::uint16_t* rows(std::int64_t queries, std::int64_t keys) const {
        return bits + (queries * key_blocks + keys) * key_block;
    }
};

// A task's session and head of keys; `room` are so many fp32 numbers of its own, on a boundary of 64 bytes.
struct SelfKernels {
    std::int64_t (*forward_room)(const SelfArgs&);
    std::int64_t (*backward_room)(const SelfArgs&);
    void (*forward)(const SelfArgs&, const Visible&, std::int64_t session, std::int64_t key_head, float* room);
    void (*backward)(const SelfArgs&, const SelfGrads&, const Visible&, std::int64_t session, std::int64_t key_head,
                     float* room);
};

#define FLEXLAM_DECLARE(name)             \
    namespace name {                      \
    const SelfKernels& self_kernels();    \
    }
FLEXLAM_DECLARE(portable)
FLEXLAM_DECLARE(avx2)
FLEXLAM_DECLARE(avx512)
FLEXLAM_DECLARE(amx)
#undef FLEXLAM_DECLARE

}  // namespace flexlam
