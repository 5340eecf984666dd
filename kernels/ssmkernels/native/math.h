// exp2, exp, softplus, sigmoid on vectors, by polynomials: weighted minimax fits for float, Taylor's for double.
#pragma once

#include "vector.h"

namespace ssmzoo {
namespace SSMZOO_ISA {

template <class S>
struct Constants;

template <>
struct Constants<float> {
    static constexpr float log2e = 1.44269504f;
    static constexpr float ln2_high = 0.693145752f, ln2_low = 1.42860677e-6f;  // few bits: k * high is exact
    static constexpr float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    static constexpr int mantissa = 23, bias = 127;
    // 2^f = 1 + f q(f) on [-1/2, 1/2], to 9e-8; 2 atanh(s) = 2 s + s^3 q(s^2) for s^2 <= 1/9, to 1e-10.
    static constexpr float exp2[] = {0.6931469776f, 0.24022242077f, 0.055507337424f, 0.009671513114f, 0.001326472817f};
    static constexpr float atanh[] = {0.66666675622f, 0.39998877731f, 0.28616885148f, 0.2142765385f, 0.2430095048f};
};

template <>
struct Constants<double> {
    static constexpr double log2e = 1.4426950408889634;
    static constexpr double ln2_high = 0.6931471803691238, ln2_low = 1.9082149292705877e-10;
    static constexpr double magic = 6755399441055744.0;
    static constexpr int mantissa = 52, bias = 1023;
    // ln(2)^k / k!, and 2 / (2 k + 3)
    static constexpr double exp2[] = {
        0.6931471805599453, 0.2402265069591007, 0.05550410866482158, 0.009618129107628477, 0.0013333558146428443,
        0.0001540353039338161, 1.5252733804059841e-05, 1.3215486790144307e-06, 1.0178086009239701e-07,
        7.0549116208011234e-09, 4.4455382718708116e-10, 2.5678435993488204e-11, 1.3691488853904128e-12};
    static constexpr double atanh[] = {2. / 3,  2. / 5,  2. / 7,  2. / 9,  2. / 11, 2. / 13, 2. / 15, 2. / 17,
                                       2. / 19, 2. / 21, 2. / 23, 2. / 25, 2. / 27, 2. / 29, 2. / 31, 2. / 33};
};

// c_0 + c_1 x + c_2 x^2 + ...
template <class S, int N>
SSMZOO_INLINE typename Lanes<S>::V polynomial(const S (&c)[N], typename Lanes<S>::V x) {
    auto p = splat<S>(c[N - 1]);
    for (int i = N - 2; i >= 0; --i) p = fma(p, x, splat<S>(c[i]));
    return p;
}

// |x| up to which exp2_product may do without its guards.
template <class S>
constexpr S exp2_safe = S(Constants<S>::bias - 2);

// 2^(x y), in float to 2 ulp: the product is never rounded.
//
// Guarded: for every x and y, NaN and infinity included; results below the normal numbers may come as 0. Otherwise for
// |x y| <= exp2_safe alone. Both give the same bits where both may be used.
template <class S, bool guarded>
SSMZOO_INLINE typename Lanes<S>::V exp2_product(typename Lanes<S>::V x, typename Lanes<S>::V y) {
    using C = Constants<S>;
    using V = typename Lanes<S>::V;
    V product = x * y;
    if (guarded) product = clamp(product, splat<S>(S(-C::bias)), splat<S>(S(C::bias + 1)));
    const V shifted = product + splat<S>(C::magic);  // its low bits are the nearest integer k
    const V k = shifted - splat<S>(C::magic);
    V f = fma(x, y, -k);
    if (guarded) f = clamp(f, splat<S>(S(-1)), splat<S>(S(1)));
    const V p = fma(polynomial<S>(C::exp2, f), f, splat<S>(S(1)));
    const auto exponent = bits_of<S>(shifted) << C::mantissa;
    if (!guarded) return from_bits<S>(bits_of<S>(p) + exponent);
    return p * from_bits<S>(exponent + bits_of<S>(splat<S>(S(1))));
}

// e^x for every x, in float to 2 ulp; infinity from 88.4 on.
template <class S>
SSMZOO_INLINE typename Lanes<S>::V exp(typename Lanes<S>::V x) {
    using C = Constants<S>;
    using V = typename Lanes<S>::V;
    const V limit = splat<S>(S(C::bias + 1));
    const V scaled = clamp(x * splat<S>(C::log2e), splat<S>(S(-C::bias)), limit);
    const V shifted = scaled + splat<S>(C::magic);
    const V k = shifted - splat<S>(C::magic);
    V r = fma(k, splat<S>(-C::ln2_low), fma(k, splat<S>(-C::ln2_high), x));
    r = clamp(r, splat<S>(S(-1)), splat<S>(S(1)));
    const V f = r * splat<S>(C::log2e);
    const V p = fma(polynomial<S>(C::exp2, f), f, splat<S>(S(1)));
    const auto exponent = bits_of<S>(shifted) << C::mantissa;
    return p * from_bits<S>(exponent + bits_of<S>(splat<S>(S(1))));
}

// ln(1 + e^x) = max(x, 0) + ln(1 + e^-|x|); the logarithm is 2 atanh(s) of s = e / (2 + e).
template <class S>
SSMZOO_INLINE typename Lanes<S>::V softplus(typename Lanes<S>::V x) {
    const auto e = exp<S>(-absolute<S>(x));
    const auto s = e / (e + splat<S>(S(2)));
    const auto s2 = s * s;
    const auto log = fma(polynomial<S>(Constants<S>::atanh, s2) * s2, s, s + s);
    const auto positive = from_bits<S>(bits_of<S>(x) & (x > splat<S>(S(0))));
    return positive + log;
}

template <class S>
SSMZOO_INLINE typename Lanes<S>::V sigmoid(typename Lanes<S>::V x) {
    return splat<S>(S(1)) / (exp<S>(-x) + splat<S>(S(1)));
}

template <class S>
SSMZOO_INLINE typename Lanes<S>::V silu(typename Lanes<S>::V x) {
    return x / (exp<S>(-x) + splat<S>(S(1)));
}

}  // namespace SSMZOO_ISA
}  // namespace ssmzoo
