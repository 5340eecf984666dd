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

// The larger of each two lanes; NaN where a has it.
template <class S>
SSMZOO_INLINE typename Lanes<S>::V larger(typename Lanes<S>::V a, typename Lanes<S>::V b) {
    return choose<S>(b > a, b, a);
}

}  // namespace SSMZOO_ISA
}  // namespace ssmzoo
