// What states are made of: real numbers, or complex ones. The scan's kernels are templates over one of the two.
//
// A complex number lies in memory as PyTorch has it, two reals side by side: (d n) of them are (d 2n) reals. All code
// that only moves numbers knows no difference, its n counts reals. In scratch memory, (n 64), a number's reals are rows
// one after the other, and a lane is a channel.
//
// Gradients are those of Wirtinger, d/dx: the same formulas as for real numbers. PyTorch's are their conjugates.
#pragma once

#include "native/math.h"
#include "native/tiles.h"

namespace ssmzoo {
namespace SSMZOO_ISA {

template <class S>
struct ComplexLanes {
    typename Lanes<S>::V re, im;
};

template <class S>
SSMZOO_INLINE ComplexLanes<S> operator*(ComplexLanes<S> a, ComplexLanes<S> b) {
    return {fma(-a.im, b.im, a.re * b.re), fma(a.im, b.re, a.re * b.im)};
}

template <class S>
SSMZOO_INLINE ComplexLanes<S> operator*(typename Lanes<S>::V a, ComplexLanes<S> b) {
    return {a * b.re, a * b.im};
}

template <class S>
SSMZOO_INLINE ComplexLanes<S> fma(ComplexLanes<S> a, ComplexLanes<S> b, ComplexLanes<S> c) {
    return {fma(a.re, b.re, fma(-a.im, b.im, c.re)), fma(a.re, b.im, fma(a.im, b.re, c.im))};
}

template <class S>
SSMZOO_INLINE ComplexLanes<S> fma(ComplexLanes<S> a, typename Lanes<S>::V b, ComplexLanes<S> c) {
    return {fma(a.re, b, c.re), fma(a.im, b, c.im)};
}

// The real part of a b, plus c.
SSMZOO_INLINE VF fma_real(VF a, VF b, VF c) { return fma(a, b, c); }
SSMZOO_INLINE VD fma_real(VD a, VD b, VD c) { return fma(a, b, c); }

template <class S>
SSMZOO_INLINE typename Lanes<S>::V fma_real(ComplexLanes<S> a, ComplexLanes<S> b, typename Lanes<S>::V c) {
    return fma(a.re, b.re, fma(-a.im, b.im, c));
}

// sin and cos of half turns, by polynomials in the square that hold within a little more than half of one: minimax fits
// for float, Taylor's for double.
template <class S>
struct HalfTurns;

template <>
struct HalfTurns<float> {
    static constexpr float per_radian = 0.318309873f, per_radian_low = 1.28412766e-8f;
    static constexpr float safe = 65536;  // up to here a product's rounding is little of one; from 2^22 on all of it
    static constexpr float cos[] = {-4.934802055f, 4.05870533f, -1.335161924f, 0.2346880436f, -0.02397594973f};
    static constexpr float sin[] = {3.141592741f, -5.167713642f, 2.550114393f, -0.598435998f, 0.07784495503f};
};

template <>
struct HalfTurns<double> {
    static constexpr double per_radian = 0.3183098861837907, per_radian_low = -1.9678676675182487e-17;
    static constexpr double safe = 35184372088832;  // 2^45; as above, from 2^51 on
    // (-1)^k pi^2k / (2k)!, and (-1)^k pi^(2k + 1) / (2k + 1)!
    static constexpr double cos[] = {-4.934802200544679,      4.058712126416768,      -1.3352627688545895,
                                     0.2353306303588932,      -0.02580689139001406,   0.001929574309403923,
                                     -0.00010463810492484571, 4.303069587032947e-6,   -1.3878952462213772e-7,
                                     3.6047307974625009e-9,   -7.7007071306013534e-11, 1.3768647280377414e-12};
    static constexpr double sin[] = {3.1415926535897932,     -5.16771278004997,      2.5501640398773454,
                                     -0.59926452932079208,   0.082145886611128229,   -0.0073704309457143508,
                                     0.00046630280576761256, -2.1915353447830216e-5, 7.9520540014755128e-7,
                                     -2.2948428997269873e-8, 5.3926646626081285e-10, -1.0518471716932064e-11};
};

template <class S_>
struct Real {
    typedef S_ S;
    typedef typename Lanes<S>::V V;
    typedef V Number;
    typedef V Rate;  // what decay takes of A
    static constexpr int parts = 1, rate_parts = 1;
    static constexpr int forward_states = 8, backward_states = 4;  // in registers at a time
    static constexpr bool often = sizeof(S) == sizeof(float);      // run where speed counts

    // A vector's reals lie `stride` apart.
    static SSMZOO_INLINE Number load(const S* p, int64_t) { return SSMZOO_ISA::load(p); }
    static SSMZOO_INLINE void store(S* p, int64_t, Number x) { SSMZOO_ISA::store(p, x); }
    static SSMZOO_INLINE Rate load_rate(const S* p) { return SSMZOO_ISA::load(p); }
    static SSMZOO_INLINE void store_rate(S* p, Rate x) { SSMZOO_ISA::store(p, x); }

    // One number of a tensor in all lanes; up to as many numbers of a tensor as there are lanes, 0 beyond.
    static SSMZOO_INLINE Number splat(const S* p) { return SSMZOO_ISA::splat<S>(*p); }
    static SSMZOO_INLINE Number read_some(const S* p, int64_t count) { return SSMZOO_ISA::read_some(p, count); }
    static SSMZOO_INLINE void write_some(S* p, Number x, int64_t count) { SSMZOO_ISA::write_some(p, x, count); }

    static SSMZOO_INLINE void split(Number x, V* parts) { parts[0] = x; }

    static SSMZOO_INLINE Rate rate(Number A) { return A * SSMZOO_ISA::splat<S>(Constants<S>::log2e); }

