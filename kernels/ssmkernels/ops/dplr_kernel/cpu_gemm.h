// Products of the small matrices that one channel has, all of which fit in a core's own cache.
//
// Row-major; the columns of B and C are whole vectors. Each element of a result is one chain of fused multiply-adds in
// the order of k, so that it depends on nothing else.
#pragma once

#include "native/tiles.h"

namespace ssmzoo {
namespace SSMZOO_ISA {

// Accumulators: rows by vectors, as many as the registers take beside a row of B and one number of A.
#if SSMZOO_VECTOR_BYTES == 64
constexpr int kRows = 6, kVectors = 4;
#else
constexpr int kRows = 4, kVectors = 2;
#endif

// Element (i, k) of the left factor is p[i * row + k * column]: it may lie transposed.
template <class S>
struct Left {
    const S* p;
    int64_t row, column;
};

template <class S, int R, int N>
SSMZOO_INLINE void multiply(Left<S> A, const S* B, int64_t ldb, S* C, int64_t ldc, int64_t inner) {
    using V = typename Lanes<S>::V;
    constexpr int count = Lanes<S>::count;
    V sum[R][N];
    for (int i = 0; i < R; ++i)
        for (int j = 0; j < N; ++j) sum[i][j] = V{};
    for (int64_t k = 0; k < inner; ++k) {
        V b[N];
        for (int j = 0; j < N; ++j) b[j] = load(B + k * ldb + j * count);
        for (int i = 0; i < R; ++i) {
            const V a = splat<S>(A.p[i * A.row + k * A.column]);
            for (int j = 0; j < N; ++j) sum[i][j] = fma(a, b[j], sum[i][j]);
        }
    }
    for (int i = 0; i < R; ++i)
        for (int j = 0; j < N; ++j) store(C + i * ldc + j * count, sum[i][j]);
}

template <class S, int R, int N>
void multiply_rows(Left<S> A, const S* B, int64_t ldb, S* C, int64_t ldc, int64_t rows, int64_t inner) {
    int64_t i = 0;
    for (; i + R <= rows; i += R)
        multiply<S, R, N>({A.p + i * A.row, A.row, A.column}, B, ldb, C + i * ldc, ldc, inner);
    if constexpr (R > 1)
        if (i < rows)
            multiply_rows<S, R / 2, N>({A.p + i * A.row, A.row, A.column}, B, ldb, C + i * ldc, ldc, rows - i, inner);
}

// Numbers that product's `panel` must have room for.
template <class S>
constexpr int64_t panel_size(int64_t inner) {
    return inner * kVectors * Lanes<S>::count;
}

// C (rows, columns) = A (rows, inner) B (inner, columns). A panel of B's columns is copied to where it is contiguous.
template <class S>
void product(Left<S> A, const S* B, int64_t ldb, S* C, int64_t ldc, int64_t rows, int64_t columns, int64_t inner,
             S* panel) {
    constexpr int64_t wide = kVectors * Lanes<S>::count;
    int64_t j = 0;
    for (; j + wide <= columns; j += wide) {
        for (int64_t k = 0; k < inner; ++k) memcpy(panel + k * wide, B + k * ldb + j, sizeof(S) * wide);
        multiply_rows<S, kRows, kVectors>(A, panel, wide, C + j, ldc, rows, inner);
    }
    for (; j < columns; j += Lanes<S>::count) multiply_rows<S, kRows, 1>(A, B + j, ldb, C + j, ldc, rows, inner);
}

// y = x M, for a single row x: M is read in place.
template <class S>
void row_product(const S* x, const S* M, int64_t ldm, S* y, int64_t columns, int64_t inner) {
    constexpr int64_t wide = 8 * Lanes<S>::count;
    int64_t j = 0;
    for (; j + wide <= columns; j += wide) multiply<S, 1, 8>({x, 0, 1}, M + j, ldm, y + j, 0, inner);
    for (; j < columns; j += Lanes<S>::count) multiply<S, 1, 1>({x, 0, 1}, M + j, ldm, y + j, 0, inner);
}

// (rows, columns) → (columns, rows), and into another precision.
template <class To, class From>
void transpose(To* to, int64_t ldt, const From* from, int64_t ldf, int64_t rows, int64_t columns) {
    constexpr int64_t block = 16;
    for (int64_t i0 = 0; i0 < rows; i0 += block)
        for (int64_t j0 = 0; j0 < columns; j0 += block)
            for (int64_t j = j0; j < minimum(j0 + block, columns); ++j)
                for (int64_t i = i0; i < minimum(i0 + block, rows); ++i)
                    to[j * ldt + i] = static_cast<To>(from[i * ldf + j]);
}

template <class To, class From>
void convert(To* to, const From* from, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<To>(from[i]);
}

}  // namespace SSMZOO_ISA
}  // namespace ssmzoo
