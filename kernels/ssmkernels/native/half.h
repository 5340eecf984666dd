// Reading and writing activations of any dtype as vectors of the dtype that sums are kept in.
#pragma once

#include "vector.h"

namespace ssmzoo {
namespace SSMZOO_ISA {

struct bfloat16 {
    uint16_t bits;
};

struct float16 {
    uint16_t bits;
};

// The dtype of sums and states beside activations of dtype T.
template <class T>
struct Sum {
    typedef float type;
};

template <>
struct Sum<double> {
    typedef double type;
};

SSMZOO_INLINE float widen(float x) { return x; }
SSMZOO_INLINE double widen(double x) { return x; }

SSMZOO_INLINE float widen(bfloat16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

SSMZOO_INLINE void narrow(float x, float* p) { *p = x; }
SSMZOO_INLINE void narrow(double x, double* p) { *p = x; }

SSMZOO_INLINE void narrow(float x, bfloat16* p) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
    p->bits = static_cast<uint16_t>(x == x ? rounded : 0x7fc0);
}

#if defined(__F16C__)
SSMZOO_INLINE float widen(float16 x) { return _cvtsh_ss(x.bits); }
SSMZOO_INLINE void narrow(float x, float16* p) { p->bits = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }
#elif defined(__aarch64__)
SSMZOO_INLINE float widen(float16 x) {
    __fp16 h;
    memcpy(&h, &x.bits, sizeof h);
    return h;
}

SSMZOO_INLINE void narrow(float x, float16* p) {
    const __fp16 h = static_cast<__fp16>(x);
    memcpy(&p->bits, &h, sizeof h);
}
#else
SSMZOO_INLINE float widen(float16 x) {
    const uint32_t magnitude = x.bits & 0x7fffu, sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
    const uint32_t bias = magnitude < 0x7c00u ? 0x38000000u : 0x70000000u;  // of the exponent; or infinity's
    uint32_t bits = (magnitude << 13) + bias;
    float f = static_cast<float>(magnitude) * 5.9604645e-8f;  // subnormal: times 2^-24
    if (magnitude < 0x400u) memcpy(&bits, &f, sizeof f);
    bits |= sign;
    memcpy(&f, &bits, sizeof f);
    return f;
}

SSMZOO_INLINE void narrow(float x, float16* p) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    bits &= 0x7fffffffu;
    uint32_t half;
    if (bits >= 0x47800000u) {  // 65536 and more, infinity, NaN
        half = bits > 0x7f800000u ? 0x7e00u : 0x7c00u;
    } else if (bits < 0x38800000u) {  // subnormal: adding 1/2 makes the float unit round at the right place
        float f;
        memcpy(&f, &bits, sizeof f);
        f += 0.5f;
        memcpy(&half, &f, sizeof half);
        half -= 0x3f000000u;
    } else {
        half = (bits - 0x38000000u + 0xfffu + ((bits >> 13) & 1)) >> 13;
    }
    p->bits = static_cast<uint16_t>(sign | half);
}
#endif

// A whole vector at p, widened; and the first `count` values of one, 0 in the other lanes.
template <class T>
SSMZOO_INLINE typename Lanes<typename Sum<T>::type>::V read(const T* p) {
    typedef typename Sum<T>::type S;
    S x[Lanes<S>::count];
    for (int i = 0; i < Lanes<S>::count; ++i) x[i] = widen(p[i]);
    return load(x);
}

template <class T>
SSMZOO_INLINE void write(T* p, typename Lanes<typename Sum<T>::type>::V v) {
    typedef typename Sum<T>::type S;
    S x[Lanes<S>::count];
    store(x, v);
    for (int i = 0; i < Lanes<S>::count; ++i) narrow(x[i], p + i);
}

// Compilers would gather bfloat16's halves of a vector in memory, and wait for them there.
#if SSMZOO_VECTOR_BYTES == 64
template <>
SSMZOO_INLINE VF read(const bfloat16* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

template <>
SSMZOO_INLINE VF read(const float16* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

template <>
SSMZOO_INLINE void write(float16* p, VF v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
#elif SSMZOO_VECTOR_BYTES == 32
template <>
SSMZOO_INLINE VF read(const bfloat16* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}

template <>
SSMZOO_INLINE VF read(const float16* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

template <>
SSMZOO_INLINE void write(float16* p, VF v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
#endif

template <>
SSMZOO_INLINE VF read(const float* p) {
    return load(p);
}

template <>
SSMZOO_INLINE VD read(const double* p) {
    return load(p);
}

template <>
SSMZOO_INLINE void write(float* p, VF v) {
    store(p, v);
}

template <>
SSMZOO_INLINE void write(double* p, VD v) {
    store(p, v);
}

// The first `count` values, 0 in the other lanes; a whole vector where there are as many.
template <class T>
SSMZOO_INLINE typename Lanes<typename Sum<T>::type>::V read_some(const T* p, int64_t count) {
    typedef typename Sum<T>::type S;
    if (count >= Lanes<S>::count) return read(p);
    S x[Lanes<S>::count] = {};
    for (int64_t i = 0; i < count; ++i) x[i] = widen(p[i]);
    return load(x);
}

template <class T>
SSMZOO_INLINE void write_some(T* p, typename Lanes<typename Sum<T>::type>::V v, int64_t count) {
    typedef typename Sum<T>::type S;
    if (count >= Lanes<S>::count) return write(p, v);
    S x[Lanes<S>::count];
    store(x, v);
    for (int64_t i = 0; i < count; ++i) narrow(x[i], p + i);
}

template <>
SSMZOO_INLINE VF read_some(const float* p, int64_t count) {
    return count >= Lanes<float>::count ? load(p) : load_some(p, count);
}

template <>
SSMZOO_INLINE void write_some(float* p, VF v, int64_t count) {
    if (count >= Lanes<float>::count) return store(p, v);
    store_some(p, v, count);
}

// Bytes of a result from which it is `large`: nobody will find it in a cache. To bring its old lines there for writing
// would take as long as the writing does, and drive out what is needed.
constexpr int64_t kLarge = 16 << 20;

template <class T>
SSMZOO_INLINE void write_some(T* p, typename Lanes<typename Sum<T>::type>::V v, int64_t count, bool) {
    write_some(p, v, count);
}

template <>
SSMZOO_INLINE void write_some(float* p, VF v, int64_t count, bool large) {
    if (large && count >= Lanes<float>::count && reinterpret_cast<uintptr_t>(p) % sizeof(VF) == 0) return stream(p, v);
    write_some(p, v, count);
}

}  // namespace SSMZOO_ISA
}  // namespace ssmzoo
