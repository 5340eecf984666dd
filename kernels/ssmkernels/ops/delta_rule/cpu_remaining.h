// One decay for a whole head, which its state need not be multiplied by at each token.
#pragma once

#include "native/math.h"

namespace ssmzoo {
namespace SSMZOO_ISA {

// A number that a head's state still has to be multiplied by: what the tokens so far have left of it.
template <class S>
struct Remaining {
    static constexpr S least = S(1) / 65536, most = 65536;
    static constexpr S large = S(sizeof(S) == 4 ? 1e30 : 1e300);  // what is written, over the least, must not overflow

    S factor = S(1);

    // Takes one more decay; returns what to multiply the state by now, 1 for most tokens.
    S take(S decay) {
        const S product = factor * decay;
        const bool kept = product >= least && product <= most;  // neither 0 nor NaN
        factor = kept ? product : S(1);
        return kept ? S(1) : product;
    }
};

// Whether a number of N vectors is beyond `limit`, by its size.
template <class S, int N>
SSMZOO_INLINE bool beyond(const typename Lanes<S>::V* x, S limit) {
    auto found = absolute<S>(x[0]) > splat(limit);
    for (int n = 1; n < N; ++n) found |= absolute<S>(x[n]) > splat(limit);
    uint64_t parts[sizeof found / sizeof(uint64_t)], any = 0;
    memcpy(parts, &found, sizeof found);
    for (const uint64_t part : parts) any |= part;
    return any != 0;
}

}  // namespace SSMZOO_ISA
}  // namespace ssmzoo
