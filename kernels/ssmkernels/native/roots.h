// The square root, and e^x - 1, on vectors.
#pragma once

#include "math.h"

namespace ssmzoo {
namespace SSMZOO_ISA {

#if SSMZOO_VECTOR_BYTES == 64
SSMZOO_INLINE VF square_root(VF x) { return _mm512_sqrt_ps(x); }
SSMZOO_INLINE VD square_root(VD x) { return _mm512_sqrt_pd(x); }
#elif SSMZOO_VECTOR_BYTES == 32
SSMZOO_INLINE VF square_root(VF x) { return _mm256_sqrt_ps(x); }
SSMZOO_INLINE VD square_root(VD x) { return _mm256_sqrt_pd(x); }
#elif defined(__x86_64__)
SSMZOO_INLINE VF square_root(VF x) { return _mm_sqrt_ps(x); }
SSMZOO_INLINE VD square_root(VD x) { return _mm_sqrt_pd(x); }
#elif defined(__aarch64__)
SSMZOO_INLINE VF square_root(VF x) { return vsqrtq_f32(x); }
SSMZOO_INLINE VD square_root(VD x) { return vsqrtq_f64(x); }
#else
SSMZOO_INLINE VF square_root(VF x) {
    for (int i = 0; i < Lanes<float>::count; ++i) x[i] = __builtin_sqrtf(x[i]);
    return x;
}
SSMZOO_INLINE VD square_root(VD x) {
    for (int i = 0; i < Lanes<double>::count; ++i) x[i] = __builtin_sqrt(x[i]);
    return x;
}
#endif

// e^x - 1, in float to a few ulp: where x is small, the part of exp's polynomial beyond 1.
template <class S>
SSMZOO_INLINE typename Lanes<S>::V expm1(typename Lanes<S>::V x) {
    const auto f = clamp(x * splat<S>(Constants<S>::log2e), splat<S>(S(-1)), splat<S>(S(1)));
    const auto near = polynomial<S>(Constants<S>::exp2, f) * f;
    return absolute<S>(f) <= splat<S>(S(0.5)) ? near : exp<S>(x) - splat<S>(S(1));
}

}  // namespace SSMZOO_ISA
}  // namespace ssmzoo
