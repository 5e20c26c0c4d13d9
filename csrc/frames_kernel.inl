// One sample of csrc/frames.h, compiled once per instruction set (vectors.inl says how). A row of pixels is taken apart
// into channels, worked on as it stands, and put where the patches want it. Floating-point contraction is off
// (CMakeLists.txt), so every variant returns the bits of plain PyTorch, and sums have one order: 16 lanes, row by row.
#include <cstdint>

#include "frames.h"
#include "vectors.inl"

namespace flexlam {
namespace FLEXLAM_VARIANT {
namespace {

typedef std::uint8_t vb __attribute__((vector_size(V)));

constexpr std::int64_t widest = 256;  // pixels of a row at a time
constexpr int lanes = 16;             // of sums, at any width of a vector
static_assert(lanes % V == 0);

// uint8 / 127.5 - 1, rounded as the division rounds: by the reciprocal in two parts, of which the first has 16 bits.
inline vf normal(const std::uint8_t* p) {
    const vf u = __builtin_convertvector(__builtin_convertvector(load<vb>(p), vi), vf);
    return (u * 0.007843017578125f + u * 1.1967678403834725e-07f) - 1.0f;
}

inline vf load_part(const float* p, std::int64_t count) {
    if (count >= V) return load<vf>(p);
    float some[V] = {};
    std::memcpy(some, p, static_cast<std::size_t>(count) * sizeof(float));
    return load<vf>(some);
}

#if defined(__SSSE3__) && !defined(__clang__)
typedef std::uint8_t v16 __attribute__((vector_size(16)));

inline v16 of_three(int channel, int part) {  // a constant once it is inlined
    v16 m{};
    for (int i = 0; i < 16; ++i) {
        const int at = 3 * i + channel;
        m[i] = static_cast<std::uint8_t>(part == 0 ? (at < 32 ? at : 0) : (at < 32 ? i : at - 16));
    }
    return m;
}

template <int C>
inline void plane_of_three(v16 a, v16 b, v16 c, std::uint8_t* plane) {
    store(plane, __builtin_shuffle(__builtin_shuffle(a, b, of_three(C, 0)), c, of_three(C, 1)));
}

// Whole 16s of pixels [count, 3] into three planes; returns how many pixels that were.
inline std::int64_t split_three(const std::uint8_t* row, std::int64_t count, std::uint8_t (*planes)[widest]) {
    std::int64_t i = 0;
    for (; i + 16 <= count; i += 16) {
        const v16 a = load<v16>(row + 3 * i), b = load<v16>(row + 3 * i + 16), c = load<v16>(row + 3 * i + 32);
        plane_of_three<0>(a, b, c, planes[0] + i);
        plane_of_three<1>(a, b, c, planes[1] + i);
        plane_of_three<2>(a, b, c, planes[2] + i);
    }
    return i;
}
#else
inline std::int64_t split_three(const std::uint8_t*, std::int64_t, std::uint8_t (*)[widest]) { return 0; }
#endif

// Pixels of some columns of a row, channel by channel: three channels are taken apart together, others one by one.
struct Planes {
    alignas(64) std::uint8_t planes[3][widest] = {};
    const std::uint8_t* row = nullptr;
    std::int64_t count = 0, channels = 0;

