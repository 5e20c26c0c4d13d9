// FSQ with retained prefix and null fill on the CPU: one pass over z, at the width this processor has.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "floats.h"

namespace flexlam {

// Constants of one level set, spread over `lanes * d` elements so that flat vectors need no channel index.
struct LevelPattern {
    static constexpr int lanes = 16;
    int dim = 0;
    int steps = 0;                    // rows of thresholds: the largest level count less one
    std::int64_t codebook = 1;
    std::vector<int> levels;          // [d]
    std::vector<std::int64_t> basis;  // [d]
    std::vector<float> threshold;     // [steps, lanes * d]
    std::vector<float> half_width;    // [lanes * d], as are those below
    std::vector<float> inverse_high;  // 1 / half_width to 16 bits, so that its product with a digit is exact
    std::vector<float> inverse_low;   // and the rest
    std::vector<int> weight;          // what one digit adds to the code
    std::vector<float> shift;
    std::vector<float> gain;          // half / half_width: the slope of the value over the tanh
    std::vector<float> values;        // [codebook, d] where the codebook is small, else empty

    // `thresholds` [steps, d], `half` and `shift` [d] as the reference has them.
    LevelPattern(std::vector<int> levels, const std::vector<float>& thresholds, const std::vector<float>& half,
                 const std::vector<float>& shift);
};

// A retained prefix: `keep` [blocks] holds lengths in slots, `null` [d] what stands beyond them. No prefix: keep = null = nullptr.
struct Prefix {
    std::int64_t slots = 1;
    const std::int32_t* keep = nullptr;
    const float* null = nullptr;
};

// Element counts are in tokens; z, latents and gradients are [tokens, d] contiguous in `type`.
struct ForwardArgs {
    const void* z;
    void* latents;
    std::int32_t* codes;
    std::int64_t tokens;
    Float type;
    Prefix prefix;
};

struct BackwardArgs {
    const void* grad;
    const void* z;
    void* grad_z;
    double* grad_null;  // [chunks, d]: one partial sum a chunk, or nullptr
    std::int64_t tokens;
    Float type;
    Prefix prefix;
};

struct LookupArgs {
    const std::int32_t* codes;
    float* latents;
    std::int64_t tokens;
    Prefix prefix;
};

// Work is cut into chunks of whole blocks, the same for any number of threads, so sums do not depend on that number.
std::int64_t chunk_tokens(std::int64_t slots, int dim);

// `variant` is one of variant_names(), or "" for the first.
void fsq_forward(const LevelPattern& pattern, const ForwardArgs& args, int threads, const std::string& variant);
void fsq_backward(const LevelPattern& pattern, const BackwardArgs& args, int threads, const std::string& variant);
void codes_to_latents(const LevelPattern& pattern, const LookupArgs& args, int threads);

// Retained lengths [blocks] from Philox4x32-10 at counters offset, offset + 1, ...; `edges` [slots] as ops/philox.py has them.
void sample_prefix(std::uint64_t seed, std::uint64_t offset, const std::int64_t* edges, std::int64_t slots,
                   std::int32_t* keep, std::int64_t blocks);

}  // namespace flexlam
