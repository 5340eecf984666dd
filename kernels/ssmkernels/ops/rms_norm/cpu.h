// What root-mean-square normalisation's forward and backward passes share: arguments, and the value that is normalised.
#pragma once

#include "native/math.h"
#include "native/parallel.h"
#include "native/tiles.h"

namespace ssmzoo {

// Strides count elements; the last axis is contiguous. T is x's dtype, S its precision, R the residual's.
struct NormArguments {
    const void *x, *weight, *gate, *residual;  // T: (rows d) or null; S: (d); T: (rows d) or null; R: (rows d) or null
    void *y, *summed;                          // T: (rows d); R: (rows d) where there is a residual
    int64_t dtype, residual_wide, rows, d, group, gate_first, threads;
    int64_t x_row, gate_row, residual_row;
    double eps;
};

namespace SSMZOO_ISA {

constexpr int64_t kRows = 16;  // a task's

// r, times silu(gate) where the gate comes first: what is normalised, for the channels from c on.
template <class T, class R>
SSMZOO_INLINE typename Lanes<typename Sum<T>::type>::V inside(const R* r, const T* gate, bool gate_first, int64_t c,
                                                              int64_t count) {
    typedef typename Sum<T>::type S;
    const auto v = read_some(r + c, count);
    return gate && gate_first ? v * silu<S>(read_some(gate + c, count)) : v;
}

// The sum of a vector's lanes, in an order of its own.
template <class S>
SSMZOO_INLINE S sum_of(typename Lanes<S>::V v) {
    return sum_lanes<S, 1>(&v)[0];
}

// 1 / sqrt(mean + eps)
template <class S>
SSMZOO_INLINE S inverse_root(S sum, int64_t count, double eps) {
    return S(1) / __builtin_sqrt(sum / S(count) + S(eps));
}

template <>
SSMZOO_INLINE float inverse_root(float sum, int64_t count, double eps) {
    return 1.0f / __builtin_sqrtf(sum / static_cast<float>(count) + static_cast<float>(eps));
}

// v / sqrt(mean(v^2) + eps) * weight over the `count` channels of a group, with v as above; the gate comes after where
// it does not come first.
template <class T, class R>
SSMZOO_INLINE void norm_group(const R* r, const T* gate, bool gate_first, const typename Sum<T>::type* weight, T* y,
                              int64_t count, double eps) {
    typedef typename Sum<T>::type S;
    using V = typename Lanes<S>::V;
    V squares = {};
    for (int64_t c = 0; c < count; c += Lanes<S>::count) {
        const V v = inside<T>(r, gate, gate_first, c, count - c);
        squares = fma(v, v, squares);
    }
    const V scale = splat(inverse_root<S>(sum_of<S>(squares), count, eps));
    for (int64_t c = 0; c < count; c += Lanes<S>::count) {
        V v = inside<T>(r, gate, gate_first, c, count - c) * scale * read_some(weight + c, count - c);
        if (gate && !gate_first) v = v * silu<S>(read_some(gate + c, count - c));
        write_some(y + c, v, count - c);
    }
}

}  // namespace SSMZOO_ISA
}  // namespace ssmzoo
