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

// Halves as 32 bits each, and back: compilers would gather them in memory, and wait for them there, or take twice the
// instructions.
typedef uint32_t Bits __attribute__((vector_size(SSMZOO_VECTOR_BYTES)));

#if SSMZOO_VECTOR_BYTES == 64
SSMZOO_INLINE Bits read_halves(const void* p) {
    return reinterpret_cast<Bits>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p))));
}

SSMZOO_INLINE void write_halves(void* p, Bits halves) {
    _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(halves)));
}
#elif SSMZOO_VECTOR_BYTES == 32
SSMZOO_INLINE Bits read_halves(const void* p) {
    return reinterpret_cast<Bits>(_mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))));
}

SSMZOO_INLINE void write_halves(void* p, Bits halves) {
    const __m256i v = reinterpret_cast<__m256i>(halves);
    const __m256i joined = _mm256_permute4x64_epi64(_mm256_packus_epi32(v, v), 0x08);
    _mm_storeu_si128(static_cast<__m128i*>(p), _mm256_castsi256_si128(joined));
}
#else
typedef uint16_t Halves __attribute__((vector_size(SSMZOO_VECTOR_BYTES / 2)));

SSMZOO_INLINE Bits read_halves(const void* p) {
    Halves halves;
    memcpy(&halves, p, sizeof halves);
    return __builtin_convertvector(halves, Bits);
}

SSMZOO_INLINE void write_halves(void* p, Bits words) {
    const Halves halves = __builtin_convertvector(words, Halves);
    memcpy(p, &halves, sizeof halves);
}
#endif

template <>
SSMZOO_INLINE VF read(const bfloat16* p) {
    return reinterpret_cast<VF>(read_halves(p) << 16);
}

// Without a look at each, which would take a tenth of a product's time, and most of a convolution's.
template <>
SSMZOO_INLINE void write(bfloat16* p, VF v) {
    const Bits bits = reinterpret_cast<Bits>(v), rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    write_halves(p, v == v ? rounded : Bits{} + 0x7fc0);
}

#if SSMZOO_VECTOR_BYTES == 64
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
SSMZOO_INLINE VF read(const float16* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

template <>
SSMZOO_INLINE void write(float16* p, VF v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__aarch64__)
template <>
SSMZOO_INLINE VF read(const float16* p) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits)));
}

template <>
SSMZOO_INLINE void write(float16* p, VF v) {
    vst1_u16(&p->bits, vreinterpret_u16_f16(vcvt_f16_f32(v)));
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
    constexpr int64_t lanes = Lanes<typename Sum<T>::type>::count;
    if (count >= lanes) return read(p);
    T whole[lanes] = {};
    for (int64_t i = 0; i < count; ++i) whole[i] = p[i];
    return read(whole);
}

template <class T>
SSMZOO_INLINE void write_some(T* p, typename Lanes<typename Sum<T>::type>::V v, int64_t count) {
    constexpr int64_t lanes = Lanes<typename Sum<T>::type>::count;
    if (count >= lanes) return write(p, v);
    T whole[lanes];
    write(whole, v);
    for (int64_t i = 0; i < count; ++i) p[i] = whole[i];
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
