// What one generated token needs of the sequence model, on the CPU: norms and products, keys and values into pages, and
// attention over a session's page table. Written for few tokens: each reads its weights, keys and values once, from memory.
#pragma once

#include <cstdint>
#include <string>

#include "floats.h"

namespace flexlam {

// out[r, n] = x[r] . weight[n], where x may be normed before, and the result gated (SwiGLU) or added to a residual.
// All contiguous in `type`.
struct LinearArgs {
    const void* x;         // [rows, inner]
    const void* norm;      // [inner]: weight of an RMS norm of x; nullptr: none
    const void* weight;    // [outs, inner]; gated: [2 outs, inner], the gate's rows first
    const void* residual;  // [rows, outs] or nullptr
    void* out;             // [rows, outs]; fp32 with fp32_out
    std::int64_t rows, inner, outs;
    Float type;
    bool gated, fp32_out;
    float eps;
};

// Norm and rotate queries and keys, store keys and values in pages [pool rows, kv_heads, dim] and queries in `q`.
struct WriteArgs {
    const void* qkv;                // [tokens, heads + 2 kv_heads, dim]
    const void* q_norm;             // [dim]
    const void* k_norm;             // [dim]
    const std::int64_t* positions;  // [tokens]
    const std::int64_t* rows;       // [tokens]; one outside [0, pool) stores nothing
    void* k;
    void* v;
    void* q;  // [tokens, heads, dim]
    std::int64_t tokens, heads, kv_heads, dim, pool;
    Float type;
    double theta;
    float eps;
};

// Attention of new tokens over pages [pages, page, kv_heads, dim]; the rule stands in flexlam_fast/ops/paged.py.
struct AttendArgs {
    const void* q;  // [batch, tokens, heads, dim]
    const void* k;
    const void* v;
    const std::int32_t* table;    // [batch, entries]
    const std::int32_t* context;  // [batch]
    const std::int32_t* start;    // [batch]
    void* out;                    // [batch, tokens, heads, dim]
    std::int64_t batch, tokens, heads, kv_heads, dim, page, entries, pages;
    Float type;
};

// A session's table is cut into splits of so many entries, whatever the number of threads: sums do not depend on it.
std::int64_t split_entries(const AttendArgs& args);

// `variant` is one of variant_names(), or "" for the first. `threads` is at most how many work.
void linear(const LinearArgs& args, int threads, const std::string& variant);
void page_write(const WriteArgs& args, int threads, const std::string& variant);
void page_attend(const AttendArgs& args, int threads, const std::string& variant);

}  // namespace flexlam
