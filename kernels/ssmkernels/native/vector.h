// Vectors of float and double as wide as the instruction set's registers, by the compilers' vector extension.
//
// Only what the extension lacks is written with intrinsics: fused multiply-add and minimum/maximum. The build switches
// the compiler's own contraction of a*b+c off, so that two paths through a kernel round alike, bit for bit.
#pragma once

#include <stdint.h>
#include <string.h>

#include "intrinsics.h"
#include "isa.h"

namespace ssmzoo {
namespace SSMZOO_ISA {

template <class S>
struct Lanes;

template <>
struct Lanes<float> {
    typedef float V __attribute__((vector_size(SSMZOO_VECTOR_BYTES)));
    typedef int32_t I __attribute__((vector_size(SSMZOO_VECTOR_BYTES)));
    static constexpr int count = SSMZOO_VECTOR_BYTES / 4;
};

template <>
struct Lanes<double> {
    typedef double V __attribute__((vector_size(SSMZOO_VECTOR_BYTES)));
    typedef int64_t I __attribute__((vector_size(SSMZOO_VECTOR_BYTES)));
    static constexpr int count = SSMZOO_VECTOR_BYTES / 8;
};

typedef Lanes<float>::V VF;
typedef Lanes<double>::V VD;

template <class S>
SSMZOO_INLINE typename Lanes<S>::V load(const S* p) {
    typename Lanes<S>::V v;
    memcpy(&v, p, sizeof v);
    return v;
}

template <class S>
SSMZOO_INLINE void store(S* p, typename Lanes<S>::V v) {
    memcpy(p, &v, sizeof v);
}

// The first `count` values, fewer than a vector has; 0 in the other lanes.
template <class S>
SSMZOO_INLINE typename Lanes<S>::V load_some(const S* p, int64_t count) {
    typename Lanes<S>::V v = {};
    memcpy(&v, p, static_cast<size_t>(count) * sizeof(S));
    return v;
}

template <class S>
SSMZOO_INLINE void store_some(S* p, typename Lanes<S>::V v, int64_t count) {
    memcpy(p, &v, static_cast<size_t>(count) * sizeof(S));
}

// As store, but past the caches, where the machine can: `p` lies on a vector's border.
template <class S>
SSMZOO_INLINE void stream(S* p, typename Lanes<S>::V v) {
    store(p, v);
}

#if SSMZOO_VECTOR_BYTES == 64
template <>
SSMZOO_INLINE void stream(float* p, VF v) {
    _mm512_stream_ps(p, v);
}
#elif SSMZOO_VECTOR_BYTES == 32
template <>
SSMZOO_INLINE void stream(float* p, VF v) {
    _mm256_stream_ps(p, v);
}
#endif

#if SSMZOO_VECTOR_BYTES == 64
template <>
SSMZOO_INLINE VF load_some(const float* p, int64_t count) {
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p);
}

template <>
SSMZOO_INLINE void store_some(float* p, VF v, int64_t count) {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1), v);
}
#endif

template <class S>
SSMZOO_INLINE typename Lanes<S>::V splat(S x) {
    return x - typename Lanes<S>::V{};  // minus: -0 stays -0
}

#if SSMZOO_VECTOR_BYTES == 64
SSMZOO_INLINE VF fma(VF a, VF b, VF c) { return _mm512_fmadd_ps(a, b, c); }
SSMZOO_INLINE VD fma(VD a, VD b, VD c) { return _mm512_fmadd_pd(a, b, c); }
#elif SSMZOO_VECTOR_BYTES == 32
SSMZOO_INLINE VF fma(VF a, VF b, VF c) { return _mm256_fmadd_ps(a, b, c); }
SSMZOO_INLINE VD fma(VD a, VD b, VD c) { return _mm256_fmadd_pd(a, b, c); }
#elif defined(__aarch64__)
SSMZOO_INLINE VF fma(VF a, VF b, VF c) { return vfmaq_f32(c, a, b); }
SSMZOO_INLINE VD fma(VD a, VD b, VD c) { return vfmaq_f64(c, a, b); }
#else
SSMZOO_INLINE VF fma(VF a, VF b, VF c) { return a * b + c; }
SSMZOO_INLINE VD fma(VD a, VD b, VD c) { return a * b + c; }
#endif

