// Training's attention and linear layers under a sanitizer: every instruction set and number type, sizes that fill no block,
// tensors of exactly their size, and the same bits from one thread as from several.
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "attention_train.h"
#include "linear_train.h"
#include "prefill.h"
#include "variants.h"

using namespace flexlam;

namespace {

struct Sizes {
    std::int64_t batch, queries, keys, heads, kv_heads, dim;
    bool causal, masked;
};

// A tensor in memory of exactly its size, from the heap, so that a byte beyond it is found.
struct Tensor {
    std::vector<std::uint8_t> bytes;
    std::int64_t tokens, heads, dim;

    Tensor(Float type, std::int64_t batch, std::int64_t tokens, std::int64_t heads, std::int64_t dim, std::mt19937* random)
        : tokens(tokens), heads(heads), dim(dim) {
        const std::int64_t count = batch * tokens * heads * dim;
        bytes.reserve(count * (type == Float::f32 ? 4 : 2));
        std::normal_distribution<float> draw(0, 1);
        for (std::int64_t i = 0; i < count; ++i) {
            const float x = random ? draw(*random) : 0.0f;
            std::uint32_t bits;
            std::memcpy(&bits, &x, 4);
            std::uint16_t half = static_cast<std::uint16_t>(bits >> 16);  // bf16, cut off
            if (type == Float::f16) half = static_cast<std::uint16_t>((bits >> 31 << 15) | (14u << 10) | ((bits >> 13) & 0x3ff));
            const auto* from = type == Float::f32 ? reinterpret_cast<const std::uint8_t*>(&bits)
                                                  : reinterpret_cast<const std::uint8_t*>(&half);
            bytes.insert(bytes.end(), from, from + (type == Float::f32 ? 4 : 2));
        }
        bytes.shrink_to_fit();
    }
    View view() { return {bytes.data(), tokens * heads * dim, heads * dim, dim}; }
};

std::vector<std::uint8_t> results(const Sizes& s, Float type, const std::string& variant, int threads) {
    std::mt19937 random(3);
    const auto make = [&](std::int64_t tokens, std::int64_t heads, bool drawn) {
        return Tensor(type, s.batch, tokens, heads, s.dim, drawn ? &random : nullptr);
    };
    Tensor q = make(s.queries, s.heads, true), k = make(s.keys, s.kv_heads, true), v = make(s.keys, s.kv_heads, true);
    Tensor grad = make(s.queries, s.heads, true), out = make(s.queries, s.heads, false);
    Tensor dq = make(s.queries, s.heads, false), dk = make(s.keys, s.kv_heads, false), dv = make(s.keys, s.kv_heads, false);
    std::vector<float> lse(s.batch * s.heads * s.queries);
    std::vector<std::uint8_t> mask(s.queries * s.keys);
    for (auto& m : mask) m = random() % 3 != 0;
    const SelfArgs args{q.view(), k.view(), v.view(), out.view(), lse.data(), s.masked ? mask.data() : nullptr, s.causal,
                        s.batch, s.queries, s.keys, s.heads, s.kv_heads, s.dim, type, 0.2f};
    self_attention(args, threads, variant);
    self_attention_backward(args, {grad.view(), dq.view(), dk.view(), dv.view()}, threads, variant);
    std::vector<std::uint8_t> all;
    for (const Tensor* t : {&out, &dq, &dk, &dv}) all.insert(all.end(), t->bytes.begin(), t->bytes.end());
    return all;
}

// Gradients of a linear layer from rows that stand apart, the last without what is between.
std::vector<float> linear(std::int64_t rows, std::int64_t outer, std::int64_t inner, bool with_bias, int threads) {
    std::mt19937 random(5);
    const auto make = [&](std::int64_t width) {
        std::vector<std::uint16_t> numbers(rows * (width + 3) - 3);
        for (auto& n : numbers) n = static_cast<std::uint16_t>(0x3f00 + random() % 256 + (random() % 2 << 15));
        numbers.shrink_to_fit();
        return numbers;
    };
    const auto grad = make(outer), x = make(inner);
    std::vector<float> weight(outer * inner), bias(with_bias ? outer : 0);
    linear_gradients({grad.data(), x.data(), outer + 3, inner + 3, weight.data(), with_bias ? bias.data() : nullptr, rows, outer,
                      inner},
                     threads);
    weight.insert(weight.end(), bias.begin(), bias.end());
    return weight;
}

}  // namespace

int main() {
    const Sizes cases[] = {{2, 80, 80, 2, 2, 32, false, false}, {2, 37, 45, 4, 2, 48, true, true},
                           {1, 17, 530, 2, 1, 16, false, true}, {3, 1, 1, 1, 1, 128, false, false},
                           {1, 33, 31, 2, 2, 80, false, true}};
    std::vector<std::string> ways = variant_names();
    if (has_tiles()) ways.emplace_back("tiles");
    for (const std::string& way : ways)
        for (const Float type : {Float::f32, Float::bf16, Float::f16}) {
            if (way == "tiles" && type != Float::bf16) continue;
            for (const Sizes& s : cases)
                if (results(s, type, way, 1) != results(s, type, way, 3)) {
                    std::printf("%s: threads change bits\n", way.c_str());
                    return 1;
                }
        }
    const std::int64_t widths[][3] = {{1, 32, 64}, {257, 96, 32}, {700, 64, 224}};
    for (const auto& [rows, outer, inner] : widths)
        for (const bool bias : {true, false})
            if (takes_linear(outer, inner) &&
                linear(rows, outer, inner, bias, 1) != linear(rows, outer, inner, bias, 5)) {
                std::puts("linear: threads change bits");
                return 1;
            }
    std::puts("done");
    return 0;
}
