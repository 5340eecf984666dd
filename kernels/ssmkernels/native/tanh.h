// tanh on vectors.
#pragma once

#include "math.h"

namespace ssmzoo {
namespace SSMZOO_ISA {

// tanh, to a few ulp: (e^2x - 1) / (e^2x + 1), where e^2x - 1 is never the difference of two near numbers.
template <class S>
SSMZOO_INLINE typename Lanes<S>::V tanh(typename Lanes<S>::V x) {
    using C = Constants<S>;
    using V = typename Lanes<S>::V;
    constexpr bool wide = sizeof(S) == 8;
    constexpr int terms = wide ? 13 : 7;
    const auto sign = bits_of<S>(x) & bits_of<S>(splat<S>(S(-0.0)));
    V y = clamp(absolute<S>(x), V{}, splat<S>(S(wide ? 20 : 10)));
    y = y + y;
    const V shifted = y * splat<S>(C::log2e) + splat<S>(C::magic);
    const V k = shifted - splat<S>(C::magic);
    const V r = fma(k, splat<S>(-C::ln2_low), fma(k, splat<S>(-C::ln2_high), y));
    V p = splat<S>(S(1));  // e^r - 1 = r (1 + r/2 (1 + r/3 (...)))
    for (int i = terms; i > 1; --i) p = fma(p, r * splat<S>(S(1) / S(i)), splat<S>(S(1)));
    p = p * r;
    const V power = from_bits<S>((bits_of<S>(shifted) << C::mantissa) + bits_of<S>(splat<S>(S(1))));
    const V less = fma(power, p, power - splat<S>(S(1)));
    return from_bits<S>(bits_of<S>(less / (less + splat<S>(S(2)))) | sign);
}

}  // namespace SSMZOO_ISA
}  // namespace ssmzoo