    // The rate's size: dt times it must stay within exp2_safe for decay to go unguarded.
    static SSMZOO_INLINE V reach(Rate r) { return absolute<S>(r); }

    template <bool guarded>
    static SSMZOO_INLINE Number decay(V dt, Rate r) {
        return exp2_product<S, guarded>(dt, r);
    }
};

template <class S_>
struct Complex {
    typedef S_ S;
    typedef typename Lanes<S>::V V;
    typedef ComplexLanes<S> Number;
    static constexpr int parts = 2, rate_parts = 3;
    static constexpr int forward_states = 4, backward_states = 2;
    static constexpr bool often = sizeof(S) == sizeof(float);
    static constexpr int lanes = Lanes<S>::count;

    struct Rate {
        V log2, turns, turns_low;  // half turns, more exactly than one number holds them
    };

    static SSMZOO_INLINE Number load(const S* p, int64_t stride) {
        return {SSMZOO_ISA::load(p), SSMZOO_ISA::load(p + stride)};
    }

    static SSMZOO_INLINE void store(S* p, int64_t stride, Number x) {
        SSMZOO_ISA::store(p, x.re);
        SSMZOO_ISA::store(p + stride, x.im);
    }

    static SSMZOO_INLINE Rate load_rate(const S* p) {
        return {SSMZOO_ISA::load(p), SSMZOO_ISA::load(p + kTile), SSMZOO_ISA::load(p + 2 * kTile)};
    }

    static SSMZOO_INLINE void store_rate(S* p, Rate x) {
        SSMZOO_ISA::store(p, x.log2);
        SSMZOO_ISA::store(p + kTile, x.turns);
        SSMZOO_ISA::store(p + 2 * kTile, x.turns_low);
    }

    static SSMZOO_INLINE Number splat(const S* p) { return {SSMZOO_ISA::splat<S>(p[0]), SSMZOO_ISA::splat<S>(p[1])}; }

    static SSMZOO_INLINE Number read_some(const S* p, int64_t count) {
        const typename Count<lanes>::type indices;
        const V low = SSMZOO_ISA::read_some(p, 2 * count);
        const V high = 2 * count > lanes ? SSMZOO_ISA::read_some(p + lanes, 2 * count - lanes) : V{};
        return {every_second<0>(low, high, indices), every_second<1>(low, high, indices)};
    }

    static SSMZOO_INLINE void write_some(S* p, Number x, int64_t count) {
        const typename Count<lanes>::type indices;
        SSMZOO_ISA::write_some(p, in_turn<0>(x.re, x.im, indices), 2 * count);
        if (2 * count > lanes)
            SSMZOO_ISA::write_some(p + lanes, in_turn<lanes / 2>(x.re, x.im, indices), 2 * count - lanes);
    }

    static SSMZOO_INLINE void split(Number x, V* parts) {
        parts[0] = x.re;
        parts[1] = x.im;
    }

    static SSMZOO_INLINE Rate rate(Number A) {
        const V per_radian = SSMZOO_ISA::splat<S>(HalfTurns<S>::per_radian), turns = A.im * per_radian;
        const V rest = fma(A.im, per_radian, -turns);
        const V turns_low = fma(A.im, SSMZOO_ISA::splat<S>(HalfTurns<S>::per_radian_low), rest);
        return {A.re * SSMZOO_ISA::splat<S>(Constants<S>::log2e), turns, turns_low};
    }

    static SSMZOO_INLINE V reach(Rate r) {
        const V turns = absolute<S>(r.turns) * SSMZOO_ISA::splat<S>(exp2_safe<S> / HalfTurns<S>::safe);
        return absolute<S>(r.log2) + turns;
    }

    template <bool guarded>
    static SSMZOO_INLINE Number decay(V dt, Rate r) {
        const V magic = SSMZOO_ISA::splat<S>(Constants<S>::magic);
        const V shifted = dt * r.turns + magic;  // its low bits are the nearest integer k
        const V k = shifted - magic;
        V f = fma(dt, r.turns_low, fma(dt, r.turns, -k));
        if (guarded) f = clamp(f, SSMZOO_ISA::splat<S>(S(-1)), SSMZOO_ISA::splat<S>(S(1)));
        const V square = f * f;
        const V cos = fma(polynomial<S>(HalfTurns<S>::cos, square), square, SSMZOO_ISA::splat<S>(S(1)));
        const V sin = polynomial<S>(HalfTurns<S>::sin, square) * f;
        const V size = exp2_product<S, guarded>(dt, r.log2);
        // An odd number of half turns is a change of sign
        const V signed_size = from_bits<S>(bits_of<S>(size) ^ (bits_of<S>(shifted) << (8 * sizeof(S) - 1)));
        return {signed_size * cos, signed_size * sin};
    }

  private:
    template <int first, int... i>
    static SSMZOO_INLINE V every_second(V a, V b, Indices<i...>) {
        return shuffle<(2 * i + first)...>(a, b);
    }

    template <int first, int... i>
    static SSMZOO_INLINE V in_turn(V a, V b, Indices<i...>) {
        return shuffle<((i & 1) * lanes + first + i / 2)...>(a, b);
    }
};

// f(count, first) for groups of states one after another: as many at once as `most`, a power of two, then a quarter of
// them, and one at last.
template <int states>
struct Together {
    static constexpr int value = states;
};

template <int most, class F>
SSMZOO_INLINE void in_groups(int64_t states, const F& f, int64_t first = 0) {
    for (; first + most <= states; first += most) f(Together<most>(), first);
    if constexpr (most > 1) in_groups<(most < 4 ? 1 : most / 4)>(states, f, first);
}

}  // namespace SSMZOO_ISA
}  // namespace ssmzoo
