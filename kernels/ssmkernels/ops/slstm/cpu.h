// What the scalar memory's forward and backward passes share.
//
// A task takes one head of a few sequences and walks over time. The recurrent products of all its sequences are one,
// from weights laid out once a task; lanes run over channels. Each sequence is a row, the longest first, so that those
// that still run are always the first rows. No row's result depends on the others.
#pragma once

#include "native/choose.h"
#include "native/gemm.h"
#include "native/parallel.h"
#include "native/tanh.h"
#include "ssd/cpu_rows.h"

namespace ssmzoo {

// S is float, or double where activations are. The last three axes of x are contiguous, and all else is.
struct SlstmArguments {
    const void *x, *R, *bias;                      // (b l 4 h p), any floating dtype; S: (h p 4 p), (h 4 p) or null
    const void *c, *n, *h, *m;                     // S: (s h p) each, or all null
    const int32_t* cu_seqlens;                     // (s + 1) or null
    void* y;                                       // (b l h p)
    void *final_c, *final_n, *final_h, *final_m;   // S: (s h p) each
    void *gates, *cells;                           // S: (b l h 4 p) both: i, f, z, o and c, n, h, m; or null
    int64_t dtype, sequences, length, heads, p, threads;
    int64_t x_batch, x_time;
};

namespace SSMZOO_ISA {

constexpr int64_t kSequences = 8;  // of a task, at most: rows of its products

// The sequences of a task: which they are, where they start in y's rows of heads, and how long they are.
struct Group {
    int64_t count, index[kSequences], start[kSequences], batch[kSequences], length[kSequences];

    // How many of them have a token at time t.
    int64_t running(int64_t t) const {
        int64_t rows = count;
        while (rows > 0 && length[rows - 1] <= t) --rows;
        return rows;
    }
};

inline Group group_of(const SlstmArguments& a, int64_t number) {
    Group g;
    g.count = minimum(kSequences, a.sequences - number * kSequences);
    for (int64_t i = 0; i < g.count; ++i) {
        const int64_t index = number * kSequences + i;
        const int64_t start = a.cu_seqlens ? a.cu_seqlens[index] : 0;
        const int64_t length = a.cu_seqlens ? a.cu_seqlens[index + 1] - start : a.length;
        int64_t place = i;
        for (; place > 0 && g.length[place - 1] < length; --place) {
            g.index[place] = g.index[place - 1];
            g.start[place] = g.start[place - 1];
            g.batch[place] = g.batch[place - 1];
            g.length[place] = g.length[place - 1];
        }
        g.index[place] = index;
        g.start[place] = start;
        g.batch[place] = a.cu_seqlens ? 0 : index;
        g.length[place] = length;
    }
    return g;
}

inline int64_t groups(const SlstmArguments& a) { return ceil_div(a.sequences, kSequences); }

// Where a sequence's token t of a head lies among (b l h).
inline int64_t token_of(const SlstmArguments& a, const Group& g, int64_t row, int64_t t, int64_t head) {
    return ((g.batch[row] * a.length + g.start[row] + t) * a.heads) + head;
}

// Where gate `gate` of it lies in x.
inline int64_t input_of(const SlstmArguments& a, const Group& g, int64_t row, int64_t t, int64_t gate, int64_t head) {
    return g.batch[row] * a.x_batch + (g.start[row] + t) * a.x_time + (gate * a.heads + head) * a.p;
}

// A matrix whose columns lie in panels, each as wide as a product's: it is read from front to back.
template <class S>
struct Panels {
    static constexpr int64_t wide = kVectors * Lanes<S>::count;
    S* p;
    int64_t inner, columns;  // columns: in whole panels

    void take(Memory<S>& memory, int64_t rows, int64_t width) {
        inner = rows;
        columns = round_up(width, wide);
        p = memory.take(inner * columns);
    }

    S& at(int64_t k, int64_t column) { return p[(column / wide * inner + k) * wide + column % wide]; }

    void clear() { memset(p, 0, sizeof(S) * static_cast<size_t>(inner * columns)); }

    // C (rows, columns) = A (rows, inner) times it, onto what is there where `added`.
    void multiply(const S* A, int64_t lda, S* C, int64_t ldc, int64_t rows, bool added) const {
        for (int64_t j = 0; j < columns; j += wide)
            multiply_rows<S, kRows, kVectors, Shape::full>({A, lda, 1}, p + j * inner, wide, C + j, ldc, rows, inner, 0,
                                                          {added, S(1)});
    }
};

// What one vector of channels becomes at a token, from its gates before activation and the state before.
template <class S>
struct Cell {
    using V = typename Lanes<S>::V;
    V kept, m, decay, weight, z, o, c, n, h;

    static SSMZOO_INLINE Cell of(V i, V f, V z, V o, V c, V n, V m) {
        Cell cell;
        const V none = splat(-S(1) / S(0));
        cell.kept = choose<S>(n == V{}, none, m - softplus<S>(-f));
        cell.m = larger<S>(cell.kept, i);
        cell.decay = exp<S>(cell.kept - cell.m);
        cell.weight = exp<S>(i - cell.m);
        cell.z = tanh<S>(z);
        cell.o = sigmoid<S>(o);
        cell.c = fma(cell.decay, c, cell.weight * cell.z);
        cell.n = fma(cell.decay, n, cell.weight);
        cell.h = cell.o * (cell.c / cell.n);
        return cell;
    }
};

}  // namespace SSMZOO_ISA
}  // namespace ssmzoo
