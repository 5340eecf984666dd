// The kernel of a diagonal state-space model, forward.
#include "diagonal_kernel/cpu.h"

namespace ssmzoo {
namespace SSMZOO_ISA {
namespace {

// start ratio^i for i in [0, count), for N states side by side, which hides the latency of their products. The real
// parts of the j-th go to row j of the table, the imaginary ones times `sign` to row n + j; both times `factor`. Writes
// up to a whole vector; returns in `start` what comes after the last that was written.
template <class S, bool complex, int N>
void fill(S* table, int64_t stride, int64_t n, int64_t count, Scalar<complex>* start, const Scalar<complex>* ratio,
          double factor, double sign) {
    Number<complex, VD> value[N], step[N];
    for (int j = 0; j < N; ++j) {
        double re[kLanes], im[kLanes];
        Scalar<complex> x = start[j], leap = {1, 0};
        for (int64_t i = 0; i < kLanes; ++i) {
            re[i] = x.re;
            im[i] = x.im;
            x = x * ratio[j];
            leap = leap * ratio[j];
        }
        value[j] = {load(re), load(im)};
        step[j] = {splat<double>(leap.re), splat<double>(leap.im)};
    }
    for (int64_t i = 0; i < count; i += kLanes)
        for (int j = 0; j < N; ++j) {
            write_rounded(table + j * stride + i, value[j].re * factor);
            if (complex) write_rounded(table + (n + j) * stride + i, value[j].im * (factor * sign));
            value[j] = value[j] * step[j];
        }
    for (int j = 0; j < N; ++j) start[j] = {value[j].re[0], value[j].im[0]};
}

template <class S, bool complex>
void fill_all(S* table, int64_t stride, int64_t n, int64_t count, Scalar<complex>* start,
              const Scalar<complex>* ratio, double factor, double sign) {
    int64_t j = 0;
    for (; j + 4 <= n; j += 4)
        fill<S, complex, 4>(table + j * stride, stride, n, count, start + j, ratio + j, factor, sign);
    for (; j < n; ++j) fill<S, complex, 1>(table + j * stride, stride, n, count, start + j, ratio + j, factor, sign);
}

// Memory of a task, which all tasks of a thread share.
template <class S, bool complex>
struct Tables {
    int64_t depth, within_stride, starts_stride;

    // Rows are a cache line longer than they need be: a power of two apart, they would share a few lines of the cache
    Tables(int64_t n, const Cut& cut)
        : depth(complex ? 2 * n : n),
          within_stride(cut.block + 64 / sizeof(S)),
          starts_stride(round_up(minimum(kSpan, round_up(cut.blocks, kRows)), 8) + 64 / sizeof(S)) {}

    size_t bytes(int64_t n) const {
        return sizeof(S) * static_cast<size_t>(depth * (within_stride + starts_stride)) +
               2 * sizeof(Scalar<complex>) * static_cast<size_t>(n);
    }
};

template <class S, bool complex>
void span_of_taps(const DiagonalArguments& a, const Cut& cut, int64_t channel, int64_t span, char* scratch) {
    using V = typename Lanes<S>::V;
    const Tables<S, complex> tables(a.n, cut);
    S* within = reinterpret_cast<S*>(scratch);
    S* starts = within + tables.depth * tables.within_stride;
    Scalar<complex>* ratio = reinterpret_cast<Scalar<complex>*>(starts + tables.depth * tables.starts_stride);
    Scalar<complex>* value = ratio + a.n;
    const int64_t first = cut.first(span), count = cut.count(span);
    for (int64_t j = 0; j < a.n; ++j) {
        ratio[j] = read_number<complex>(a.ratio, channel * a.n + j);
        value[j] = {1, 0};
    }
    fill_all(within, tables.within_stride, a.n, cut.block, value, ratio, 1.0, 1.0);
    for (int64_t j = 0; j < a.n; ++j) {
        ratio[j] = value[j];  // to the power of a block
        value[j] = read_number<complex>(a.weight, channel * a.n + j) * power(ratio[j], first);
    }
    // 2 Re(xy) = 2 Re x Re y - 2 Im x Im y
    fill_all(starts, tables.starts_stride, a.n, round_up(count, kRows), value, ratio, complex ? 2.0 : 1.0, -1.0);

    S* taps = static_cast<S*>(a.taps) + channel * a.length;
    const int64_t end = minimum(cut.block, a.length);
    constexpr int64_t width = kColumns * Lanes<S>::count;
    for (int64_t i = 0; i < end; i += width)
        for (int64_t q = 0; q < count; q += kRows) {
            V sums[kRows][kColumns] = {};
            add_product<S, kColumns>(sums, starts + q, 1, tables.starts_stride, within + i, tables.within_stride,
                                     tables.depth);
            S tile[kRows][width];  // by loops that the compiler unrolls: else the sums would live in memory all along
            for (int64_t row = 0; row < kRows; ++row)
                for (int64_t j = 0; j < kColumns; ++j) store(tile[row] + j * Lanes<S>::count, sums[row][j]);
            for (int64_t row = 0; row < minimum(kRows, count - q); ++row) {
                const int64_t t = (first + q + row) * cut.block + i, there = minimum(width, a.length - t);
                if (there > 0) memcpy(taps + t, tile[row], sizeof(S) * static_cast<size_t>(there));
            }
        }
}

template <class S, bool complex>
int all_taps(const DiagonalArguments& a) {
    const Cut cut(a.length);
    const size_t bytes = Tables<S, complex>(a.n, cut).bytes(a.n);
    return parallel_for(a.d * cut.spans, a.threads, bytes, [&](int64_t i, char* scratch) {
        span_of_taps<S, complex>(a, cut, i / cut.spans, i % cut.spans, scratch);
    });
}

}  // namespace
}  // namespace SSMZOO_ISA
}  // namespace ssmzoo

SSMZOO_EXPORT(diagonal_kernel)(const ssmzoo::DiagonalArguments* a) {
    using namespace ssmzoo::SSMZOO_ISA;
    if (a->dtype) return a->complex ? all_taps<double, true>(*a) : all_taps<double, false>(*a);
    return a->complex ? all_taps<float, true>(*a) : all_taps<float, false>(*a);
}
