// C = A B, plus a bias: products of matrices of any size and layout.
//
// PyTorch's own libraries start a team of threads for each product and wait for all of them. Here the parts of a
// product are claimed one by one (threads.h), so that no busy core holds it up.
//
// A task is a block of C. Its part of B is copied into panels, `kDepth` rows at a time; a panel stays in the fastest
// cache while rows of A pass by. (This is the order of loops of Goto and van de Geijn, "Anatomy of high-performance
// matrix multiplication", 2008.) Each element of C is one chain of fused multiply-adds in the order of k: it depends on
// its row and its column alone, not on how many others there are.
//
// Numbers in half precision become float as they are copied, those of A before where many blocks of columns read them.
// Results are rounded once, at the end, while they are near.
#include "exports.h"
#include "gemm.h"
#include "pairs.h"
#include "parallel.h"
#include "turn.h"

namespace ssmzoo {

struct MatmulArguments {
    const void* a;     // T: (rows inner)
    const void* b;     // T: (inner columns)
    const void* bias;  // float: (columns), or null
    void* c;           // T: (rows columns), contiguous
    void* wide;        // float: (rows inner), scratch for A in half precision, or null: each block of columns reads A
    int64_t dtype, rows, columns, inner, a_row, a_column, b_row, b_column, threads;
};

namespace SSMZOO_ISA {
namespace {

typedef float S;

constexpr int64_t kPanel = kVectors * Lanes<S>::count;  // columns
constexpr int64_t kBlock = 128;                         // columns of a task
constexpr int64_t kDepth = 256;                         // rows of B at once
constexpr int64_t kNear = 96;                           // rows of A that stay in a core's cache for all of a block's panels
constexpr int64_t kAhead = 8;                           // rows that are asked for before they are copied
constexpr int64_t kTogether = 8;                        // rows of a transposed A that are copied together
constexpr int64_t kFew = 48;                            // rows, up to which C is computed transposed

// Part of B, of which element (k, j) is p[k * row + j * column].
template <class T>
struct Right {
    const T* p;
    int64_t row, column;
};

// Asks for a row before it is copied: rows lie too far apart for the machine to guess.
template <class T>
SSMZOO_INLINE void fetch(const T* row, int64_t count, bool there) {
    constexpr int64_t line = 64 / sizeof(T);
    for (int64_t i = 0; there && i < count; i += line) __builtin_prefetch(row + i);
}

// Whole vectors of numbers that follow one another.
template <class T>
SSMZOO_INLINE void copy(S* to, const T* from, int64_t count) {
    for (int64_t i = 0; i < count; i += Lanes<S>::count) store(to + i, read(from + i));
}

// `columns` of B in panels of kPanel, each k by k; zeros beyond them. Walks through B as it lies.
template <class T>
void copy_panels(S* to, Right<T> from, int64_t inner, int64_t columns) {
    constexpr int64_t lanes = Lanes<S>::count;
    const int64_t whole = from.column == 1 ? columns / kPanel * kPanel : 0;
    for (int64_t k = 0; k < inner && whole; ++k) {
        fetch(from.p + (k + kAhead) * from.row, whole, k + kAhead < inner);
        for (int64_t j = 0; j < whole; j += kPanel)
            copy(to + j * inner + k * kPanel, from.p + k * from.row + j, kPanel);
    }
    for (int64_t j0 = whole; j0 < columns; j0 += lanes) {
        S* panel = to + j0 / kPanel * kPanel * inner + j0 % kPanel;
        const T* p = from.p + j0 * from.column;
        const int64_t there = minimum(lanes, columns - j0);
        int64_t k = 0;
        if (from.row == 1)
            for (; k + lanes <= inner; k += lanes) {
                VF v[lanes];
                for (int64_t j = 0; j < lanes; ++j) v[j] = j < there ? read(p + k + j * from.column) : VF{};
                turn<S>(v);
                for (int64_t i = 0; i < lanes; ++i) store(panel + (k + i) * kPanel, v[i]);
            }
        for (; k < inner; ++k)
            for (int64_t j = 0; j < lanes; ++j)
                panel[k * kPanel + j] = j < there ? widen(p[k * from.row + j * from.column]) : S(0);
    }
    for (int64_t j0 = ceil_div(columns, lanes) * lanes; j0 % kPanel; j0 += lanes)
        for (int64_t k = 0; k < inner; ++k)
            store(to + j0 / kPanel * kPanel * inner + k * kPanel + j0 % kPanel, VF{});
}

// A block of C: some rows of A times some columns of B.
template <class A, class B>
struct Task {
    Left<A> a;
    Right<B> b;
    int64_t rows, columns, inner;
};

// kRows numbers: those of float are read before any is written, so that the compiler takes several at once.
template <class T>
SSMZOO_INLINE void copy_row(S* to, const T* from) {
    if constexpr (sizeof(T) == sizeof(S)) {
        memcpy(to, from, sizeof(S) * kRows);
    } else {
        for (int64_t r = 0; r < kRows; ++r) to[r] = widen(from[r]);
    }
}

// `rows` of A in strips of kRows, each k by k. Walks through A as it lies: by k, in the product for a weight's
// gradient, kTogether of them at a time: with single ones a strip's line would be written in pieces, and leave the
// fastest cache in between, as strips lie a multiple of its size apart.
template <class T>
void copy_strips(S* to, Left<T> from, int64_t inner, int64_t rows) {
    const int64_t whole = from.row == 1 ? rows / kRows * kRows : 0;
    for (int64_t k0 = 0; k0 < inner && whole; k0 += kTogether) {
        const int64_t end = minimum(k0 + kTogether, inner);
        for (int64_t k = k0; k < end; ++k) fetch(from.p + (k + kTogether) * from.column, whole, k + kTogether < inner);
        for (int64_t i = 0; i < whole; i += kRows)
            for (int64_t k = k0; k < end; ++k) copy_row(to + i * inner + k * kRows, from.p + k * from.column + i);
    }
    for (int64_t i = whole; i < rows; ++i)
        for (int64_t k = 0; k < inner; ++k)
            to[i / kRows * kRows * inner + k * kRows + i % kRows] = widen(from.p[i * from.row + k * from.column]);
}

// How a block reads its part of A: as it lies, in strips, or row by row where it only has to become float.
enum class Reading { in_place, in_strips, in_rows };

template <class T>
Reading reading(Left<T> a) {
    if (a.column != 1) return Reading::in_strips;
    return sizeof(T) == sizeof(S) ? Reading::in_place : Reading::in_rows;
}

// `rows` of A, which become float.
template <class T>
void copy_rows(S* to, Left<T> from, int64_t inner, int64_t rows) {
    for (int64_t i = 0; i < rows; ++i) read_row(to + i * inner, from.p + i * from.row, inner);
}

// `begun`: c holds what the sums begin with. done(i, count) when so many rows from the i-th on are there.
template <class A, class B, class Done>
void multiply_block(const Task<A, B>& t, S* c, int64_t ldc, S* panels, S* strips, bool begun, const Done& done) {
    const Reading how = reading(t.a);
    for (int64_t k0 = 0; k0 == 0 || k0 < t.inner; k0 += kDepth) {  // once for a bias alone, too
        const int64_t depth = minimum(kDepth, t.inner - k0);
        const Onto<S> onto = {begun || k0 > 0, S(1)};
        copy_panels<B>(panels, {t.b.p + k0 * t.b.row, t.b.row, t.b.column}, depth, t.columns);
        for (int64_t i = 0; i < t.rows; i += kNear) {
            const int64_t near = minimum(kNear, t.rows - i);
            const Left<A> a = {t.a.p + i * t.a.row + k0 * t.a.column, t.a.row, t.a.column};
            if (how == Reading::in_strips) copy_strips(strips, a, depth, near);
            if (how == Reading::in_rows) copy_rows(strips, a, depth, near);
            for (int64_t j = 0; j < t.columns; j += kPanel)
                for (int64_t r = 0; r < near; r += kRows) {
                    Left<S> strip = {strips + r * depth, depth, 1};
                    if (how == Reading::in_strips) strip = {strips + r * depth, 1, kRows};
                    if constexpr (sizeof(A) == sizeof(S))
                        if (how == Reading::in_place) strip = a.from(r);
                    S* to = c + (i + r) * ldc + j;
                    const S* panel = panels + j * depth;
                    if (near - r >= kRows)
                        multiply<S, kRows, kVectors, Shape::full>(strip, panel, kPanel, to, ldc, depth, 0, onto);
                    else
                        multiply_rows<S, kRows - 1, kVectors, Shape::full>(strip, panel, kPanel, to, ldc, near - r,
                                                                           depth, 0, onto);
                }
            if (k0 + depth == t.inner) done(i, near);
        }
    }
}

// A row by row, (rows inner), as float.
template <class T>
int widen_rows(const MatmulArguments& a) {
    const Left<T> from = {static_cast<const T*>(a.a), a.a_row, a.a_column};
    return parallel_for(ceil_div(a.rows, kRows), a.threads, 0, [&](int64_t i, char*) {
        const int64_t first = i * kRows, count = minimum(kRows, a.rows - first);
        S* to = static_cast<S*>(a.wide) + first * a.inner;
        if (from.column == 1) return copy_rows(to, from.from(first), a.inner, count);
        for (int64_t r = 0; r < count; ++r)
            for (int64_t k = 0; k < a.inner; ++k) to[r * a.inner + k] = widen(from.from(first + r).p[k * from.column]);
    });
}

// Rows of a block of C: as they are, or each of C's columns where they were computed `turned`. There `from` is as long
// as whole vectors.
template <class T>
void put_rows(T* to, int64_t stride, const S* from, int64_t wide, int64_t rows, int64_t columns, bool turned) {
    constexpr int64_t lanes = Lanes<S>::count;
    for (int64_t i = 0; i < rows && !turned; ++i) write_row(to + i * stride, from + i * wide, columns);
    for (int64_t i = 0; i < rows && turned; i += lanes)
        for (int64_t j = 0; j < columns; j += lanes) {
            VF v[lanes];
            for (int64_t r = 0; r < lanes; ++r) v[r] = load(from + (i + r) * wide + j);
            turn<S>(v);
            for (int64_t r = 0; r < minimum(lanes, columns - j); ++r)
                write_some(to + (j + r) * stride + i, v[r], rows - i);
        }
}

// Rows of a task: as few as `most` allows, as even as can be, and where that leaves a thread without a task, fewer.
int64_t rows_of_task(int64_t rows, int64_t most, int64_t across, int64_t threads) {
    const int64_t enough = minimum(ceil_div(threads, across), ceil_div(rows, kNear)), least = ceil_div(rows, most);
    return ceil_div(ceil_div(rows, enough > least ? enough : least), kRows) * kRows;
}

// C = A B for factors that lie as told; of results in `turned` order, rows are C's columns.
template <class T, class A, class B>
int multiply_all(const MatmulArguments& a, Left<A> left, Right<B> right, bool turned) {
    const S* bias = static_cast<const S*>(a.bias);
    const int64_t rows = turned ? a.columns : a.rows, columns = turned ? a.rows : a.columns;
    const int64_t across = ceil_div(columns, kBlock);
    // Each task copies its part of B: the longer, the fewer copies, where there are enough of them to share evenly.
    const int64_t most = turned ? 2 * kNear : across < 2 * a.threads ? 4 * kNear : 8 * kNear;
    const int64_t chunk = rows_of_task(rows, most, across, a.threads);
    const int64_t down = ceil_div(rows, chunk);
    // No more scratch memory than a small product needs: for much of it malloc asks the system.
    const bool as_it_lies = !turned && sizeof(T) == sizeof(S);  // but for columns that fill no panel
    const int64_t wide = minimum(kBlock, ceil_div(columns, kPanel) * kPanel), depth = minimum(kDepth, a.inner);
    const int64_t near = reading(left) == Reading::in_place ? 0 : ceil_div(minimum(kNear, rows), kRows) * kRows;
    const int64_t own_size =
        as_it_lies && columns % kPanel == 0 ? 0 : ceil_div(chunk, Lanes<S>::count) * Lanes<S>::count * wide;
    const size_t bytes = sizeof(S) * static_cast<size_t>((wide + near) * depth + own_size);
    return parallel_for(down * across, a.threads, bytes, [&](int64_t number, char* scratch) {
        const int64_t i0 = number % down * chunk, j0 = number / down * kBlock;
        const Task<A, B> t = {left.from(i0), {right.p + j0 * right.column, right.row, right.column},
                              minimum(chunk, rows - i0), minimum(kBlock, columns - j0), a.inner};
        S* panels = reinterpret_cast<S*>(scratch);
        S* strips = panels + wide * depth;
        S* own = strips + near * depth;
        const bool direct = as_it_lies && t.columns % kPanel == 0;
        S* c = direct ? static_cast<S*>(a.c) + i0 * a.columns + j0 : own;
        const int64_t ldc = direct ? a.columns : wide;
        if (bias)
            for (int64_t i = 0; i < t.rows; ++i)
                for (int64_t j = 0; j < t.columns; ++j) c[i * ldc + j] = bias[turned ? i0 + i : j0 + j];
        multiply_block(t, c, ldc, panels, strips, bias != nullptr, [&](int64_t i, int64_t count) {
            if (direct) return;
            T* to = static_cast<T*>(a.c) + (turned ? j0 * a.columns + i0 + i : (i0 + i) * a.columns + j0);
            put_rows(to, a.columns, own + i * wide, wide, count, t.columns, turned);
        });
    });
}

template <class T>
int matmul(const MatmulArguments& a) {
    if (a.rows == 0 || a.columns == 0) return 0;
    if (a.inner == 0 && !a.bias) {
        memset(a.c, 0, sizeof(T) * static_cast<size_t>(a.rows * a.columns));
        return 0;
    }
    const Left<T> left = {static_cast<const T*>(a.a), a.a_row, a.a_column};
    const Right<T> right = {static_cast<const T*>(a.b), a.b_row, a.b_column};
    // For few rows Cᵀ = Bᵀ Aᵀ, so that A is copied and B, which is a weight as it lies in PyTorch, is read in place.
    if (a.rows <= kFew && a.b_row == 1)
        return multiply_all<T>(a, Left<T>{right.p, right.column, right.row}, Right<T>{left.p, left.column, left.row}, true);
    if constexpr (sizeof(T) != sizeof(S))
        if (a.wide) {
            const int failure = widen_rows<T>(a);
            const Left<S> wide = {static_cast<const S*>(a.wide), a.inner, 1};
            return failure ? failure : multiply_all<T>(a, wide, right, false);
        }
    return multiply_all<T>(a, left, right, false);
}

}  // namespace
}  // namespace SSMZOO_ISA
}  // namespace ssmzoo

SSMZOO_EXPORT(matmul)(const ssmzoo::MatmulArguments* a) {
    using namespace ssmzoo;
    using namespace ssmzoo::SSMZOO_ISA;
    switch (a->dtype) {
        case 0: return SSMZOO_ISA::matmul<float>(*a);
        case 2: return SSMZOO_ISA::matmul<bfloat16>(*a);
        default: return SSMZOO_ISA::matmul<float16>(*a);
    }
}
