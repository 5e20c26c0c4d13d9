// The CPU engine under a sanitizer: two engines at work in two threads, each on three threads of its own, and for every
// number type and instruction set the same codes from one thread as from three.
#include <cstdio>
#include <cstring>
#include <random>
#include <thread>

#include "encoder.h"
#include "engine.h"
#include "prefill.h"
#include "variants.h"

using namespace flexlam;

namespace {

constexpr std::int64_t hidden = 64, inner = 96, heads = 4, kv_heads = 2, dim = 32, codes = 50, layers = 2, slots = 8;
constexpr std::int64_t page = 16, entries = 5, sessions = 2, pages = sessions * entries, tokens = 20, budget = 6;

// Numbers of any type, in memory of exactly their size.
struct Numbers {
    std::vector<std::uint8_t> bytes;
    void* data() { return bytes.data(); }
};

Numbers numbers(Float type, std::int64_t count, float mean, float spread, std::mt19937& random) {
    std::normal_distribution<float> draw(mean, spread);
    Numbers out;
    for (std::int64_t i = 0; i < count; ++i) {
        const float x = draw(random);
        std::uint32_t bits;
        std::memcpy(&bits, &x, 4);
        std::uint16_t half = static_cast<std::uint16_t>(bits >> 16);  // bf16, cut off
        if (type == Float::f16) half = static_cast<std::uint16_t>((bits >> 31 << 15) | (12u << 10) | ((bits >> 13) & 0x3ff));
        const auto* from = type == Float::f32 ? reinterpret_cast<const std::uint8_t*>(&bits) : reinterpret_cast<std::uint8_t*>(&half);
        out.bytes.insert(out.bytes.end(), from, from + (type == Float::f32 ? 4 : 2));
    }
    return out;
}

struct Case {
    std::vector<Numbers> weights;
    std::unique_ptr<SequenceEngine> engine;
    Numbers k, v, x;
    std::vector<std::int32_t> table, context, start, starts;
    std::vector<std::int64_t> rows, positions, own_rows, own_positions;
    std::vector<float> first, noise;

    explicit Case(Float type) {
        std::mt19937 random(7);
        const auto make = [&](std::int64_t count, float mean, float spread) {
            weights.push_back(numbers(type, count, mean, spread, random));
            return weights.back().data();
        };
        weights.reserve(100);
        ModelWeights w;
        for (std::int64_t l = 0; l < layers; ++l)
            w.layers.push_back({make(hidden, 1, 0.1f), make((heads + 2 * kv_heads) * dim * hidden, 0, 0.2f), make(dim, 1, 0.1f),
                                make(dim, 1, 0.1f), make(hidden * heads * dim, 0, 0.2f), make(hidden, 1, 0.1f),
                                make(2 * inner * hidden, 0, 0.2f), make(hidden * inner, 0, 0.2f)});
        w.embedding = make(codes * hidden, 0, 1), w.place = make(slots * hidden, 0, 1), w.norm = make(hidden, 1, 0.1f);
        w.head = make(codes * hidden, 0, 0.3f);
        engine = std::make_unique<SequenceEngine>(
            ModelShape{hidden, inner, heads, kv_heads, dim, codes, slots, 1e4, 1e-6f, type}, w);
        k = numbers(type, layers * pages * page * kv_heads * dim, 0, 1, random), v = k;
        x = numbers(type, sessions * tokens * hidden, 0, 1, random);
        for (std::int64_t s = 0; s < sessions; ++s) {
            for (std::int64_t e = 0; e < entries; ++e) table.push_back(static_cast<std::int32_t>(s * entries + e));
            context.push_back(static_cast<std::int32_t>(s + 1)), start.push_back(0);
            for (std::int64_t t = 0; t < tokens; ++t)
                own_rows.push_back((s * entries + s + 1) * page + t), own_positions.push_back(1000 + t);
        }
        for (std::int64_t j = 0; j < budget; ++j)
            for (std::int64_t s = 0; s < sessions; ++s) {
                starts.push_back(static_cast<std::int32_t>(tokens + j));
                rows.push_back((s * entries + s + 1) * page + tokens + j), positions.push_back(1000 + tokens + j);
            }
        std::normal_distribution<float> draw;
        for (std::int64_t i = 0; i < sessions * codes; ++i) first.push_back(draw(random));
        for (std::int64_t i = 0; i < sessions * budget * codes; ++i) noise.push_back(draw(random));
    }

    std::vector<std::int32_t> run(Float type, int threads, const std::string& variant, bool drawn) {
        std::vector<float> logits(first);
        const AppendArgs args{x.data(), k.data(), v.data(), table.data(), context.data(), start.data(), own_rows.data(),
                              own_positions.data(), logits.data(), sessions, tokens, page, entries, pages, type};
        if (variant.empty() && engine->takes(args)) engine->append(args, threads);
        std::vector<std::int32_t> chosen(sessions * budget);
        std::vector<float> seen(sessions * budget * codes);
        engine->generate({k.data(), v.data(), table.data(), context.data(), starts.data(), rows.data(), positions.data(),
                          logits.data(), drawn ? noise.data() : nullptr, nullptr, chosen.data(), seen.data(), sessions,
                          budget, page, entries, pages, drawn ? 5 : 0, 0.8f, type},
                         threads, variant);
        return chosen;
    }
};

// The encoder's transformer gives the same bits by one thread as by three.
bool check_encoder() {
    constexpr std::int64_t width = 64, wide = 96, count = 48, keep = 20;
    std::mt19937 random(3);
    std::vector<Numbers> weights;
    weights.reserve(20);
    const auto make = [&](std::int64_t size, float mean) {
        weights.push_back(numbers(Float::bf16, size, mean, 0.2f, random));
        return weights.back().data();
    };
    std::vector<EncoderLayer> layer{{make(width, 1), make(width, 0), make(3 * width * width, 0), make(3 * width, 0),
                                     make(width * width, 0), make(width, 0), make(width, 1), make(width, 0),
                                     make(wide * width, 0), make(wide, 0), make(width * wide, 0), make(width, 0)}};
    EncoderEngine engine({width, 2, wide, 1e-5f}, layer, make(width, 1), make(width, 0));
    if (!engine.takes(count)) return true;
    Numbers x = numbers(Float::bf16, 2 * count * width, 0, 1, random), one, three;
    one.bytes.resize(2 * keep * width * 2), three.bytes.resize(2 * keep * width * 2);
    engine.run(x.data(), one.data(), 2, count, keep, 1);
    engine.run(x.data(), three.data(), 2, count, keep, 3);
    return one.bytes == three.bytes;
}

bool check(Float type) {
    bool good = true;
    std::vector<std::string> variants = variant_names();
    variants.emplace_back("");
    for (const std::string& variant : variants)
        for (const bool drawn : {false, true}) {
            Case one(type), three(type);
            if (one.run(type, 1, variant, drawn) == three.run(type, 3, variant, drawn)) continue;
            std::printf("other codes: type %d, %s\n", static_cast<int>(type), variant.c_str());
            good = false;
        }
    return good;
}

}  // namespace

int main() {
    bool first = true, second = true;
    std::thread other([&] { second = check(Float::bf16); });
    first = check(Float::f32) && check(Float::f16) && check_encoder();
    other.join();
    if (first && second) std::printf("tiles: %s; done\n", has_tiles() ? "yes" : "no");
    return first && second ? 0 : 1;
}
