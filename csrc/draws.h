// Random numbers of a training batch on the CPU, as flexlam_fast/ops/draws.py defines them to the bit.
#pragma once

#include <cstdint>
#include <string>

namespace flexlam {

// `streams` [rows]; `out` [rows, count] fp32.
struct DrawArgs {
    std::uint64_t key;
    std::uint64_t step;
    const std::int64_t* streams;
    float* out;
    std::int64_t rows, count;
};

// Standard normal numbers; the same bits for any `threads` and any `variant`, which is one of variant_names() or "".
void draw_normal(const DrawArgs& args, int threads, const std::string& variant);

// One uniform 32-bit word a row into `words` [rows].
void draw_words(std::uint64_t key, std::uint64_t step, const std::int64_t* streams, std::int64_t* words, std::int64_t rows);

}  // namespace flexlam
