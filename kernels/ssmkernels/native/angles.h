// Sines and cosines of angles that are counted in turns.
#pragma once

#include "math.h"

namespace ssmzoo {
namespace SSMZOO_ISA {

template <class S>
struct Turn;

// sin(2 pi x) = x p(x^2) and cos(2 pi x) = p(x^2) for |x| <= 1/8: Taylor's series, to less than a rounding.
template <>
struct Turn<float> {
    static constexpr float sine[] = {6.283185307f, -41.34170224f, 81.60524928f, -76.70585975f, 42.05869394f};
    static constexpr float cosine[] = {1.f, -19.7392088f, 64.93939402f, -85.45681720f, 60.24464137f};
};

template <>
struct Turn<double> {
    static constexpr double sine[] = {6.283185307179586,  -41.341702240399755, 81.60524927607504,  -76.70585975306136,
                                      42.058693944897634, -15.094642576822984, 3.8199525848482803, -0.718122301778500};
    static constexpr double cosine[] = {1.0,
                                        -19.739208802178716,
                                        64.93939402266829,
                                        -85.45681720669371,
                                        60.24464137187666,
                                        -26.426256783374388,
                                        7.903536371318466,
                                        -1.714390711088671,
                                        0.282005968455791};
};

// x less its nearest whole number.
template <class S>
SSMZOO_INLINE typename Lanes<S>::V within_a_turn(typename Lanes<S>::V x) {
    // Beyond 2^22 (2^51) a number has no more than the magic one's digits, and only whole turns
    const auto magic = splat(Constants<S>::magic);
    return x - ((x + magic) - magic);
}

// Sine and cosine of x turns, -1/2 <= x <= 1/2.
template <class S>
SSMZOO_INLINE void sine_cosine(typename Lanes<S>::V x, S* sine, S* cosine) {
    const auto magic = splat(Constants<S>::magic);
    const auto shifted = x * splat(S(4)) + magic;  // its low bits count quarters
    const auto f = fma(shifted - magic, splat(S(-0.25)), x), f2 = f * f;
    const auto s = f * polynomial<S>(Turn<S>::sine, f2), c = polynomial<S>(Turn<S>::cosine, f2);
    const auto quarter = bits_of<S>(shifted);
    const auto odd = -(quarter & 1);  // all bits of a lane, or none
    constexpr int sign = sizeof(S) * 8 - 2;
    const auto select = [&](auto mask, auto a, auto b) {
        return from_bits<S>((bits_of<S>(a) & mask) | (bits_of<S>(b) & ~mask));
    };
    const auto negated = [&](auto value, auto count) {  // where the second bit of `count` is set
        return from_bits<S>(bits_of<S>(value) ^ ((count & 2) << sign));
    };
    store(sine, negated(select(odd, c, s), quarter));
    store(cosine, negated(select(odd, s, c), quarter + 1));
}

}  // namespace SSMZOO_ISA
}  // namespace ssmzoo
