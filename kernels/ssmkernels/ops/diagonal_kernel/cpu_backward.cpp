// The kernel of a diagonal state-space model, backward: from the gradient g of its taps,
//
//     dweight = Σ_t g_t conj(ratio^t)     dratio = conj(weight) Σ_t g_t conj(t ratio^{t-1}),   twice these where complex
//
// With t = q r + i, t ratio^{t-1} = ratio^{qr} (i ratio^{i-1}) + (q r ratio^{qr-1}) ratio^i: what a block's taps sum to
// with the powers within a block and with their derivatives, which is a matrix product, gives all, and no power is ever
// divided.
#include "diagonal_kernel/cpu.h"

namespace ssmzoo {

// Beside the gradients of the taps, where they go: one part for each span, (spans d n).
struct DiagonalBackwardArguments {
    DiagonalArguments a;
    double *dratio, *dweight;
};

namespace SSMZOO_ISA {
namespace {

// What a task keeps of each state.
enum { kRatio, kPower, kBefore, kStart, kStartBefore, kWeightSum, kRatioSum, kArrays };

// Lanes are states, n rounded up to whole vectors: those beyond n have weight 0.
template <class S, bool complex>
struct Memory {
    static constexpr int64_t kParts = complex ? 2 : 1;
    int64_t states, width;
    S *powers, *sums, *rows;  // (block width), (kRows width), (kRows block)
    double* numbers;          // kArrays times (states) real parts, then as many imaginary ones

    Memory(int64_t n, const Cut& cut, char* scratch)
        : states(round_up(n, kLanes)), width(2 * kParts * states) {
        powers = reinterpret_cast<S*>(scratch);
        sums = powers + cut.block * width;
        rows = sums + kRows * width;
        numbers = reinterpret_cast<double*>(rows + kRows * cut.block);
    }

    static size_t bytes(int64_t n, const Cut& cut) {
        const Memory m(n, cut, nullptr);
        return sizeof(S) * static_cast<size_t>((cut.block + kRows) * m.width + kRows * cut.block) +
               sizeof(double) * static_cast<size_t>(2 * kArrays * m.states);
    }

    Number<complex, VD> get(int64_t array, int64_t j) const {
        const double* p = numbers + 2 * array * states + j;
        return {load(p), complex ? load(p + states) : VD{}};
    }

    void set(int64_t array, int64_t j, Number<complex, VD> x) const {
        double* p = numbers + 2 * array * states + j;
        store(p, x.re);
        if (complex) store(p + states, x.im);
    }