    inline void set(const std::uint8_t* pixels, std::int64_t n, std::int64_t c) {
        row = pixels, count = n, channels = c;
        if (channels != 3) return;
        for (std::int64_t i = split_three(row, count, planes); i < count; ++i)
            for (int k = 0; k < 3; ++k) planes[k][i] = row[3 * i + k];
    }
    inline const std::uint8_t* plane(std::int64_t c) {
        if (channels == 3) return planes[c];
        for (std::int64_t i = 0; i < count; ++i) planes[0][i] = row[i * channels + c];
        return planes[0];
    }
};

template <Float F>
inline void write(void* p, std::int64_t i, vf x) {
    if constexpr (F == Float::f32) return store(static_cast<float*>(p) + i, x);
    if constexpr (F == Float::bf16) store(static_cast<std::uint16_t*>(p) + i, to_bf16(x));
    if constexpr (F == Float::f16) store(static_cast<std::uint16_t*>(p) + i, to_f16(x));
}

template <Float F>
inline vf read(const void* p, std::int64_t i) {
    if constexpr (F == Float::f32) return load<vf>(static_cast<const float*>(p) + i);
    const vh h = load<vh>(static_cast<const std::uint16_t*>(p) + i);
    return F == Float::bf16 ? from_bf16(h) : from_f16(h);
}

// Copies `pieces` of `bytes`, which stand `from_step` and `to_step` bytes apart.
template <std::size_t bytes>
inline void copy_pieces(const char* from, std::int64_t from_step, char* to, std::int64_t to_step, std::int64_t pieces) {
    for (std::int64_t i = 0; i < pieces; ++i) std::memcpy(to + i * to_step, from + i * from_step, bytes);
}

inline void copy(const char* from, std::int64_t from_step, char* to, std::int64_t to_step, std::int64_t pieces,
                 std::int64_t bytes) {
    switch (bytes) {  // a copy of a known size is a load and a store
        case 8: return copy_pieces<8>(from, from_step, to, to_step, pieces);
        case 16: return copy_pieces<16>(from, from_step, to, to_step, pieces);
        case 32: return copy_pieces<32>(from, from_step, to, to_step, pieces);
        case 64: return copy_pieces<64>(from, from_step, to, to_step, pieces);
    }
    for (std::int64_t i = 0; i < pieces; ++i)
        std::memcpy(to + i * to_step, from + i * from_step, static_cast<std::size_t>(bytes));
}

// Some columns of one row of one sample: `count` pixels of `pieces` patches, and where they are in frames, in the noise of
// the first channel and, in bytes, in patches.
struct Piece {
    std::int64_t count, pieces, pixel, noise, at;
    std::int64_t plane;                  // numbers of a channel of the noise
    std::int64_t bytes, field, elements, apart;  // of a row of a patch, a channel, a frame's channels, a whole patch

