// Which instruction sets this processor has and this operating system saves across a context switch.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace flexlam {

// Name and presence of each instruction set, always the same names in the same order; all absent off x86.
std::vector<std::pair<std::string, bool>> cpu_features();

}  // namespace flexlam
