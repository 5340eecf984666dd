// Vectors whose lanes are taken from one of two others.
#pragma once

#include "vector.h"

namespace ssmzoo {
namespace SSMZOO_ISA {

// Lanes of a where the mask, a comparison's result, is set, those of b elsewhere.
template <class S>
SSMZOO_INLINE typename Lanes<S>::V choose(typename Lanes<S>::I mask, typename Lanes<S>::V a, typename Lanes<S>::V b) {
    return from_bits<S>((bits_of<S>(a) & mask) | (bits_of<S>(b) & ~mask));
}

// The larger of each two lanes; a where b is NaN, and NaN where a is (x86's max returns its second operand then).
template <class S>
SSMZOO_INLINE typename Lanes<S>::V larger(typename Lanes<S>::V a, typename Lanes<S>::V b) {
    return choose<S>(b > a, b, a);
}

#if SSMZOO_VECTOR_BYTES == 64
template <>
SSMZOO_INLINE VF larger<float>(VF a, VF b) {
    return _mm512_max_ps(b, a);
}
#elif SSMZOO_VECTOR_BYTES == 32
template <>
SSMZOO_INLINE VF larger<float>(VF a, VF b) {
    return _mm256_max_ps(b, a);
}
#endif

}  // namespace SSMZOO_ISA
}  // namespace ssmzoo
