// Squares of numbers turned over: rows become columns.
#pragma once

#include "vector.h"

namespace ssmzoo {
namespace SSMZOO_ISA {

// Exchanges the bit h of a number's row with that of its column, in all squares of 2 h by 2 h.
template <int h, class V, int... i>
SSMZOO_INLINE void exchange(V* v, Indices<i...>) {
    constexpr int count = sizeof...(i);
    for (int row = 0; row < count; ++row)
        if (!(row & h)) {
            const V a = v[row], b = v[row + h];
            v[row] = shuffle<(i & h ? count + i - h : i)...>(a, b);
            v[row + h] = shuffle<(i & h ? count + i : i + h)...>(a, b);
        }
}

// A square as wide as a vector turned over.
template <class S, int h = Lanes<S>::count / 2>
SSMZOO_INLINE void turn(typename Lanes<S>::V* v) {
    if constexpr (h > 0) {
        exchange<h>(v, typename Count<Lanes<S>::count>::type());
        turn<S, h / 2>(v);
    }
}

}  // namespace SSMZOO_ISA
}  // namespace ssmzoo
