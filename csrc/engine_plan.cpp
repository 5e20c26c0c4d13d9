#include "engine_plan.h"

#include <algorithm>

namespace flexlam {
namespace {

constexpr std::int64_t nominal_blocks = 132;     // of an H100: what one session's attention is cut for
constexpr std::int64_t most_tiles = 96 * 1024;   // bytes of shared memory for keys and values, two splits of each
constexpr std::int64_t split_unit = 16;          // tokens

std::int64_t bytes_of(Float type) { return type == Float::f32 ? 4 : 2; }
std::int64_t up(std::int64_t n, std::int64_t unit) { return (n + unit - 1) / unit * unit; }

// Floats of a staged row of `n`: whole words of weights for each lane of a warp.
std::int64_t staged(std::int64_t n, Float type) { return up(n, 32 * 16 / bytes_of(type)); }

std::string expected(const std::string& name, const std::string& what, std::int64_t got) {
    return name + ": expected " + what + ", got " + std::to_string(got);
}

// Tokens of a split: as many as let one session's heads fill the chip, within what two tiles may take.
std::int64_t split_of(const ModelShape& m, Float pages, std::int64_t tokens) {
    const std::int64_t most = most_tiles / (4 * m.dim * bytes_of(pages)) / split_unit * split_unit;
    return std::clamp(up((tokens * m.kv_heads + nominal_blocks - 1) / nominal_blocks, split_unit), split_unit, most);
}

// Sizes that 32-bit offsets hold, before anything is computed from them.
std::string size_refusal(const ModelShape& m, std::int64_t page, std::int64_t entries) {
    constexpr std::int64_t wide = 1 << 16, long_ = 1 << 22;
    const std::int64_t sizes[] = {m.hidden, m.inner, m.heads * m.dim, m.codes};
    const char* names[] = {"hidden", "inner", "heads times head dim", "codes"};
    for (int i = 0; i < 4; ++i)
        if (sizes[i] < 1 || sizes[i] > wide) return expected(names[i], "1 to 65536", sizes[i]);
    if (m.kv_heads < 1 || m.heads % m.kv_heads) return expected("kv_heads", "a divisor of the heads", m.kv_heads);
    if (page < 1 || entries < 1 || page > long_ / entries)
        return expected("pages", "1 to 4194304 tokens a session", page < 1 || entries < 1 ? page : page * entries);
    return "";
}

}  // namespace

EnginePlan engine_plan(const ModelShape& m, Float pages, std::int64_t page, std::int64_t entries) {
    const std::int64_t wide = m.heads * m.dim, group = m.heads / m.kv_heads, split = split_of(m, pages, entries * page);
    const std::int64_t splits = (entries * page + split - 1) / split, warps = engine_threads / 32;
    const auto width = std::max({staged(m.hidden, m.type), staged(m.inner, m.type), staged(wide, m.type), m.codes});
    EnginePlan p{};
    p.split = static_cast<std::int32_t>(split), p.splits = static_cast<std::int32_t>(splits);
    p.row = static_cast<std::int32_t>(up(width, 4));
    p.tile = static_cast<std::int32_t>(split * m.dim * bytes_of(pages));
    std::int64_t at = 0;
    const auto shared = [&](std::int64_t bytes) {
        const std::int64_t from = at;
        at += up(bytes, 16);
        return static_cast<std::int32_t>(from);
    };
    shared(4 * engine_sessions * p.row);
    // between two attentions the factors that join splits lie where the tiles do
    p.tiles = shared(std::max<std::int64_t>(4 * p.tile, 4 * m.heads * (2 * splits + 1)));
    p.gains = shared(4 * m.hidden);
    p.query = shared(4 * group * m.dim), p.scores = shared(4 * group * split);
    p.sums = shared(4 * warps * m.dim), p.codes = shared(4 * engine_sessions);
    p.shared = static_cast<std::int32_t>(std::min<std::int64_t>(at, INT32_MAX));
    std::int64_t& room = p.room;
    const auto take = [&](std::int64_t floats) {
        const std::int64_t from = room;
        room += up(engine_sessions * floats, 4);
        return from;
    };
    p.x = take(m.hidden), p.qkv = take(wide + 2 * m.kv_heads * m.dim), p.wide = take(m.inner), p.logits = take(m.codes);
    p.angles = take(m.dim), p.parts = take(splits * wide), p.stats = take(splits * m.heads * 2);
    return p;
}

std::string engine_refusal(const ModelShape& m, Float pages, std::int64_t page, std::int64_t entries) {
    const std::string sizes = size_refusal(m, page, entries);
    if (!sizes.empty()) return sizes;
    const std::int64_t word = 16 / bytes_of(m.type), stored = 16 / bytes_of(pages);
    if (m.hidden % word) return expected("hidden", "a multiple of " + std::to_string(word), m.hidden);
    if (m.inner % word) return expected("inner", "a multiple of " + std::to_string(word), m.inner);
    // a token's key is read by at most a warp, 16 bytes a lane
    const std::int64_t unit = std::max({word, stored, std::int64_t{2}});
    if (m.dim % unit || m.dim > 32 * stored)
        return expected("head dim", "a multiple of " + std::to_string(unit) + " up to " + std::to_string(32 * stored),
                        m.dim);
    const EnginePlan plan = engine_plan(m, pages, page, entries);
    if (plan.shared > engine_shared)
        return expected("model", "at most " + std::to_string(engine_shared) + " bytes of shared memory", plan.shared);
    if (plan.room > INT32_MAX) return expected("model", "at most 2147483647 numbers between phases", plan.room);
    return "";
}

}  // namespace flexlam
