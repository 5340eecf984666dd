// The transform of the long convolution, of as many channels at a time as a vector has lanes.
//
// Two sequences of 2 M real numbers are multiplied as polynomials modulo z^2M + 1: as on a circle of 2 M points, but
// what comes round has its sign turned. That ring is two copies, conjugate to one another, of the complex polynomials
// modulo z^M - i, where a real sequence x has the coefficients x_j + i x_{j+M}. So M complex points do for 2 M real
// ones, and zeros beyond the first M cost nothing.
//
// A node with modulus z^m - c falls into four with z^(m/4) - r i^k, r^4 = c, k = 0 to 3:
//
//     x_k = a_0 + (r i^k) a_1 + (r i^k)^2 a_2 + (r i^k)^3 a_3,      a_0 to a_3 the quarters of its coefficients
//
// until 1, 2 or 3 points are left, which fall apart into single ones. The roots are the same for all points of a node,
// and belong to the tree alone: node h has the children 4 h + 1 + k, and node 0 is z^M - i. The order in which values
// come out is that of the leaves; products do not ask for it, and the way back takes it as it is.
#pragma once

#include "native/parallel.h"
#include "native/tiles.h"

namespace ssmzoo {
namespace SSMZOO_ISA {

template <class S>
struct Complex {
    typename Lanes<S>::V re, im;
};

template <class S>
SSMZOO_INLINE Complex<S> operator+(Complex<S> a, Complex<S> b) {
    return {a.re + b.re, a.im + b.im};
}

template <class S>
SSMZOO_INLINE Complex<S> operator-(Complex<S> a, Complex<S> b) {
    return {a.re - b.re, a.im - b.im};
}

template <class S>
SSMZOO_INLINE Complex<S> operator*(Complex<S> a, Complex<S> b) {
    return {fma(a.re, b.re, -(a.im * b.im)), fma(a.re, b.im, a.im * b.re)};
}

// a times the conjugate of b
template <class S>
SSMZOO_INLINE Complex<S> times_conjugate(Complex<S> a, Complex<S> b) {
    return {fma(a.re, b.re, a.im * b.im), fma(a.im, b.re, -(a.re * b.im))};
}

template <class S>
SSMZOO_INLINE Complex<S> times_i(Complex<S> a) {
    return {-a.im, a.re};
}

// The k-th of some complex constants, in all lanes.
template <class S>
SSMZOO_INLINE Complex<S> constant(const S* from, int64_t k) {
    return {splat(from[2 * k]), splat(from[2 * k + 1])};
}

// What a transform needs: roots r, r^2, r^3 of each node, and r, r^2 with r^3 = c of each leaf of 3 points.
template <class S>
struct Roots {
    const S *quarters, *thirds;
    int64_t first_leaf;  // the number of the leftmost node of 3 points
};

constexpr int64_t kNear = 256;  // points of a node that stays in the first cache

// The four quarters' points at one place, to the four children's and back; the way back is four times the inverse.
template <class S>
SSMZOO_INLINE void split4(Complex<S>* a, Complex<S> r1, Complex<S> r2, Complex<S> r3) {
    const Complex<S> t1 = a[1] * r1, t2 = a[2] * r2, t3 = a[3] * r3;
    const Complex<S> even = a[0] + t2, other = a[0] - t2, odd = t1 + t3, turned = times_i(t1 - t3);
    a[0] = even + odd;
    a[1] = other + turned;
    a[2] = even - odd;
    a[3] = other - turned;
}

template <class S>
SSMZOO_INLINE void join4(Complex<S>* x, Complex<S> r1, Complex<S> r2, Complex<S> r3) {
    const Complex<S> even = x[0] + x[2], odd = x[0] - x[2], other = x[1] + x[3], turned = times_i(x[3] - x[1]);
    x[0] = even + other;
    x[1] = times_conjugate(odd + turned, r1);
    x[2] = times_conjugate(even - other, r2);
    x[3] = times_conjugate(odd - turned, r3);
}

template <bool split, class S>
SSMZOO_INLINE void level(Complex<S>* x, int64_t q, const S* roots) {
    const Complex<S> r1 = constant(roots, 0), r2 = constant(roots, 1), r3 = constant(roots, 2);
    for (int64_t j = 0; j < q; ++j) {
        Complex<S> a[4] = {x[j], x[j + q], x[j + 2 * q], x[j + 3 * q]};
        if (split)
            split4(a, r1, r2, r3);
        else
            join4(a, r1, r2, r3);
        for (int64_t k = 0; k < 4; ++k) x[j + k * q] = a[k];
    }
}

// A leaf of 2 or 3 points.
template <bool split, class S>
SSMZOO_INLINE void leaf(Complex<S>* x, int64_t m, int64_t node, const Roots<S>& roots) {
    if (m == 2) {
        const Complex<S> r = constant(roots.quarters + 6 * node, 1);
        const Complex<S> a = x[0], b = split ? x[1] * r : x[1];
        x[0] = a + b;
        x[1] = split ? a - b : times_conjugate(a - b, r);
        return;
    }
    const S* own = roots.thirds + 4 * (node - roots.first_leaf);
    const auto half = splat(S(0.5)), high = splat(S(0.86602540378443864676));  // of the third root of 1
    const Complex<S> r1 = constant(own, 0), r2 = constant(own, 1);
    const Complex<S> a = x[0], b = split ? x[1] * r1 : x[1], c = split ? x[2] * r2 : x[2];
    const Complex<S> sum = b + c, turn = times_i(b - c);
    const Complex<S> middle = {fma(-half, sum.re, a.re), fma(-half, sum.im, a.im)};
    const Complex<S> plus = {fma(high, turn.re, middle.re), fma(high, turn.im, middle.im)};
    const Complex<S> minus = {fma(-high, turn.re, middle.re), fma(-high, turn.im, middle.im)};
    x[0] = a + sum;
    x[1] = split ? plus : times_conjugate(minus, r1);
    x[2] = split ? minus : times_conjugate(plus, r2);
}

template <class S>
void split_near(Complex<S>* x, int64_t m, int64_t node, const Roots<S>& roots) {
    int64_t nodes = 1;
    for (; m >= 4; m /= 4, node = 4 * node + 1, nodes *= 4)
        for (int64_t i = 0; i < nodes; ++i) level<true>(x + i * m, m / 4, roots.quarters + 6 * (node + i));
    if (m > 1)
        for (int64_t i = 0; i < nodes; ++i) leaf<true>(x + i * m, m, node + i, roots);
}

template <class S>
void join_near(Complex<S>* x, int64_t size, int64_t node, const Roots<S>& roots) {
    int64_t nodes = 1, m = size;
    for (; m >= 4; m /= 4, node = 4 * node + 1) nodes *= 4;
    if (m > 1)
        for (int64_t i = 0; i < nodes; ++i) leaf<false>(x + i * m, m, node + i, roots);
    while (m < size) {
        m *= 4, nodes /= 4, node = (node - 1) / 4;
        for (int64_t i = 0; i < nodes; ++i) level<false>(x + i * m, m / 4, roots.quarters + 6 * (node + i));
    }
}

// All below a node, there or back or both, depth first: what has come into a cache is done with before it leaves it.
// ``middle`` is told of each near node's points between there and back.
template <bool there, bool back, class S, class Middle>
void below(Complex<S>* x, int64_t m, int64_t node, const Roots<S>& roots, const Middle& middle) {
    if (m <= kNear) {
        if (there) split_near(x, m, node, roots);
        middle(x, m);
        if (back) join_near(x, m, node, roots);
        return;
    }
    const int64_t q = m / 4;
    if (there) level<true>(x, q, roots.quarters + 6 * node);
    for (int64_t k = 0; k < 4; ++k) below<there, back>(x + k * q, q, 4 * node + 1 + k, roots, middle);
    if (back) level<false>(x, q, roots.quarters + 6 * node);
}

// The four nodes below node 0.
template <bool there, bool back, class S, class Middle>
void quarters(Complex<S>* x, int64_t points, const Roots<S>& roots, const Middle& middle) {
    const int64_t q = points / 4;
    for (int64_t k = 0; k < 4; ++k) below<there, back>(x + k * q, q, 1 + k, roots, middle);
}

// Node 0's own level, from where points come to where they are put; load(j) and put(j, point) for its M points.
template <class S, class Load>
void from_outside(Complex<S>* x, int64_t points, const Roots<S>& roots, const Load& load) {
    const int64_t q = points / 4;
    const Complex<S> r1 = constant(roots.quarters, 0), r2 = constant(roots.quarters, 1), r3 = constant(roots.quarters, 2);
    for (int64_t j = 0; j < q; ++j) {
        Complex<S> a[4] = {load(j), load(j + q), load(j + 2 * q), load(j + 3 * q)};
        split4(a, r1, r2, r3);
        for (int64_t k = 0; k < 4; ++k) x[j + k * q] = a[k];
    }
}

template <class S, class Put>
void to_outside(const Complex<S>* x, int64_t points, const Roots<S>& roots, const Put& put) {
    const int64_t q = points / 4;
    const Complex<S> r1 = constant(roots.quarters, 0), r2 = constant(roots.quarters, 1), r3 = constant(roots.quarters, 2);
    for (int64_t j = 0; j < q; ++j) {
        Complex<S> a[4] = {x[j], x[j + q], x[j + 2 * q], x[j + 3 * q]};
        join4(a, r1, r2, r3);
        for (int64_t k = 0; k < 4; ++k) put(j + k * q, a[k]);
    }
}

}  // namespace SSMZOO_ISA
}  // namespace ssmzoo
