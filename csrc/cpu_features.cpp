#include "cpu_features.h"

#include <cstdint>

#if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__)
#include <cpuid.h>
#define FLEXLAM_X86 1
#endif

namespace flexlam {
namespace {

// Registers of one cpuid leaf; all zero where the leaf does not exist or the processor is no x86.
struct Leaf {
    std::uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

#ifdef FLEXLAM_X86
Leaf cpuid(std::uint32_t leaf, std::uint32_t subleaf) {
    Leaf out;
    if (!__get_cpuid_count(leaf, subleaf, &out.eax, &out.ebx, &out.ecx, &out.edx)) return Leaf{};
    return out;
}

// XCR0: the register state that the operating system saves. Reading it faults unless OSXSAVE is set.
std::uint64_t saved_state() {
    std::uint32_t low = 0, high = 0;
    __asm__ volatile(".byte 0x0f, 0x01, 0xd0" : "=a"(low), "=d"(high) : "c"(0));  // xgetbv
    return (static_cast<std::uint64_t>(high) << 32) | low;
}
#else
Leaf cpuid(std::uint32_t, std::uint32_t) { return Leaf{}; }
std::uint64_t saved_state() { return 0; }
#endif

bool bit(std::uint32_t word, int index) { return (word >> index) & 1u; }

}  // namespace

std::vector<std::pair<std::string, bool>> cpu_features() {
    const Leaf basic = cpuid(1, 0), extended = cpuid(7, 0);
    const Leaf more = extended.eax >= 1 ? cpuid(7, 1) : Leaf{};
    const std::uint64_t state = bit(basic.ecx, 27) ? saved_state() : 0;
    const auto saves = [state](std::uint64_t mask) { return (state & mask) == mask; };
    const bool ymm = saves(0x6);         // SSE and AVX state
    const bool zmm = saves(0xe6);        // and the three parts of AVX-512 state
    const bool tiles = saves(0x60000);   // tile configuration and data; Linux asks for permission on first use
    return {
        {"avx2", ymm && bit(extended.ebx, 5)},
        {"fma", ymm && bit(basic.ecx, 12)},
        {"f16c", ymm && bit(basic.ecx, 29)},
        {"avx_vnni", ymm && bit(more.eax, 4)},
        {"avx512f", zmm && bit(extended.ebx, 16)},
        {"avx512bw", zmm && bit(extended.ebx, 30)},
        {"avx512vl", zmm && bit(extended.ebx, 31)},
        {"avx512_vnni", zmm && bit(extended.ecx, 11)},
        {"avx512_bf16", zmm && bit(more.eax, 5)},
        {"avx512_fp16", zmm && bit(extended.edx, 23)},
        {"amx_tile", tiles && bit(extended.edx, 24)},
        {"amx_int8", tiles && bit(extended.edx, 25)},
        {"amx_bf16", tiles && bit(extended.edx, 22)},
    };
}

}  // namespace flexlam
