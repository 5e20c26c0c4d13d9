// A whole block of codes on the CPU in one call: the sequence model's passes, the choice of each code and its embedding,
// on threads that meet at barriers and never return to Python in between (design section 3; paper Algorithm 1).
#pragma once

#include <cstdint>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "decode.h"

namespace flexlam {

// Weights of one layer as the packed modules hold them, of the model's type: [outs, inner] row by row.
struct LayerWeights {
    const void* norm1;    // [hidden]
    const void* qkv;      // [(heads + 2 kv_heads) dim, hidden]
    const void* q_norm;   // [dim]
    const void* k_norm;   // [dim]
    const void* out;      // [hidden, heads dim]
    const void* norm2;    // [hidden]
    const void* gate_up;  // [2 inner, hidden]
    const void* down;     // [hidden, inner]
};

struct ModelShape {
    std::int64_t hidden, inner, heads, kv_heads, dim, codes, slots;
    double theta;
    float eps;
    Float type;
};

struct ModelWeights {
    std::vector<LayerWeights> layers;
    const void* embedding;  // [codes, hidden]
    const void* place;      // [slots, hidden] added to a code's embedding, or nullptr
    const void* norm;       // [hidden]
    const void* head;       // [codes, hidden]
};

// Sessions whose observation stands in the pages: what is read, and what the block leaves behind.
struct BlockArgs {
    void* k;  // [layers, pages, page, kv_heads, dim] of type `type`: the keys of the codes are written
    void* v;  // likewise
    const std::int32_t* table;      // [batch, entries], as in AttendArgs
    const std::int32_t* context;    // [batch]: pages seen in full; the codes' own follow them
    const std::int32_t* starts;     // [budget, batch]: number of a code's token among its session's own
    const std::int64_t* rows;       // [budget, batch]: row of the pool where it stands
    const std::int64_t* positions;  // [budget, batch]
    const float* first;             // [batch, codes]: logits of the first code
    const float* noise;             // [batch, budget, codes] to draw by, or nullptr: greedy
    const std::int32_t* given;      // [batch, budget]: codes to feed instead of those chosen, or nullptr
    std::int32_t* chosen;           // [batch, budget]
    float* logits;                  // [batch, budget, codes], or nullptr
    std::int64_t batch, budget, page, entries, pages, top_k;  // top_k: 0 is all
    float inverse;                  // 1 / temperature
    Float type;
};

// Tokens that enter together, of each session as many.
struct AppendArgs {
    const void* x;                  // [batch, tokens, hidden] of the model's type
    void* k;                        // as in BlockArgs
    void* v;
    const std::int32_t* table;      // [batch, entries]
    const std::int32_t* context;    // [batch]
    const std::int32_t* start;      // [batch]: number of the first token among its session's own
    const std::int64_t* rows;       // [batch, tokens]
    const std::int64_t* positions;  // [batch, tokens]
    float* logits;                  // [batch, codes]: of each session's last token
    std::int64_t batch, tokens, page, entries, pages;
    Float type;
};

// The choice from one row of logits, as flexlam_fast/ops/sampling.py has it; `noise` nullptr is greedy, and `scratch` [codes].
std::int32_t choose_code(const float* logits, const float* noise, std::int64_t codes, float inverse, std::int64_t top_k,
                         float* scratch);

class SequenceEngine {
public:
    SequenceEngine(ModelShape shape, ModelWeights weights)
        : shape_(shape), weights_(std::move(weights)), frequency_(frequencies(shape.theta, shape.dim)) {}

    // Whether append() takes tokens of this model and such pages: bf16 on a processor with matrix tiles, sizes of whole 32s.
    bool takes(const AppendArgs& args) const;

    // Passes observed tokens through all layers: keys and values into pages, and the logits of the last token.
    void append(const AppendArgs& args, int threads);

    // Generates `budget` codes of every session. Calls of one engine from several threads wait for each other.
    void generate(const BlockArgs& block, int threads, const std::string& variant);

private:
    float* room(std::int64_t floats);  // on a border of 64 bytes

    const ModelShape shape_;
    const ModelWeights weights_;
    const std::vector<double> frequency_;
    std::vector<float> kept_;  // room for a block, from call to call
    std::mutex busy_;
};

}  // namespace flexlam
