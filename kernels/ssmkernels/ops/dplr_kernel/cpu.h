// What the forward and backward passes of S4's kernel share: arguments, one channel's system, and the tables of its
// powers.
//
// The bilinear rule's matrix is diagonal plus low rank, Ā = D - Σ_r left_r right_r, and so (with D^m for D to the m-th)
//
//     v Ā = v D - Σ_r (v · left_r) right_r                        one row at a time, in O(N r)
//     Ā^m = D^m - Σ_{k<m} Σ_r (D^{m-1-k} left_r) (right_r Ā^k)     a product of two tables: no squaring
//
// With t = q m + i, K_t = (C Ā^i) (Ā^{mq} B̄) is then one product of the rows C Ā^i, m of them, and the columns, as
// many as there are blocks of m taps. All tables are in double precision; that last product is in the result's.
//
// A state is real: [h] or, of conjugate pairs, [Re h, Im h]; each half is padded with zeros to whole vectors.
#pragma once

#include "native/gemm.h"
#include "native/parallel.h"

namespace ssmzoo {

// All are contiguous. N is n, or 2n for pairs.
struct DplrArguments {
    const double *diagonal, *left, *right, *B, *C;  // (d N), (d r N), (d r N), (d N), (d N)
    void* K;                                        // (d length), double where not single
    int64_t d, n, rank, length, pairs, single, threads;
};

namespace SSMZOO_ISA {

constexpr int64_t kPad = Lanes<float>::count;

inline int64_t round_up(int64_t x) { return ceil_div(x, kPad) * kPad; }

// Sizes that all channels share.
struct Sizes {
    int64_t n, half, N;  // states, padded; and both halves
    int64_t rank, m, inner, blocks, length;
    bool pairs;

    // A row of the tables that make Ā^m costs less than a column of Ā^{mq} B̄, which reads all of Ā^m.
    explicit Sizes(const DplrArguments& a)
        : n(a.n), half(round_up(a.n)), N(half * (a.pairs ? 2 : 1)), rank(a.rank), length(a.length), pairs(a.pairs) {
        m = kPad;
        while (m * m * rank < 2 * length && m < length) m += kPad;
        inner = m * rank;
        blocks = ceil_div(length, m);
    }

    int64_t longest() const {
        const int64_t a = inner > N ? inner : N;
        return a > blocks ? a : blocks;
    }
};

// Memory handed out piece by piece, each on a cache line's border.
struct Pieces {
    char* next;

    template <class T>
    T* take(int64_t count) {
        T* piece = reinterpret_cast<T*>(next);
        next += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
        return piece;
    }
};

inline double dot(const double* a, const double* b, int64_t N) {
    VD sum[2] = {};
    for (int64_t j = 0; j < N; j += 2 * Lanes<double>::count) {  // N is a multiple of twice as many
        sum[0] = fma(load(a + j), load(b + j), sum[0]);
        sum[1] = fma(load(a + j + Lanes<double>::count), load(b + j + Lanes<double>::count), sum[1]);
    }
    sum[0] = sum[0] + sum[1];
    return sum_lanes<double, 1>(sum)[0];
}

// y += c x
inline void add_times(double* y, double c, const double* x, int64_t N) {
    const VD factor = splat<double>(c);
    for (int64_t j = 0; j < N; j += Lanes<double>::count) store(y + j, fma(factor, load(x + j), load(y + j)));
}

// y = D x, or y = D^T x, which is also what a row becomes: x D.
template <bool transposed>
inline void turn(double* y, const double* D, const double* x, const Sizes& s) {
    for (int64_t j = 0; j < s.half; j += Lanes<double>::count) {
        const VD re = load(D + j), x_re = load(x + j);
        if (!s.pairs) {
            store(y + j, re * x_re);
            continue;
        }
        const VD im = transposed ? -load(D + s.half + j) : load(D + s.half + j), x_im = load(x + s.half + j);
        store(y + j, fma(re, x_re, -(im * x_im)));
        store(y + s.half + j, fma(im, x_re, re * x_im));
    }
}

// (n), or (2 n), to padded halves.
inline void read_state(double* to, const double* from, const Sizes& s) {
    for (int64_t part = 0; part * s.half < s.N; ++part)
        for (int64_t j = 0; j < s.half; ++j) to[part * s.half + j] = j < s.n ? from[part * s.n + j] : 0.0;
}

inline void write_state(double* to, const double* from, const Sizes& s) {
    for (int64_t part = 0; part * s.half < s.N; ++part) memcpy(to + part * s.n, from + part * s.half, sizeof(double) * s.n);
}

// One channel's system and tables. Where there is but one block, Ā^m and what makes it are left out.
struct Channel {
    double *D, *left, *right, *B, *C;  // as given, padded
    double *rows;                      // C Ā^i (m N)
    double *V, *W;                     // right_r Ā^k and D^{m-1-k} left_r (m r N)
    double *before, *power;            // D^{m-1} and D^m
    double *transposed;                // Ā^m, transposed (N N)
    double *columns;                   // Ā^{mq} B̄ (blocks N)
    double *panel;

