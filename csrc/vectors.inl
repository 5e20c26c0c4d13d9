// Vectors as wide as one register of the instruction set that the including file is compiled for: it defines
// FLEXLAM_VARIANT, a namespace, and FLEXLAM_LANES, the fp32 numbers of a register. (GCC takes vectors wider than a register
// apart lane by lane: 8 times slower.)
#include <cstdint>
#include <cstring>

namespace flexlam {
namespace FLEXLAM_VARIANT {
namespace {

constexpr int V = FLEXLAM_LANES;  // elements of a vector
typedef float vf __attribute__((vector_size(4 * V)));
typedef std::int32_t vi __attribute__((vector_size(4 * V)));
typedef std::uint32_t vu __attribute__((vector_size(4 * V)));
typedef std::uint16_t vh __attribute__((vector_size(2 * V)));

template <class V, class T>
inline V load(const T* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
template <class V, class T>
inline void store(T* p, V v) {
    std::memcpy(p, &v, sizeof v);
}
template <class V, class U>
inline V bits(U u) {
    static_assert(sizeof(V) == sizeof(U));
    V v;
    std::memcpy(&v, &u, sizeof v);
    return v;
}
template <class T>
inline T pick(vi condition, T a, T b) {  // condition is all ones or all zeros in each lane
    return condition ? a : b;
}

inline vf from_bf16(vh h) { return bits<vf>(__builtin_convertvector(h, vu) << 16); }

inline vh to_bf16(vf x) {
    const vu u = bits<vu>(x);
    const vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    const vu quiet_nan = (u >> 16) | 0x40u;
    return __builtin_convertvector(pick<vu>(x != x, quiet_nan, rounded), vh);
}

inline vf from_f16(vh h) {
    const vu u = __builtin_convertvector(h, vu);
    const vu magnitude = (u & 0x7fffu) << 13;
    const vu finite = bits<vu>(bits<vf>(magnitude) * 0x1p112f);  // rebiases the exponent, subnormals included
    const vu special = magnitude | 0x7f800000u;
    return bits<vf>(pick<vu>((u & 0x7c00u) == 0x7c00u, special, finite) | ((u & 0x8000u) << 16));
}

inline vh to_f16(vf x) {
    const vu u = bits<vu>(x), sign = (u >> 16) & 0x8000u, m = u & 0x7fffffffu;
    const vf magnitude = bits<vf>(m);
    // 0.5 has the spacing of fp16 subnormals, so the addition rounds to them
    const vu small = bits<vu>(magnitude + 0.5f) - bits<vu>(vf{} + 0.5f);
    const vu normal = (m + 0xfffu + ((m >> 13) & 1u) - (112u << 23)) >> 13;
    vu h = pick<vu>(magnitude < 0x1p-14f, small, normal);
    h = pick<vu>(magnitude >= 65520.0f, vu{} + 0x7c00u, h);
    h = pick<vu>(x != x, vu{} + 0x7e00u, h);
    return __builtin_convertvector(h | sign, vh);
}

// The exponential of what lies within -87..88, and NaN of NaN.
inline vf exp_within(vf y) {
    const vf n = (y * 1.44269504f + 12582912.0f) - 12582912.0f;  // the nearest integer
    const vf r = (y - n * 0.693359375f) - n * -2.12194440e-4f;   // within ln(2) / 2
    vf e = vf{} + 1.9875691500e-4f;                              // Cephes' expf
    e = e * r + 1.3981999507e-3f;
    e = e * r + 8.3334519073e-3f;
    e = e * r + 4.1665795894e-2f;
    e = e * r + 1.6666665459e-1f;
    e = e * r + 5.0000001201e-1f;
    e = e * (r * r) + r + 1.0f;
    return e * bits<vf>((__builtin_convertvector(n, vi) + 127) << 23);
}

inline vi lanes_from(int first) {  // first, first + 2, ...: a constant once it is inlined
    vi v{};
    for (int i = 0; i < V; ++i) v[i] = first + 2 * i;
    return v;
}

// Adds neighbours: lanes 0 + 1, 2 + 3, ... of `a`, then those of `b`.
template <class T>
inline T add_pairs(T a, T b) {
    const vi even = lanes_from(0), odd = lanes_from(1);
#ifdef __clang__
    T x{}, y{};
    for (int i = 0; i < V; ++i) x[i] = even[i] < V ? a[even[i]] : b[even[i] - V], y[i] = odd[i] < V ? a[odd[i]] : b[odd[i] - V];
    return x + y;
#else
    return __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, odd);
#endif
}

}  // namespace
}  // namespace FLEXLAM_VARIANT
}  // namespace flexlam