// x within [low, high]; NaN stays NaN (x86's min and max return their second operand then, NEON's a NaN).
#if SSMZOO_VECTOR_BYTES == 64
SSMZOO_INLINE VF clamp(VF x, VF low, VF high) { return _mm512_max_ps(low, _mm512_min_ps(high, x)); }
SSMZOO_INLINE VD clamp(VD x, VD low, VD high) { return _mm512_max_pd(low, _mm512_min_pd(high, x)); }
#elif SSMZOO_VECTOR_BYTES == 32
SSMZOO_INLINE VF clamp(VF x, VF low, VF high) { return _mm256_max_ps(low, _mm256_min_ps(high, x)); }
SSMZOO_INLINE VD clamp(VD x, VD low, VD high) { return _mm256_max_pd(low, _mm256_min_pd(high, x)); }
#elif defined(__x86_64__)
SSMZOO_INLINE VF clamp(VF x, VF low, VF high) { return _mm_max_ps(low, _mm_min_ps(high, x)); }
SSMZOO_INLINE VD clamp(VD x, VD low, VD high) { return _mm_max_pd(low, _mm_min_pd(high, x)); }
#elif defined(__aarch64__)
SSMZOO_INLINE VF clamp(VF x, VF low, VF high) { return vmaxq_f32(low, vminq_f32(high, x)); }
SSMZOO_INLINE VD clamp(VD x, VD low, VD high) { return vmaxq_f64(low, vminq_f64(high, x)); }
#else
SSMZOO_INLINE VF clamp(VF x, VF low, VF high) { return low > x ? low : (high < x ? high : x); }
SSMZOO_INLINE VD clamp(VD x, VD low, VD high) { return low > x ? low : (high < x ? high : x); }
#endif

template <class S>
SSMZOO_INLINE typename Lanes<S>::I bits_of(typename Lanes<S>::V x) {
    return reinterpret_cast<typename Lanes<S>::I>(x);
}

template <class S>
SSMZOO_INLINE typename Lanes<S>::V from_bits(typename Lanes<S>::I x) {
    return reinterpret_cast<typename Lanes<S>::V>(x);
}

template <class S>
SSMZOO_INLINE typename Lanes<S>::V absolute(typename Lanes<S>::V x) {
    return from_bits<S>(bits_of<S>(x) & ~bits_of<S>(splat<S>(S(-0.0))));
}

template <int... i>
struct Indices {};

template <int n, int... i>
struct Count : Count<n - 1, n - 1, i...> {};

template <int... i>
struct Count<0, i...> {
    typedef Indices<i...> type;
};

// Lane k of the result is the one that the k-th index names, counted through a and then b.
template <int... i, class V>
SSMZOO_INLINE V shuffle(V a, V b) {
#if defined(__clang__) || __GNUC__ >= 12
    return __builtin_shufflevector(a, b, i...);
#else
    const decltype(a < b) lanes = {i...};  // a vector of integers as wide as the numbers
    return __builtin_shuffle(a, b, lanes);
#endif
}

// x_i + x_{i ^ h}, where x_i is of a where bit h of i is clear and of b where it is set.
template <int h, class V, int... i>
SSMZOO_INLINE V add_across(V a, V b, Indices<i...>) {
    constexpr int count = sizeof...(i);
    return shuffle<(i & h ? count + i : i)...>(a, b) + shuffle<(i & h ? count + (i ^ h) : i ^ h)...>(a, b);
}

// Lane i, modulo count, of the result is the sum of the lanes of v[i]; count is a power of two, at most the number of
// lanes. The order of the additions is always the same. Overwrites v.
template <class S, int count, int h = Lanes<S>::count / 2>
SSMZOO_INLINE typename Lanes<S>::V sum_lanes(typename Lanes<S>::V* v) {
    const typename Count<Lanes<S>::count>::type indices;
    if constexpr (h == 0) {
        return v[0];
    } else if constexpr (h >= count) {
        for (int i = 0; i < count; ++i) v[i] = add_across<h>(v[i], v[i], indices);
        return sum_lanes<S, count, h / 2>(v);
    } else {
        for (int i = 0; i < h; ++i) v[i] = add_across<h>(v[i], v[i + h], indices);
        return sum_lanes<S, count, h / 2>(v);
    }
}

}  // namespace SSMZOO_ISA
}  // namespace ssmzoo
