// What the matrix memory's kernels share.
#pragma once

#include "native/choose.h"
#include "native/math.h"
#include "native/parallel.h"
#include "native/tiles.h"

namespace ssmzoo {
namespace SSMZOO_ISA {

template <class S>
SSMZOO_INLINE typename Lanes<S>::V log_sigmoid(typename Lanes<S>::V f) {
    return -softplus<S>(-f);
}

// max(|sum|, exp(-m)) + ε of a scaled sum nᵀq: what outputs are divided by. Infinite where they are 0 to the last digit.
template <class S>
SSMZOO_INLINE typename Lanes<S>::V denominator(typename Lanes<S>::V sum, typename Lanes<S>::V m) {
    return larger<S>(absolute<S>(sum), exp<S>(-m)) + splat(S(1e-6));
}

}  // namespace SSMZOO_ISA
}  // namespace ssmzoo