    inline void scatter(const void* row, void* out, std::int64_t c) const {
        copy(static_cast<const char*>(row), bytes, static_cast<char*>(out) + at + c * field, apart, pieces, bytes);
    }
    inline void gather(const void* out, void* row, std::int64_t c) const {
        copy(static_cast<const char*>(out) + at + c * field, apart, static_cast<char*>(row), bytes, pieces, bytes);
    }
};

// Calls `then(piece)` for the pieces of a sample: whole patches, row by row. All divisions are here, not at each channel
// of each row, where they would cost as much as the pixels.
template <class Then>
inline void each_piece(const FrameShape& s, std::int64_t sample, std::int64_t size, std::int64_t fields, const Then& then) {
    const std::int64_t most = widest / s.patch, across = s.width / s.patch, down = s.height / s.patch;
    Piece p{};
    p.plane = s.height * s.width;
    p.bytes = size * s.patch, p.field = p.bytes * s.patch, p.elements = p.field * s.channels, p.apart = p.elements * fields;
    for (std::int64_t y = 0; y < s.height; ++y)
        for (std::int64_t token = 0; token < across; token += most) {
            const std::int64_t place = y * s.width + token * s.patch;
            p.pieces = across - token < most ? across - token : most;
            p.count = p.pieces * s.patch;
            p.pixel = (sample * p.plane + place) * s.channels;
            p.noise = sample * p.plane * s.channels + place;
            p.at = ((sample * down + y / s.patch) * across + token) * p.apart + y % s.patch * p.bytes;
            then(p);
        }
}

inline vf mixed(vf frame, vf noise, float tau) { return (1.0f - tau) * noise + tau * frame; }

template <Float F, Patches K>
void patches_of(const PatchArgs& a, std::int64_t sample) {
    Planes now, next;
    alignas(64) char first[4 * widest], second[4 * widest];
    const std::int64_t channels = a.shape.channels;
    const float tau = K == Patches::flow ? a.tau[sample] : 0.0f;
    each_piece(a.shape, sample, F == Float::f32 ? 4 : 2, K == Patches::frame ? 1 : 2, [&](const Piece& p) {
        now.set(a.now + p.pixel, p.count, channels);
        if constexpr (K != Patches::frame) next.set(a.following + p.pixel, p.count, channels);
        for (std::int64_t c = 0; c < channels; ++c) {
            const std::uint8_t* const here = now.plane(c);
            const std::uint8_t* const there = K == Patches::frame ? here : next.plane(c);
            for (std::int64_t i = 0; i < p.count; i += V) {
                const vf frame = normal(here + i);
                if constexpr (K == Patches::flow) {
                    const vf noise = load_part(a.noise + p.noise + c * p.plane + i, p.count - i);
                    write<F>(first, i, mixed(normal(there + i), noise, tau));
                    write<F>(second, i, frame);
                } else {
                    write<F>(first, i, frame);
                    if constexpr (K == Patches::tubelets) write<F>(second, i, a.gain * (normal(there + i) - frame));
                }
            }
            p.scatter(first, a.out, c);
            if constexpr (K != Patches::frame) p.scatter(second, static_cast<char*>(a.out) + p.elements, c);
        }
    });
}

template <Float F>
double loss_of(const FlowLossArgs& a, std::int64_t sample) {
    Planes now, next;
    alignas(64) char row[4 * widest] = {};
    const std::int64_t channels = a.shape.channels;
    const float tau = a.tau[sample], rest = 1.0f - tau < a.floor ? a.floor : 1.0f - tau, inverse = 1.0f / rest;
    vi lane{};
    for (int i = 0; i < V; ++i) lane[i] = i;
    double total = 0.0;
    each_piece(a.shape, sample, F == Float::f32 ? 4 : 2, 1, [&](const Piece& p) {
        vf sums[lanes / V] = {};
        next.set(a.following + p.pixel, p.count, channels);
        if (a.now) now.set(a.now + p.pixel, p.count, channels);
        for (std::int64_t c = 0; c < channels; ++c) {
            const std::uint8_t* const there = next.plane(c);
            const std::uint8_t* const here = a.now ? now.plane(c) : there;
            p.gather(a.out, row, c);
            for (std::int64_t i = 0; i < p.count; i += V) {
                const vf noise = load_part(a.noise + p.noise + c * p.plane + i, p.count - i), frame = normal(there + i);
                vf velocity = read<F>(row, i);
                if (a.now) velocity = (normal(here + i) + velocity - mixed(frame, noise, tau)) / rest;
                vf error = velocity - (frame - noise);
                error = pick<vf>(lane + static_cast<std::int32_t>(i) < static_cast<std::int32_t>(p.count), error, vf{});
                sums[i / V % (lanes / V)] += error * error;
                write<F>(row, i, a.now ? error * inverse : error);
            }
            if (a.error) p.scatter(row, a.error, c);
        }
        for (int i = 0; i < lanes; ++i) total += static_cast<double>(sums[i / V][i % V]);
    });
    return total;
}

template <Float F>
void scaled(const void* error, void* out, std::int64_t first, std::int64_t last, float scale) {
    const std::int64_t whole = first + (last - first) / V * V;
    for (std::int64_t i = first; i < whole; i += V) write<F>(out, i, read<F>(error, i) * scale);
    if (whole == last) return;
    alignas(64) char some[4 * V] = {};
    const std::size_t size = F == Float::f32 ? 4 : 2, left = static_cast<std::size_t>(last - whole) * size;
    const std::size_t at = static_cast<std::size_t>(whole) * size;
    std::memcpy(some, static_cast<const char*>(error) + at, left);
    write<F>(some, 0, read<F>(some, 0) * scale);
    std::memcpy(static_cast<char*>(out) + at, some, left);
}

template <Float F>
void patches_as(const PatchArgs& a, std::int64_t sample) {
    switch (a.kind) {
        case Patches::frame: return patches_of<F, Patches::frame>(a, sample);
        case Patches::tubelets: return patches_of<F, Patches::tubelets>(a, sample);
        case Patches::flow: return patches_of<F, Patches::flow>(a, sample);
    }
}

}  // namespace

void make_patches(const PatchArgs& a, std::int64_t sample) {
    if (a.type == Float::f32) return patches_as<Float::f32>(a, sample);
    a.type == Float::bf16 ? patches_as<Float::bf16>(a, sample) : patches_as<Float::f16>(a, sample);
}

double flow_loss(const FlowLossArgs& a, std::int64_t sample) {
    if (a.type == Float::f32) return loss_of<Float::f32>(a, sample);
    return a.type == Float::bf16 ? loss_of<Float::bf16>(a, sample) : loss_of<Float::f16>(a, sample);
}

void scale_error(const void* error, void* out, std::int64_t first, std::int64_t last, float scale, Float type) {
    if (type == Float::f32) return scaled<Float::f32>(error, out, first, last, scale);
    type == Float::bf16 ? scaled<Float::bf16>(error, out, first, last, scale)
                        : scaled<Float::f16>(error, out, first, last, scale);
}

}  // namespace FLEXLAM_VARIANT
}  // namespace flexlam
