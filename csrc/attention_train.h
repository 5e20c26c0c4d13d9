// Attention of whole sequences and its gradient, for training on a CPU. Probabilities are never kept: the backward forms them
// again from queries, keys and the log-sum-exp. One task is a session and a head of keys with all heads of queries that share
// it, so no sum crosses threads.
#pragma once

#include <cstdint>
#include <string>

#include "floats.h"

namespace flexlam {

// Where a tensor [batch, tokens, heads, dim] stands: elements from a session, a token, a head to the next; dims are neighbours.
struct View {
    void* data;
    std::int64_t batch, token, head;
};

struct SelfArgs {
    View q, k, v, out;         // of `type`; q and out have `queries` tokens and `heads` heads, k and v `keys` and `kv_heads`
    float* lse;                // [batch, heads, queries]: log of the sum of exponentials; -infinity where nothing is seen
    const std::uint8_t* mask;  // [queries, keys], 0 where a query does not see a key; nullptr: it sees all
    bool causal;               // query i sees keys 0 .. keys - queries + i, of those that the mask leaves
    std::int64_t batch, queries, keys, heads, kv_heads, dim;
    Float type;
    float scale;  // of the scores, above 0
};

struct SelfGrads {
    View grad, q, k, v;  // gradient of out, read; gradients of q, k and v, written
};

// Whether the kernels take heads of `dim`: whole 16s up to 128.
constexpr bool takes_self(std::int64_t dim) { return dim > 0 && dim % 16 == 0 && dim <= 128; }

// `variant` is one of variant_names(), "tiles" (AMX, bf16 alone), or "" for the fastest. A query that sees nothing gets zeros
// and gives no gradient. Throws std::invalid_argument where the variant does not take such arguments.
void self_attention(const SelfArgs& args, int threads, const std::string& variant);
// `args` as they were, with what the forward wrote.
void self_attention_backward(const SelfArgs& args, const SelfGrads& grads, int threads, const std::string& variant);

}  // namespace flexlam
