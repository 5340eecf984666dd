// Products of small matrices, all of which fit in a core's own cache.
//
// Row-major; the columns of B and C are whole vectors. Each element of a result is one chain of fused multiply-adds in
// the order of k, so that it depends on nothing else.
#pragma once

#include "coming.h"
#include "tiles.h"
#include "turn.h"

namespace ssmzoo {
namespace SSMZOO_ISA {

// Accumulators: rows by vectors, as many as the registers take beside a row of B and one number of A.
#if SSMZOO_VECTOR_BYTES == 64
constexpr int kRows = 6, kVectors = 4;
#elif SSMZOO_VECTOR_BYTES == 32
constexpr int kRows = 6, kVectors = 2;
#else
constexpr int kRows = 4, kVectors = 2;
#endif

// Element (i, k) of the left factor is p[i * row + k * column]: it may lie transposed.
template <class S>
struct Left {
    const S* p;
    int64_t row, column;

    SSMZOO_INLINE Left from(int64_t i) const { return {p + i * row, row, column}; }
};

// Which elements of a left factor count; the others are not read, and may meet infinities. With `edge` e, row i has
// those at k < e + i in `lower`, and those at k >= e + i in `upper`.
enum class Shape { full, lower, upper };

// How a product begins: with 0, or with what is in C times `scale`, or times each row's own factor where there are such;
// in place of C, with what lies `offset` numbers from it.
template <class S>
struct Onto {
    bool added;
    S scale;
    const S* factors = nullptr;
    int64_t offset = 0;

