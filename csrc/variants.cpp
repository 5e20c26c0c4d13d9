#include "variants.h"

#include <algorithm>
#include <stdexcept>

#include "cpu_features.h"

namespace flexlam {
namespace {

struct Known {
    const char* name;
    Variant variant;
    std::vector<std::string> needs;
};

std::vector<Known> all() {
    std::vector<Known> out;
#ifdef FLEXLAM_X86_VARIANTS
    out.push_back({"avx512_bf16", Variant::avx512_bf16, {"avx512f", "avx512bw", "avx512vl", "avx512_bf16"}});
    out.push_back({"avx512", Variant::avx512, {"avx512f", "avx512bw", "avx512vl"}});
    out.push_back({"avx2", Variant::avx2, {"avx2", "fma", "f16c"}});
#endif
    out.push_back({"portable", Variant::portable, {}});
    return out;
}

std::vector<Known> find_known() {
    const auto features = cpu_features();
    const auto has = [&](const std::string& name) {
        return std::any_of(features.begin(), features.end(), [&](const auto& f) { return f.first == name && f.second; });
    };
    std::vector<Known> found = all();
    found.erase(std::remove_if(found.begin(), found.end(),
                               [&](const Known& k) { return !std::all_of(k.needs.begin(), k.needs.end(), has); }),
                found.end());
    return found;
}

const std::vector<Known>& known() {
    static const std::vector<Known> found = find_known();
    return found;
}

}  // namespace

const std::vector<std::string>& variant_names() {
    static const std::vector<std::string> names = [] {
        std::vector<std::string> out;
        for (const Known& k : known()) out.emplace_back(k.name);
        return out;
    }();
    return names;
}

Variant find_variant(const std::string& name) {
    if (name.empty()) return known().front().variant;
    for (const Known& k : known())
        if (name == k.name) return k.variant;
    throw std::invalid_argument("variant: expected one that this processor has, got '" + name + "'");
}

}  // namespace flexlam
