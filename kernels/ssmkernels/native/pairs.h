// Activations of any dtype as rows of the dtype that sums are kept in, and back, two vectors at a time.
#pragma once

#include "half.h"

namespace ssmzoo {
namespace SSMZOO_ISA {

// Two vectors side by side.
template <class T>
SSMZOO_INLINE void write_pair(T* p, typename Lanes<typename Sum<T>::type>::V v,
                              typename Lanes<typename Sum<T>::type>::V w) {
    write(p, v);
    write(p + Lanes<typename Sum<T>::type>::count, w);
}

#if SSMZOO_VECTOR_BYTES >= 32
#if SSMZOO_VECTOR_BYTES == 64
typedef uint16_t Words __attribute__((vector_size(SSMZOO_VECTOR_BYTES)));

template <int... i>
SSMZOO_INLINE Words upper_halves(Bits a, Bits b, Indices<i...>) {
    return shuffle<(2 * i + 1)...>(reinterpret_cast<Words>(a), reinterpret_cast<Words>(b));
}
#endif

// As one by one, in two thirds of the instructions: both are asked for NaN at once, which is rare.
SSMZOO_INLINE Bits rounded_above(VF v) {
    const Bits bits = reinterpret_cast<Bits>(v);
    return bits + 0x7fff + ((bits >> 16) & 1);  // the upper half counts
}

template <>
SSMZOO_INLINE void write_pair(bfloat16* p, VF v, VF w) {
#if SSMZOO_VECTOR_BYTES == 64
    const bool unordered = _mm512_cmp_ps_mask(v, w, _CMP_UNORD_Q) != 0;
#else
    const bool unordered = _mm256_movemask_ps(_mm256_cmp_ps(v, w, _CMP_UNORD_Q)) != 0;
#endif
    if (__builtin_expect(unordered, 0)) {
        write(p, v);
        return write(p + Lanes<float>::count, w);
    }
    const Bits first = rounded_above(v), second = rounded_above(w);
#if SSMZOO_VECTOR_BYTES == 64
    const auto joined = upper_halves(first, second, typename Count<2 * Lanes<float>::count>::type());
#else
    const __m256i words = _mm256_packus_epi32(reinterpret_cast<__m256i>(first >> 16),
                                              reinterpret_cast<__m256i>(second >> 16));
    const __m256i joined = _mm256_permute4x64_epi64(words, 0xd8);
#endif
    memcpy(p, &joined, sizeof joined);
}
#endif

// Numbers that follow one another, of the dtype that sums are kept in.
template <class T>
SSMZOO_INLINE void write_row(T* p, const typename Sum<T>::type* from, int64_t count) {
    constexpr int64_t lanes = Lanes<typename Sum<T>::type>::count;
    int64_t i = 0;
    for (; i + 2 * lanes <= count; i += 2 * lanes) write_pair(p + i, load(from + i), load(from + i + lanes));
    for (; i + lanes <= count; i += lanes) write(p + i, load(from + i));
    if (i < count) write_some(p + i, load_some(from + i, count - i), count - i);
}

template <class T>
SSMZOO_INLINE void read_row(typename Sum<T>::type* to, const T* from, int64_t count) {
    constexpr int64_t lanes = Lanes<typename Sum<T>::type>::count;
    int64_t i = 0;
    for (; i + lanes <= count; i += lanes) store(to + i, read(from + i));
    for (; i < count; ++i) to[i] = widen(from[i]);
}

}  // namespace SSMZOO_ISA
}  // namespace ssmzoo
