// Products of 4-bit weights with whole numbers, in what each instruction set multiplies whole numbers by.
//
// A whole number is some digits to a base, each of which a product takes at once: three of 8 bits where there are
// products of bytes, else two of 12. Sums of products are exact, so that AVX2, AVX-512 and VNNI give the same bits.
#pragma once

#include "native/math.h"
#include "quantized_linear/cpu.h"
#include "quantized_linear/cpu_isa.h"

namespace ssmzoo {
namespace SSMZOO_ISA {

#if defined(__x86_64__) && SSMZOO_VECTOR_BYTES >= 32
constexpr int kLanes = 8;  // of sums, also where vectors could have more
#else
constexpr int kLanes = 4;
#endif

#if defined(__aarch64__) || SSMZOO_VECTOR_BYTES >= 32
typedef int8_t Digit;
constexpr int kDigits = 3;  // of an x that keeps its precision
constexpr int kDigitBits = 8;
#else
typedef int16_t Digit;
constexpr int kDigits = 2;
constexpr int kDigitBits = 12;
#endif

#if SSMZOO_VECTOR_BYTES >= 32
constexpr int64_t kVectorInputs = 2 * kBlock;  // inputs whose weights fill a vector
#else
constexpr int64_t kVectorInputs = kBlock;
#endif

constexpr bool kManyRegisters = SSMZOO_VECTOR_BYTES == 64 && SSMZOO_BYTE_PRODUCTS;

typedef float SumsF __attribute__((vector_size(4 * kLanes)));
typedef int32_t SumsI __attribute__((vector_size(4 * kLanes)));

// A chunk of x over its scale.
template <int count>
struct alignas(32) Whole {
    Digit digits[kChunk / kVectorInputs][count][kVectorInputs];  // the highest first; inputs in the order of unpacked weights
};

// Where in its vectors of digits the input of a chunk is: the lower halves of bytes come before all upper ones.
SSMZOO_INLINE int64_t place_of(int64_t k) {
    return k % kBlock / 16 * (kVectorInputs / 2) + k % kVectorInputs / kBlock * 16 + k % 16;
}

#if SSMZOO_VECTOR_BYTES >= 32
SSMZOO_INLINE SumsF fma_sums(SumsF a, SumsF b, SumsF c) { return _mm256_fmadd_ps(a, b, c); }
SSMZOO_INLINE SumsF to_floats(SumsI x) { return _mm256_cvtepi32_ps(reinterpret_cast<__m256i>(x)); }
SSMZOO_INLINE SumsI nearest(SumsF x) { return reinterpret_cast<SumsI>(_mm256_cvtps_epi32(x)); }
SSMZOO_INLINE __m256i vector_at(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

// The bytes of one block, or of two.
template <int blocks>
SSMZOO_INLINE __m256i bytes_at(const char* p) {
    if constexpr (blocks > 1) return vector_at(p);
    return _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
#elif defined(__x86_64__)
SSMZOO_INLINE SumsF fma_sums(SumsF a, SumsF b, SumsF c) { return fma(a, b, c); }
SSMZOO_INLINE SumsF to_floats(SumsI x) { return _mm_cvtepi32_ps(reinterpret_cast<__m128i>(x)); }
SSMZOO_INLINE SumsI nearest(SumsF x) { return reinterpret_cast<SumsI>(_mm_cvtps_epi32(x)); }
#elif defined(__aarch64__)
SSMZOO_INLINE SumsF fma_sums(SumsF a, SumsF b, SumsF c) { return fma(a, b, c); }
SSMZOO_INLINE SumsF to_floats(SumsI x) { return vcvtq_f32_s32(reinterpret_cast<int32x4_t>(x)); }
SSMZOO_INLINE SumsI nearest(SumsF x) { return reinterpret_cast<SumsI>(vcvtnq_s32_f32(x)); }
#else
SSMZOO_INLINE SumsF fma_sums(SumsF a, SumsF b, SumsF c) { return fma(a, b, c); }
SSMZOO_INLINE SumsF to_floats(SumsI x) {
    return SumsF{static_cast<float>(x[0]), static_cast<float>(x[1]), static_cast<float>(x[2]), static_cast<float>(x[3])};
}
SSMZOO_INLINE SumsI nearest(SumsF x) {
    SumsI to;
    for (int i = 0; i < kLanes; ++i) to[i] = static_cast<int32_t>(__builtin_lrintf(x[i]));
    return to;
}
#endif

SSMZOO_INLINE SumsF splat_sums(float x) { return SumsF{} + x; }

SSMZOO_INLINE SumsF sums_at(const float* p) {
    SumsF v;
    memcpy(&v, p, sizeof v);
    return v;
}

// A digit of kLanes inputs that follow each other, each within its type.
SSMZOO_INLINE void put_digits(SumsI digit, Digit* to) {
#if SSMZOO_VECTOR_BYTES >= 32
    const __m256i v = reinterpret_cast<__m256i>(digit);
    const __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packs_epi16(halves, halves));
#else
    for (int i = 0; i < kLanes; ++i) to[i] = static_cast<Digit>(digit[i]);
#endif
}

// Each of four totals' sum of its lanes.
SSMZOO_INLINE void sum_each(SumsF* totals, float* to) {
#if SSMZOO_VECTOR_BYTES >= 32
    const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(totals[0], totals[1]), _mm256_hadd_ps(totals[2], totals[3]));
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
#else
    store(to, sum_lanes<float, 4>(totals));
#endif
}

#if SSMZOO_VECTOR_BYTES >= 32 && SSMZOO_BYTE_PRODUCTS
SSMZOO_INLINE __m256i add_bytes(__m256i sums, __m256i weights, __m256i digits) {
#if SSMZOO_VECTOR_BYTES == 64
    return _mm256_dpbusd_epi32(sums, weights, digits);
#else
    return _mm256_dpbusd_avx_epi32(sums, weights, digits);
#endif
}

// One block, or two.
template <int blocks, int count>
SSMZOO_INLINE void add_blocks(const char* weights, const Digit (&digits)[count][kVectorInputs], __m256i (&sums)[count]) {
    const __m256i half = _mm256_set1_epi8(15), bytes = bytes_at<blocks>(weights);
    const __m256i low = _mm256_and_si256(bytes, half), high = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), half);
    for (int d = 0; d < count; ++d) {
        sums[d] = add_bytes(sums[d], low, vector_at(digits[d]));
        sums[d] = add_bytes(sums[d], high, vector_at(digits[d] + kVectorInputs / 2));
    }
}

