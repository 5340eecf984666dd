// e^x that never overflows: finite_exp of ssmkernels.core.finite.
#pragma once

#include "math.h"

namespace ssmzoo {
namespace SSMZOO_ISA {

// With x cut off at 88 in float, 709 in double; e^x is 0 long before the lower limit.
template <class S>
SSMZOO_INLINE typename Lanes<S>::V finite_exp(typename Lanes<S>::V x) {
    const auto most = splat<S>(S(sizeof(S) == 4 ? 88 : 709));
    return exp<S>(clamp(x, -most - most, most));
}

}  // namespace SSMZOO_ISA
}  // namespace ssmzoo
