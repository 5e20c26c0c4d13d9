// Which of the instruction sets compiled in a call takes: the widest that this processor has, or one by name.
#pragma once

#include <string>
#include <vector>

namespace flexlam {

enum class Variant : int { portable = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3 };

// Those compiled in that this processor has, widest first; "portable" is always there.
const std::vector<std::string>& variant_names();

// The variant of that name; "" is the first of variant_names(). Throws std::invalid_argument for any other.
Variant find_variant(const std::string& name);

}  // namespace flexlam