// Sums of weights times x in their lanes, over so many blocks of inputs.
template <int blocks, int count>
SSMZOO_INLINE SumsF dot(const char* weights, const Whole<count>& x) {
    __m256i sums[count];
    for (int d = 0; d < count; ++d) sums[d] = _mm256_setzero_si256();
    add_blocks<(blocks > 1 ? 2 : 1)>(weights, x.digits[0], sums);
    if constexpr (blocks > 2) add_blocks<blocks - 2>(weights + kBlock, x.digits[1], sums);
    __m256i all = sums[0];
    for (int d = 1; d < count; ++d) all = _mm256_add_epi32(_mm256_slli_epi32(all, kDigitBits), sums[d]);
    return _mm256_cvtepi32_ps(all);
}
#elif SSMZOO_VECTOR_BYTES >= 32
template <int blocks, int count>
SSMZOO_INLINE SumsF dot(const char* weights, const Whole<count>& x) {
    const __m256i half = _mm256_set1_epi8(15), one = _mm256_set1_epi16(1), base = _mm256_set1_epi16(256);
    __m256i sums[count];
    for (int block = 0; block < blocks; block += 2, weights += kBlock) {
        const __m256i bytes = block + 1 < blocks ? bytes_at<2>(weights) : bytes_at<1>(weights);
        const __m256i low = _mm256_and_si256(bytes, half), high = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), half);
        for (int d = 0; d < count; ++d) {
            const Digit* digits = x.digits[block / 2][d];
            const __m256i both = _mm256_add_epi16(_mm256_maddubs_epi16(low, vector_at(digits)),
                                                  _mm256_maddubs_epi16(high, vector_at(digits + kVectorInputs / 2)));
            sums[d] = block == 0 ? both : _mm256_add_epi16(sums[d], both);
        }
    }
    if constexpr (count == 1) {
        return _mm256_cvtepi32_ps(_mm256_madd_epi16(sums[0], one));
    } else {
        const __m256i upper = _mm256_add_epi32(_mm256_madd_epi16(sums[0], base), _mm256_madd_epi16(sums[1], one));
        const __m256i all = _mm256_add_epi32(_mm256_slli_epi32(upper, 8), _mm256_madd_epi16(sums[2], one));
        return _mm256_cvtepi32_ps(all);
    }
}
#else
// Four sums of so many inputs hold no whole number of all digits: the lowest digit's are added as floats.
template <int count>
SSMZOO_INLINE SumsF join(SumsI* sums) {
    for (int d = 1; d + 1 < count; ++d) sums[d] += sums[d - 1] << kDigitBits;
    if (count == 1) return to_floats(sums[0]);
    return to_floats(sums[count - 2]) * splat_sums(1 << kDigitBits) + to_floats(sums[count - 1]);
}

