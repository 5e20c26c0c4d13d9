// What one generated token needs of the sequence model, on the CPU: norms and products, keys and values into pages, and
// attention over a session's page table. Written for few tokens: each reads its weights, keys and values once, from memory.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "floats.h"

namespace flexlam {

// out[r, n] = x[r] . weight[n], where x may be normed before, and the result gated (SwiGLU) or added to a residual. All
// contiguous; x is rounded to the weights' type on the way.
struct LinearArgs {
    const void* x;         // [rows, inner] of type `in`
    const void* norm;      // [inner] of `type`: weight of an RMS norm of x; nullptr: none
    const void* weight;    // [outs, inner] of `type`; gated: [2 outs, inner], the gate's rows first
    const void* residual;  // [rows, outs] of type `to`, or nullptr
    void* out;             // [rows, outs] of type `to`; may be the residual
    std::int64_t rows, inner, outs;
    Float in, type, to;
    bool gated;
    float eps;
};

// Norm and rotate queries and keys, store keys and values in pages [pool rows, kv_heads, dim] and queries in `q`.
struct WriteArgs {
    const void* qkv;           // [tokens, heads + 2 kv_heads, dim] of type `in`
    const void* q_norm;        // [dim] of `type`
    const void* k_norm;        // [dim] of `type`
    const float* cosine;       // [tokens, dim / 2]: the rotation at each token's position
    const float* sine;         // likewise
    const std::int64_t* rows;  // [tokens]; one outside [0, pool) stores nothing
    void* k;                   // of type `pages`
    void* v;                   // likewise
    void* q;                   // [tokens, heads, dim] of type `in`
    std::int64_t tokens, heads, kv_heads, dim, pool;
    Float in, type, pages;
    float eps;
};

// Attention of new tokens over pages [pages, page, kv_heads, dim]; the rule stands in flexlam_fast/ops/paged.py.
struct AttendArgs {
    const void* q;  // [batch, tokens, heads, dim] of type `in`
    const void* k;
    const void* v;
    const std::int32_t* table;    // [batch, entries]
    const std::int32_t* context;  // [batch]
    const std::int32_t* start;    // [batch]
    void* out;                    // [batch, tokens, heads, dim] of type `in`
    std::int64_t batch, tokens, heads, kv_heads, dim, page, entries, pages;
    Float in, type;  // `type` is that of the pages
};

// The frequencies theta^(-2i / dim) of a rotation, and its cosines and sines at a position; angles are formed in fp64.
std::vector<double> frequencies(double theta, std::int64_t dim);
void angles_at(std::int64_t position, const std::vector<double>& frequency, float* cosine, float* sine);

// A session's table is cut into splits of so many entries, whatever the number of threads: sums do not depend on it.
std::int64_t split_entries(const AttendArgs& args);

// `variant` is one of variant_names(), or "" for the first. `threads` is at most how many work.
void linear(const LinearArgs& args, int threads, const std::string& variant);
// `positions` [tokens] and the base `theta` of the frequencies take the place of cosine and sine, which may be nullptr.
void page_write(WriteArgs args, const std::int64_t* positions, double theta, int threads, const std::string& variant);
void page_attend(const AttendArgs& args, int threads, const std::string& variant);

}  // namespace flexlam
