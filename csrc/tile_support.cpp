// Whether a call may go to the files compiled for AMX (csrc/*_amx.cpp). Any processor runs this file: the compiler is free to
// use AVX-512 everywhere in those, in a comparison too, so nothing in them may be called before this has said yes.
#include <algorithm>
#include <cstdint>

#include "cpu_features.h"
#include "encoder.h"
#include "engine.h"
#include "linear_train.h"
#include "prefill.h"

#ifdef FLEXLAM_X86_VARIANTS
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace flexlam {
namespace {

constexpr std::int64_t side = 16, pairs = 32;  // a tile: 16 rows of 32 bf16 numbers

bool whole(std::int64_t n, std::int64_t multiple) { return n > 0 && n % multiple == 0; }

bool ask_for_tiles() {
#ifdef FLEXLAM_X86_VARIANTS
    const auto features = cpu_features();
    const auto has = [&](const char* name) {
        return std::any_of(features.begin(), features.end(), [&](const auto& f) { return f.first == name && f.second; });
    };
    for (const char* name : {"amx_tile", "amx_bf16", "avx512_bf16", "avx512bw", "avx512vl"})
        if (!has(name)) return false;
    constexpr int request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM: Linux wants to be asked once a process
    return syscall(SYS_arch_prctl, request, tile_data) == 0;
#else
    return false;
#endif
}

}  // namespace

bool has_tiles() {
    static const bool found = ask_for_tiles();
    return found;
}

bool takes_tiles(const AttendArgs& a) {
    return a.type == Float::bf16 && a.in == Float::bf16 && a.dim % pairs == 0 && a.dim <= 128 && a.page % side == 0;
}

bool takes_linear(std::int64_t outer, std::int64_t inner) {
    return has_tiles() && whole(outer, pairs) && whole(inner, pairs);
}

bool SequenceEngine::takes(const AppendArgs& a) const {
    AttendArgs shape{};
    shape.dim = shape_.dim, shape.page = a.page, shape.in = shape_.type, shape.type = a.type;
    return has_tiles() && takes_tiles(shape) && shape_.hidden % pairs == 0 && shape_.inner % pairs == 0 && a.tokens > 0;
}

bool EncoderEngine::takes(std::int64_t tokens) const {
    const std::int64_t dim = shape_.width / shape_.heads;
    return has_tiles() && whole(tokens, side) && shape_.width % shape_.heads == 0 && dim % pairs == 0 && dim <= 128 &&
           shape_.width % pairs == 0 && shape_.inner % pairs == 0;
}

}  // namespace flexlam
