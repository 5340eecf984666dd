// What the matrix memory's kernels share.
#pragma once

#include "native/choose.h"
#include "native/math.h"
#include "native/parallel.h"
#include "native/tiles.h"
#include "ssd/cpu_division.h"

namespace ssmzoo {
namespace SSMZOO_ISA {

template <class S>
SSMZOO_INLINE typename Lanes<S>::V log_sigmoid(typename Lanes<S>::V f) {
    return -softplus<S>(-f);
}

}  // namespace SSMZOO_ISA
}  // namespace ssmzoo