    void set_one(int64_t array, int64_t j, Scalar<complex> x) const {
        double* p = numbers + 2 * array * states + j;
        p[0] = x.re;
        p[states] = x.im;
    }
};

template <bool complex>
SSMZOO_INLINE Number<complex, VD> conjugate(Number<complex, VD> x) {
    return {x.re, -x.im};
}

template <bool complex>
SSMZOO_INLINE Number<complex, VD> operator+(Number<complex, VD> a, Number<complex, VD> b) {
    return {a.re + b.re, a.im + b.im};
}

// Row i: the real and imaginary parts of ratio^i, then those of i ratio^{i-1}. Leaves ratio^r in kPower, ratio^{r-1} in
// kBefore.
template <class S, bool complex>
void fill_powers(const Memory<S, complex>& m, int64_t block) {
    const int64_t parts = Memory<S, complex>::kParts;
    for (int64_t i = 0; i < block; ++i)
        for (int64_t j = 0; j < m.states; j += kLanes) {
            S* row = m.powers + i * m.width + j;
            const Number<complex, VD> power = m.get(kPower, j), before = m.get(kBefore, j);
            const double times = static_cast<double>(i);
            write_rounded(row, power.re);
            write_rounded(row + parts * m.states, before.re * times);
            if (complex) {
                write_rounded(row + m.states, power.im);
                write_rounded(row + 3 * m.states, before.im * times);
            }
            m.set(kBefore, j, power);
            m.set(kPower, j, power * m.get(kRatio, j));
        }
}

// `sums` (kRows width) = rows · powers, from the column-th on.
template <class S, bool complex, int64_t columns>
int64_t sum_columns(const Memory<S, complex>& m, const S* rows, int64_t block, int64_t column) {
    constexpr int64_t wide = columns * Lanes<S>::count;
    for (; column + wide <= m.width; column += wide) {
        typename Lanes<S>::V sums[kRows][columns] = {};
        add_product<S, columns>(sums, rows, block, 1, m.powers + column, m.width, block);
        for (int64_t row = 0; row < kRows; ++row)
            for (int64_t j = 0; j < columns; ++j)
                store(m.sums + row * m.width + column + j * Lanes<S>::count, sums[row][j]);
    }
    return column;
}

SSMZOO_INLINE VD read_doubles(const double* p) { return load(p); }

SSMZOO_INLINE VD read_doubles(const float* p) {
    typedef float Half __attribute__((vector_size(SSMZOO_VECTOR_BYTES / 2)));
    Half half;
    memcpy(&half, p, sizeof half);
    return __builtin_convertvector(half, VD);
}

// Adds one block's part to both gradients, and moves kStart and kStartBefore to the next block. `before` counts the
// taps before the block.
template <class S, bool complex>
void add_block(const Memory<S, complex>& m, const S* sums, int64_t before) {
    const int64_t parts = Memory<S, complex>::kParts;
    for (int64_t j = 0; j < m.states; j += kLanes) {
        // g is real: its sums with conjugates are the conjugates of its sums
        const Number<complex, VD> with_powers = {read_doubles(sums + j),
                                                 complex ? -read_doubles(sums + m.states + j) : VD{}};
        const Number<complex, VD> with_derivatives = {read_doubles(sums + parts * m.states + j),
                                                      complex ? -read_doubles(sums + 3 * m.states + j) : VD{}};
        const Number<complex, VD> start = m.get(kStart, j), last = m.get(kStartBefore, j);
        const double times = static_cast<double>(before);
        const Number<complex, VD> derivative = {last.re * times, last.im * times};
        m.set(kWeightSum, j, m.get(kWeightSum, j) + with_powers * conjugate(start));
        m.set(kRatioSum, j,
              m.get(kRatioSum, j) + (with_derivatives * conjugate(start) + with_powers * conjugate(derivative)));
        m.set(kStartBefore, j, start * m.get(kBefore, j));
        m.set(kStart, j, start * m.get(kPower, j));
    }
}

template <class S, bool complex>
void span_of_gradients(const DiagonalBackwardArguments& b, const Cut& cut, int64_t channel, int64_t span, char* scratch) {
    const DiagonalArguments& a = b.a;
    const Memory<S, complex> m(a.n, cut, scratch);
    const int64_t first = cut.first(span), count = cut.count(span);
    memset(m.numbers, 0, sizeof(double) * static_cast<size_t>(2 * kArrays * m.states));
    for (int64_t j = 0; j < a.n; ++j) {
        m.set_one(kRatio, j, read_number<complex>(a.ratio, channel * a.n + j));
        m.set_one(kPower, j, {1, 0});
    }
    fill_powers(m, cut.block);
    for (int64_t j = 0; j < a.n; ++j) {  // kPower holds ratio^r now, and kBefore ratio^{r-1}
        const double *leap = m.numbers + 2 * kPower * m.states + j, *last = m.numbers + 2 * kBefore * m.states + j;
        const Scalar<complex> whole = {leap[0], leap[m.states]}, but_one = {last[0], last[m.states]};
        m.set_one(kStart, j, power(whole, first));
        if (first) m.set_one(kStartBefore, j, power(whole, first - 1) * but_one);
    }
    const S* gradients = static_cast<const S*>(a.taps) + channel * a.length;
    for (int64_t q = first; q < first + count; q += kRows) {
        const S* rows = gradients + q * cut.block;
        const int64_t there = minimum(kRows * cut.block, a.length - q * cut.block);
        if (there < kRows * cut.block) {
            memset(m.rows, 0, sizeof(S) * static_cast<size_t>(kRows * cut.block));
            memcpy(m.rows, rows, sizeof(S) * static_cast<size_t>(there));
            rows = m.rows;
        }
        int64_t column = sum_columns<S, complex, kColumns>(m, rows, cut.block, 0);
        if (kColumns > 2) column = sum_columns<S, complex, 2>(m, rows, cut.block, column);
        sum_columns<S, complex, 1>(m, rows, cut.block, column);
        for (int64_t row = 0; row < minimum(kRows, first + count - q); ++row)
            add_block(m, m.sums + row * m.width, (q + row) * cut.block);
    }
    const int64_t parts = complex ? 2 : 1, to = (span * a.d + channel) * a.n;
    const double twice = complex ? 2.0 : 1.0;
    for (int64_t j = 0; j < a.n; ++j) {
        const double *dw = m.numbers + 2 * kWeightSum * m.states + j, *dr = m.numbers + 2 * kRatioSum * m.states + j;
        const Scalar<complex> weight = read_number<complex>(a.weight, channel * a.n + j);
        const Scalar<complex> dratio = Scalar<complex>{weight.re, -weight.im} * Scalar<complex>{dr[0], dr[m.states]};
        b.dweight[parts * (to + j)] = twice * dw[0];
        b.dratio[parts * (to + j)] = twice * dratio.re;
        if (complex) {
            b.dweight[2 * (to + j) + 1] = twice * dw[m.states];
            b.dratio[2 * (to + j) + 1] = twice * dratio.im;
        }
    }
}

template <class S, bool complex>
int all_gradients(const DiagonalBackwardArguments& b) {
    const Cut cut(b.a.length);
    const size_t bytes = Memory<S, complex>::bytes(b.a.n, cut);
    return parallel_for(b.a.d * cut.spans, b.a.threads, bytes, [&](int64_t i, char* scratch) {
        span_of_gradients<S, complex>(b, cut, i / cut.spans, i % cut.spans, scratch);
    });
}

}  // namespace
}  // namespace SSMZOO_ISA
}  // namespace ssmzoo

SSMZOO_EXPORT(diagonal_kernel_backward)(const ssmzoo::DiagonalBackwardArguments* b) {
    using namespace ssmzoo::SSMZOO_ISA;
    if (b->a.dtype) return b->a.complex ? all_gradients<double, true>(*b) : all_gradients<double, false>(*b);
    return b->a.complex ? all_gradients<float, true>(*b) : all_gradients<float, false>(*b);
}
