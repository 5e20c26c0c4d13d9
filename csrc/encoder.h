// The encoder's transformer on the CPU by matrix tiles, all layers in one call (paper Table 6).
#pragma once

#include <cstdint>
#include <mutex>
#include <utility>
#include <vector>

namespace flexlam {

// Weights of one layer, bf16, [outs, inner] row by row, and biases [outs].
struct EncoderLayer {
    const void *norm1, *norm1_bias;
    const void *qkv, *qkv_bias;  // [3 width, width]: queries of all heads, keys, values
    const void *out, *out_bias;
    const void *norm2, *norm2_bias;
    const void *up, *up_bias;      // [inner, width]
    const void *down, *down_bias;  // [width, inner]
};

struct EncoderShape {
    std::int64_t width, heads, inner;
    float eps;
};

class EncoderEngine {
public:
    EncoderEngine(EncoderShape shape, std::vector<EncoderLayer> layers, const void* norm, const void* norm_bias)
        : shape_(shape), layers_(std::move(layers)), norm_(norm), norm_bias_(norm_bias) {}

    // Whether run() takes so many tokens: whole 16s, sizes of whole 32s, and a processor with tiles.
    bool takes(std::int64_t tokens) const;

    // Embedded tokens x [batch, tokens, width] through all layers; `out` [batch, keep, width] is the final norm of the first
    // `keep` of each. All bf16.
    void run(const void* x, void* out, std::int64_t batch, std::int64_t tokens, std::int64_t keep, int threads);

private:
    const EncoderShape shape_;
    const std::vector<EncoderLayer> layers_;
    const void *norm_, *norm_bias_;
    std::vector<float> kept_;  // room, from call to call
    std::mutex busy_;
};

}  // namespace flexlam