    SSMZOO_INLINE Onto from(int64_t row) const { return {added, scale, factors ? factors + row : nullptr, offset}; }
};

template <class S, int R, int N, Shape shape>
SSMZOO_INLINE void multiply(Left<S> A, const S* B, int64_t ldb, S* C, int64_t ldc, int64_t inner, int64_t edge,
                            Onto<S> onto) {
    using V = typename Lanes<S>::V;
    constexpr int count = Lanes<S>::count;
    V sum[R][N];
    if (onto.added) {
        S all = onto.scale;
        asm volatile("" : "+m"(all));  // read for each tile: kept in a register, it would drive B's out of theirs
        for (int i = 0; i < R; ++i) {
            const V scale = splat<S>(onto.factors ? onto.factors[i] : all);
            for (int j = 0; j < N; ++j) sum[i][j] = scale * load(C + onto.offset + i * ldc + j * count);
        }
    } else {
        for (int i = 0; i < R; ++i)
            for (int j = 0; j < N; ++j) sum[i][j] = V{};
    }
    const auto add = [&](int64_t k, int first, int last) __attribute__((always_inline)) {
        V b[N];
        for (int j = 0; j < N; ++j) b[j] = load(B + k * ldb + j * count);
        for (int i = 0; i < R; ++i) {
            if (i < first || i >= last) continue;
            const V a = splat<S>(A.p[i * A.row + k * A.column]);
            for (int j = 0; j < N; ++j) sum[i][j] = fma(a, b[j], sum[i][j]);
        }
    };
    if (shape == Shape::upper)
        for (int k = 0; k < R - 1; ++k) add(edge + k, 0, k + 1);
    const int64_t start = shape == Shape::upper ? edge + R - 1 : 0, end = shape == Shape::lower ? edge : inner;
    for (int64_t k = start; k < end; ++k) add(k, 0, R);
    if (shape == Shape::lower)
        for (int k = 0; k < R - 1; ++k) add(edge + k, k + 1, R);
    for (int i = 0; i < R; ++i)
        for (int j = 0; j < N; ++j) store(C + i * ldc + j * count, sum[i][j]);
}

// Not inlined: compiling it once for each caller would take most of the time of a build.
template <class S, int R, int N, Shape shape>
__attribute__((noinline)) void multiply_rows(Left<S> A, const S* B, int64_t ldb, S* C, int64_t ldc, int64_t rows,
                                             int64_t inner, int64_t edge, Onto<S> onto, Coming* coming = nullptr) {
    int64_t i = 0;
    for (; i + R <= rows && (R != 6 || rows - i != 8); i += R) {  // the last eight four by four: sums of two would wait
        if (coming) coming->fetch();
        multiply<S, R, N, shape>(A.from(i), B, ldb, C + i * ldc, ldc, inner, edge + i, onto.from(i));
    }
    constexpr int fewer = R > 4 ? 4 : R / 2;  // of the 64 rows of a chunk ten times six, then four
    if constexpr (R > 1)
        if (i < rows)
            multiply_rows<S, fewer, N, shape>(A.from(i), B, ldb, C + i * ldc, ldc, rows - i, inner, edge + i,
                                              onto.from(i), coming);
}

// Numbers that product's `panel` must have room for.
template <class S>
constexpr int64_t panel_size(int64_t inner) {
    return inner * kVectors * Lanes<S>::count;
}

// A panel of columns of B, (inner, columns), where it is contiguous, each row times its factor if there are factors.
template <class S, int N>
SSMZOO_INLINE void copy_panel(S* panel, const S* B, int64_t ldb, int64_t inner, const S* factors) {
    constexpr int64_t lanes = Lanes<S>::count;
    for (int64_t k = 0; k < inner; ++k) {
        if (!factors) {
            memcpy(panel + k * N * lanes, B + k * ldb, sizeof(S) * N * lanes);
            continue;
        }
        const auto factor = splat<S>(factors[k]);
        for (int j = 0; j < N; ++j) store(panel + (k * N + j) * lanes, factor * load(B + k * ldb + j * lanes));
    }
}

// C (rows, columns) = A (rows, inner) B (inner, columns), onto what is there if so told. A panel of B's columns is
// copied to where it is contiguous; `factors` are those of B's rows, if any.
template <class S, Shape shape = Shape::full>
void product(Left<S> A, const S* B, int64_t ldb, S* C, int64_t ldc, int64_t rows, int64_t columns, int64_t inner,
             S* panel, int64_t edge = 0, Onto<S> onto = {false, S(0)}, const S* factors = nullptr,
             Coming* coming = nullptr) {
    constexpr int64_t wide = kVectors * Lanes<S>::count;
    int64_t j = 0;
    for (; j + wide <= columns; j += wide) {
        copy_panel<S, kVectors>(panel, B + j, ldb, inner, factors);
        multiply_rows<S, kRows, kVectors, shape>(A, panel, wide, C + j, ldc, rows, inner, edge, onto, coming);
    }
    for (; j < columns; j += Lanes<S>::count) {
        if (factors) copy_panel<S, 1>(panel, B + j, ldb, inner, factors);
        const S* from = factors ? panel : B + j;
        multiply_rows<S, kRows, 1, shape>(A, from, factors ? Lanes<S>::count : ldb, C + j, ldc, rows, inner, edge, onto,
                                            coming);
    }
}

// y = x M, for a single row x: M is read in place.
template <class S>
void row_product(const S* x, const S* M, int64_t ldm, S* y, int64_t columns, int64_t inner) {
    constexpr int64_t wide = 8 * Lanes<S>::count;
    int64_t j = 0;
    const Onto<S> nothing = {false, S(0)};
    for (; j + wide <= columns; j += wide)
        multiply<S, 1, 8, Shape::full>({x, 0, 1}, M + j, ldm, y + j, 0, inner, 0, nothing);
    for (; j < columns; j += Lanes<S>::count)
        multiply<S, 1, 1, Shape::full>({x, 0, 1}, M + j, ldm, y + j, 0, inner, 0, nothing);
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

// Within one precision, square by square of whole vectors.
template <class S>
void transpose(S* to, int64_t ldt, const S* from, int64_t ldf, int64_t rows, int64_t columns) {
    constexpr int64_t lanes = Lanes<S>::count;
    const int64_t whole = columns - columns % lanes;
    int64_t i = 0;
    for (; i + lanes <= rows; i += lanes) {
        for (int64_t j = 0; j < whole; j += lanes) {
            typename Lanes<S>::V square[lanes];
            for (int64_t r = 0; r < lanes; ++r) square[r] = load(from + (i + r) * ldf + j);
            turn<S>(square);
            for (int64_t r = 0; r < lanes; ++r) store(to + (j + r) * ldt + i, square[r]);
        }
        for (int64_t j = whole; j < columns; ++j)
            for (int64_t r = i; r < i + lanes; ++r) to[j * ldt + r] = from[r * ldf + j];
    }
    for (int64_t j = 0; j < columns; ++j)
        for (int64_t r = i; r < rows; ++r) to[j * ldt + r] = from[r * ldf + j];
}

// Rows [first, first + rows) of KeptRows, turned over; `room` takes a vector of rows, each in whole vectors.
template <class S, class Kept>
void transpose_kept(S* to, int64_t ldt, const Kept& from, int64_t first, int64_t rows, S* room) {
    if (!from.compact()) return transpose(to, ldt, at<S>(from.p, first * from.count), from.count, rows, from.count);
    constexpr int64_t together = Lanes<S>::count;
    const int64_t width = ceil_div(from.count, together) * together;
    for (int64_t i = 0; i < rows; i += together) {
        const int64_t some = minimum(together, rows - i);
        for (int64_t r = 0; r < some; ++r) from.read(room + r * width, first + i + r);
        transpose(to + i, ldt, room, width, some, from.count);
    }
}

template <class To, class From>
void convert(To* to, const From* from, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<To>(from[i]);
}

}  // namespace SSMZOO_ISA
}  // namespace ssmzoo