template <int blocks, int count>
SSMZOO_INLINE SumsF dot(const char* weights, const Whole<count>& x) {
    SumsI sums[count];
#if defined(__x86_64__)
    const __m128i half = _mm_set1_epi8(15), zero = _mm_setzero_si128();
    for (int d = 0; d < count; ++d) sums[d] = SumsI{};
    for (int block = 0; block < blocks; ++block) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(weights) + block);
        const __m128i low = _mm_and_si128(bytes, half), high = _mm_and_si128(_mm_srli_epi16(bytes, 4), half);
        const __m128i weights_of[4] = {_mm_unpacklo_epi8(low, zero), _mm_unpackhi_epi8(low, zero),
                                       _mm_unpacklo_epi8(high, zero), _mm_unpackhi_epi8(high, zero)};
        for (int d = 0; d < count; ++d) {
            const __m128i* digits = reinterpret_cast<const __m128i*>(x.digits[block][d]);
            for (int i = 0; i < 4; ++i)
                sums[d] += reinterpret_cast<SumsI>(_mm_madd_epi16(weights_of[i], _mm_loadu_si128(digits + i)));
        }
    }
#elif defined(__aarch64__)
    const int8x16_t half = vdupq_n_s8(15);
#if SSMZOO_BYTE_PRODUCTS
    int32x4_t of[count];
    for (int d = 0; d < count; ++d) of[d] = vdupq_n_s32(0);
#else
    int16x8_t of[count];  // of up to 16 products each, which 16 bits hold
    for (int d = 0; d < count; ++d) of[d] = vdupq_n_s16(0);
#endif
    for (int block = 0; block < blocks; ++block) {
        const uint8x16_t bytes = vld1q_u8(reinterpret_cast<const uint8_t*>(weights) + 16 * block);
        const int8x16_t low = vandq_s8(vreinterpretq_s8_u8(bytes), half);
        const int8x16_t high = vreinterpretq_s8_u8(vshrq_n_u8(bytes, 4));
        for (int d = 0; d < count; ++d) {
            const int8x16_t first = vld1q_s8(x.digits[block][d]), second = vld1q_s8(x.digits[block][d] + 16);
#if SSMZOO_BYTE_PRODUCTS
            of[d] = vdotq_s32(vdotq_s32(of[d], low, first), high, second);
#else
            of[d] = vmlal_s8(of[d], vget_low_s8(low), vget_low_s8(first));
            of[d] = vmlal_high_s8(of[d], low, first);
            of[d] = vmlal_s8(of[d], vget_low_s8(high), vget_low_s8(second));
            of[d] = vmlal_high_s8(of[d], high, second);
#endif
        }
    }
#if SSMZOO_BYTE_PRODUCTS
    for (int d = 0; d < count; ++d) sums[d] = reinterpret_cast<SumsI>(of[d]);
#else
    for (int d = 0; d < count; ++d) sums[d] = reinterpret_cast<SumsI>(vpaddlq_s16(of[d]));
#endif
#else
    for (int d = 0; d < count; ++d) {
        sums[d] = SumsI{};
        for (int block = 0; block < blocks; ++block)
            for (int i = 0; i < 16; ++i) {
                const int byte = reinterpret_cast<const uint8_t*>(weights)[16 * block + i];
                sums[d][i % kLanes] += (byte & 15) * x.digits[block][d][i] + (byte >> 4) * x.digits[block][d][16 + i];
            }
    }
#endif
    return join<count>(sums);
}
#endif

}  // namespace SSMZOO_ISA
}  // namespace ssmzoo
