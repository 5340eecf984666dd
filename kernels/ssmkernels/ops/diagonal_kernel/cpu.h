// The kernel of a diagonal state-space model, K_t = Σ_n weight_n ratio_n^t, as one small matrix product per channel.
//
// With blocks of r taps and t = q r + i, K_{q i} = Σ_n (weight_n ratio_n^{q r}) ratio_n^i is a product of two tables:
// what each block starts from, and the powers within a block. With r near √length both stay in cache, and nothing grows
// with n length. The tables come in double, whatever they are rounded to: there a high power loses no digits that
// count.
//
// A task takes one channel and a span of its blocks. Spans depend on the length alone, never on the number of threads.
#pragma once

#include "native/tiles.h"
#include "native/parallel.h"

namespace ssmzoo {

// All are contiguous; a complex number is two doubles.
struct DiagonalArguments {
    const double *ratio, *weight;  // (d n)
    void* taps;                    // S: (d length), read by the backward pass, which has their gradients there
    int64_t dtype, complex, length, d, n, threads;
};

namespace SSMZOO_ISA {

constexpr int64_t kLanes = Lanes<double>::count;
constexpr int64_t kRows = 6;                                     // of a product that are in registers at once, and
constexpr int64_t kColumns = SSMZOO_VECTOR_BYTES == 64 ? 4 : 2;  // vectors of each
constexpr int64_t kSpan = 16 * kRows;                            // blocks of a task
constexpr int64_t kLeast = 64;  // taps of a block: each instruction set's kColumns vectors divide it

// How a kernel's taps are cut.
struct Cut {
    int64_t block, blocks, spans;

    explicit Cut(int64_t length) : block(kLeast) {
        while (block * block < length) block *= 2;
        blocks = ceil_div(length, block);
        spans = ceil_div(blocks, kSpan);
    }

    int64_t first(int64_t span) const { return span * kSpan; }
    int64_t count(int64_t span) const { return minimum(kSpan, blocks - first(span)); }
};

inline int64_t round_up(int64_t x, int64_t to) { return ceil_div(x, to) * to; }

// A number or a vector of them, complex or not: V is double or VD. Where they are real, `im` is never looked at.
template <bool complex, class V>
struct Number {
    V re, im;
};

template <bool complex, class V>
SSMZOO_INLINE Number<complex, V> operator*(Number<complex, V> a, Number<complex, V> b) {
    if (!complex) return {a.re * b.re, V{}};
    return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}

template <bool complex>
using Scalar = Number<complex, double>;

template <bool complex>
SSMZOO_INLINE Scalar<complex> read_number(const double* p, int64_t i) {
    if (!complex) return {p[i], 0};
    return {p[2 * i], p[2 * i + 1]};
}

template <bool complex>
Scalar<complex> power(Scalar<complex> x, int64_t exponent) {
    Scalar<complex> result = {1, 0};
    for (; exponent; exponent /= 2) {
        if (exponent & 1) result = result * x;
        x = x * x;
    }
    return result;
}

// A vector of doubles, rounded to S, to as many S's at p.
SSMZOO_INLINE void write_rounded(double* p, VD v) { store(p, v); }

SSMZOO_INLINE void write_rounded(float* p, VD v) {
    typedef float Half __attribute__((vector_size(SSMZOO_VECTOR_BYTES / 2)));
    const Half half = __builtin_convertvector(v, Half);
    memcpy(p, &half, sizeof half);
}

// Adds left · right, (kRows depth) · (depth columns), to `sums`. Left has any strides; right's rows are `stride` apart.
template <class S, int64_t columns>
SSMZOO_INLINE void add_product(typename Lanes<S>::V (&sums)[kRows][columns], const S* left, int64_t left_row,
                               int64_t left_depth, const S* right, int64_t stride, int64_t depth) {
    using V = typename Lanes<S>::V;
    for (int64_t k = 0; k < depth; ++k) {
        V row[columns];
        for (int64_t j = 0; j < columns; ++j) row[j] = load(right + k * stride + j * Lanes<S>::count);
        for (int64_t i = 0; i < kRows; ++i) {
            const V x = splat<S>(left[i * left_row + k * left_depth]);
            for (int64_t j = 0; j < columns; ++j) sums[i][j] = fma(x, row[j], sums[i][j]);
        }
    }
}

}  // namespace SSMZOO_ISA
}  // namespace ssmzoo
