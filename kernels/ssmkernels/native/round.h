// Whole vectors of results in half precision, rounded without a look at each: of bfloat16, one by one takes a tenth of a
// product's time, and most of a convolution's.
#pragma once

#include "half.h"

namespace ssmzoo {
namespace SSMZOO_ISA {

// As write, bit for bit.
template <class T>
SSMZOO_INLINE void write_rounded(T* p, typename Lanes<typename Sum<T>::type>::V v) {
    write(p, v);
}

// To nearest, ties to even, and one NaN for all.
#if SSMZOO_VECTOR_BYTES == 64
template <>
SSMZOO_INLINE void write_rounded(bfloat16* p, VF v) {
    const __m512i bits = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 none = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i halves = _mm512_mask_mov_epi32(_mm512_srli_epi32(up, 16), none, _mm512_set1_epi32(0x7fc0));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(halves));
}
#elif SSMZOO_VECTOR_BYTES == 32
template <>
SSMZOO_INLINE void write_rounded(bfloat16* p, VF v) {
    const __m256i bits = _mm256_castps_si256(v), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i none = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i halves = _mm256_blendv_epi8(_mm256_srli_epi32(up, 16), _mm256_set1_epi32(0x7fc0), none);
    const __m256i joined = _mm256_permute4x64_epi64(_mm256_packus_epi32(halves, halves), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(joined));
}
#endif

// The first `count` values of a vector.
template <class T>
SSMZOO_INLINE void write_some_rounded(T* p, typename Lanes<typename Sum<T>::type>::V v, int64_t count) {
    if (count >= Lanes<typename Sum<T>::type>::count) return write_rounded(p, v);
    write_some(p, v, count);
}

}  // namespace SSMZOO_ISA
}  // namespace ssmzoo