    static int64_t bytes(const Sizes& s) {
        return 8 * ((5 + 2 * s.rank) * s.N + (s.m + 2 * s.inner + s.N + s.blocks) * s.N + panel_size<double>(s.longest())) +
               64 * 16;
    }

    Channel(const Sizes& s, Pieces& memory) {
        D = memory.take<double>(s.N);
        B = memory.take<double>(s.N);
        C = memory.take<double>(s.N);
        before = memory.take<double>(s.N);
        power = memory.take<double>(s.N);
        left = memory.take<double>(s.rank * s.N);
        right = memory.take<double>(s.rank * s.N);
        rows = memory.take<double>(s.m * s.N);
        V = memory.take<double>(s.inner * s.N);
        W = memory.take<double>(s.inner * s.N);
        transposed = memory.take<double>(s.N * s.N);
        columns = memory.take<double>(s.blocks * s.N);
        panel = memory.take<double>(panel_size<double>(s.longest()));
    }

    void compute(const DplrArguments& a, const Sizes& s, int64_t channel) {
        const int64_t N = s.n * (s.pairs ? 2 : 1);
        read_state(D, a.diagonal + channel * N, s);
        read_state(B, a.B + channel * N, s);
        read_state(C, a.C + channel * N, s);
        for (int64_t r = 0; r < s.rank; ++r) {
            read_state(left + r * s.N, a.left + (channel * s.rank + r) * N, s);
            read_state(right + r * s.N, a.right + (channel * s.rank + r) * N, s);
        }
        memcpy(rows, C, sizeof(double) * s.N);
        for (int64_t i = 1; i < s.m; ++i) step(rows + i * s.N, rows + (i - 1) * s.N, s);
        memcpy(columns, B, sizeof(double) * s.N);
        if (s.blocks == 1) return;
        memcpy(V, right, sizeof(double) * s.rank * s.N);
        for (int64_t i = s.rank; i < s.inner; ++i) step(V + i * s.N, V + (i - s.rank) * s.N, s);
        memcpy(W + (s.inner - s.rank) * s.N, left, sizeof(double) * s.rank * s.N);
        for (int64_t i = s.inner - s.rank - 1; i >= 0; --i) turn<false>(W + i * s.N, D, W + (i + s.rank) * s.N, s);
        raise(s);
        product<double>({V, 1, s.N}, W, s.N, transposed, s.N, s.N, s.N, s.inner, panel);
        for (int64_t j = 0; j < s.N * s.N; ++j) transposed[j] = -transposed[j];
        for (int64_t j = 0; j < s.half; ++j) {
            transposed[j * s.N + j] += power[j];
            if (!s.pairs) continue;
            const int64_t i = s.half + j;
            transposed[i * s.N + i] += power[j];
            transposed[j * s.N + i] += power[i];  // of Ā^m's lower left, Im D^m
            transposed[i * s.N + j] -= power[i];
        }
        for (int64_t q = 1; q < s.blocks; ++q)
            row_product(columns + (q - 1) * s.N, transposed, s.N, columns + q * s.N, s.N, s.N);
    }

    // next = v Ā
    void step(double* next, const double* v, const Sizes& s) const {
        turn<true>(next, D, v, s);
        for (int64_t r = 0; r < s.rank; ++r) add_times(next, -dot(v, left + r * s.N, s.N), right + r * s.N, s.N);
    }

    void raise(const Sizes& s) {
        for (int64_t j = 0; j < s.N; ++j) before[j] = j < s.half ? 1.0 : 0.0;
        for (int64_t i = 1; i < s.m; ++i) {
            turn<false>(power, D, before, s);
            memcpy(before, power, sizeof(double) * s.N);
        }
        turn<false>(power, D, before, s);
    }
};

}  // namespace SSMZOO_ISA
}  // namespace ssmzoo
