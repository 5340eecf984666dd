// S4's kernel, backward: the tables once more, and then each step of the forward pass from the last to the first.
#include "dplr_kernel/cpu.h"

namespace ssmzoo {

struct DplrBackwardArguments {
    DplrArguments forward;  // K is not read
    const void* dK;
    double *ddiagonal, *dleft, *dright, *dB, *dC;
};

namespace SSMZOO_ISA {
namespace {

// The gradient of D from y = D x, or y = x D where transposed.
template <bool transposed>
void add_turned(double* dD, const double* dy, const double* x, const Sizes& s) {
    for (int64_t j = 0; j < s.half; j += Lanes<double>::count) {
        const VD y_re = load(dy + j), x_re = load(x + j);
        VD re = fma(y_re, x_re, load(dD + j));
        if (s.pairs) {
            const VD y_im = load(dy + s.half + j), x_im = load(x + s.half + j);
            re = fma(y_im, x_im, re);
            const VD im = fma(y_im, x_re, -(y_re * x_im));
            store(dD + s.half + j, load(dD + s.half + j) + (transposed ? -im : im));
        }
        store(dD + j, re);
    }
}

inline void add(double* y, const double* x, int64_t N) { add_times(y, 1.0, x, N); }

// Gradients of one channel's system, padded.
struct Gradients {
    double *D, *left, *right, *C, *row, *turned;

    static int64_t bytes(const Sizes& s) { return 8 * (5 + 2 * s.rank) * s.N + 64 * 8; }

    Gradients(const Sizes& s, Pieces& memory) {
        D = memory.take<double>(s.N);
        C = memory.take<double>(s.N);
        row = memory.take<double>(s.N);
        turned = memory.take<double>(s.N);
        left = memory.take<double>(s.rank * s.N);
        right = memory.take<double>(s.rank * s.N);
        memset(D, 0, sizeof(double) * static_cast<size_t>(s.N));
        memset(left, 0, sizeof(double) * static_cast<size_t>(s.rank * s.N));
        memset(right, 0, sizeof(double) * static_cast<size_t>(s.rank * s.N));
    }

    // Through v_{i+1} = v_i Ā for i = count - 2 ... 0, where v_i and its own gradient lie `stride` apart; leaves the
    // gradient of v_0 in `row`.
    void chain(const Channel& c, const Sizes& s, const double* v, const double* dv, int64_t stride, int64_t count) {
        memcpy(row, dv + (count - 1) * stride, sizeof(double) * static_cast<size_t>(s.N));
        for (int64_t i = count - 2; i >= 0; --i) {
            const double* x = v + i * stride;
            add_turned<true>(D, row, x, s);
            turn<false>(turned, c.D, row, s);
            for (int64_t r = 0; r < s.rank; ++r) {
                const double *left_r = c.left + r * s.N, *right_r = c.right + r * s.N;
                const double inner = dot(x, left_r, s.N), dinner = -dot(row, right_r, s.N);
                add_times(right + r * s.N, -inner, row, s.N);
                add_times(left + r * s.N, dinner, x, s.N);
                add_times(turned, dinner, left_r, s.N);
            }
            memcpy(row, turned, sizeof(double) * static_cast<size_t>(s.N));
            add(row, dv + i * stride, s.N);
        }
    }

    // Through D^m, given the gradient of Ā^m (N N), in which it stands as it is.
    void diagonal_power(const Channel& c, const Sizes& s, const double* dpower) {
        for (int64_t j = 0; j < s.half; ++j) {
            const int64_t i = s.half + j;
            const double m = static_cast<double>(s.m), re = c.before[j];
            double dre = dpower[j * s.N + j];
            if (s.pairs) {
                dre += dpower[i * s.N + i];
                const double im = c.before[i], dim = dpower[i * s.N + j] - dpower[j * s.N + i];
                D[j] += m * (re * dre + im * dim);
                D[i] += m * (re * dim - im * dre);
            } else {
                D[j] += m * re * dre;
            }
        }
    }

    // Through Ā^m = D^m - Σ W V; dpower is its gradient, dtable room for (m r N).
    void power(const Channel& c, const Sizes& s, const double* dpower, double* dpower_transposed, double* dtable) {
        diagonal_power(c, s, dpower);
        product<double>({c.W, s.N, 1}, dpower, s.N, dtable, s.N, s.inner, s.N, s.N, c.panel);
        for (int64_t i = 0; i < s.inner * s.N; ++i) dtable[i] = -dtable[i];
        for (int64_t r = 0; r < s.rank; ++r) {
            chain(c, s, c.V + r * s.N, dtable + r * s.N, s.rank * s.N, s.m);
            add(right + r * s.N, row, s.N);
        }
        transpose(dpower_transposed, s.N, dpower, s.N, s.N, s.N);
        product<double>({c.V, s.N, 1}, dpower_transposed, s.N, dtable, s.N, s.inner, s.N, s.N, c.panel);
        for (int64_t i = 0; i < s.inner * s.N; ++i) dtable[i] = -dtable[i];
        for (int64_t i = 0; i < s.inner - s.rank; ++i) {  // W_i = D W_{i + rank}
            add_turned<false>(D, dtable + i * s.N, c.W + (i + s.rank) * s.N, s);
            turn<true>(turned, c.D, dtable + i * s.N, s);
            add(dtable + (i + s.rank) * s.N, turned, s.N);
        }
        add(left, dtable + (s.inner - s.rank) * s.N, s.rank * s.N);
    }
};

template <class T>
int gradients(const DplrBackwardArguments& b) {
    const DplrArguments& a = b.forward;
    const Sizes s(a);
    const int64_t own = s.blocks * s.m + 2 * (s.blocks + s.m) * s.N + panel_size<T>(s.longest());
    const int64_t doubles = (s.blocks + s.m + 3 * s.N + s.inner) * s.N;
    const size_t bytes = static_cast<size_t>(Channel::bytes(s) + Gradients::bytes(s) + own * sizeof(T) + 8 * doubles + 64 * 16);
    return parallel_for(a.d, a.threads, bytes, [&](int64_t channel, char* scratch) {
        Pieces memory{scratch};
        Channel c(s, memory);
        Gradients g(s, memory);
        T* dK = memory.take<T>(s.blocks * s.m);
        T *rows = memory.take<T>(s.m * s.N), *drows_T = memory.take<T>(s.m * s.N);
        T *columns = memory.take<T>(s.blocks * s.N), *dcolumns_T = memory.take<T>(s.blocks * s.N);
        T* panel = memory.take<T>(panel_size<T>(s.longest()));
        double *dcolumns = memory.take<double>(s.blocks * s.N), *drows = memory.take<double>(s.m * s.N);
        double *power = memory.take<double>(s.N * s.N), *dpower = memory.take<double>(s.N * s.N);
        double* dpower_transposed = memory.take<double>(s.N * s.N);
        double* dtable = memory.take<double>(s.inner * s.N);

        c.compute(a, s, channel);
        memcpy(dK, static_cast<const T*>(b.dK) + channel * s.length, sizeof(T) * static_cast<size_t>(s.length));
        for (int64_t t = s.length; t < s.blocks * s.m; ++t) dK[t] = T(0);

        // K = columns rows^T
        convert(rows, c.rows, s.m * s.N);
        convert(columns, c.columns, s.blocks * s.N);
        product<T>({dK, s.m, 1}, rows, s.N, dcolumns_T, s.N, s.blocks, s.N, s.m, panel);
        product<T>({dK, 1, s.m}, columns, s.N, drows_T, s.N, s.m, s.N, s.blocks, panel);
        convert(dcolumns, dcolumns_T, s.blocks * s.N);
        convert(drows, drows_T, s.m * s.N);

        g.chain(c, s, c.rows, drows, s.N, s.m);
        memcpy(g.C, g.row, sizeof(double) * static_cast<size_t>(s.N));

        if (s.blocks > 1) {  // columns_q = Ā^m columns_{q-1}
            transpose(power, s.N, c.transposed, s.N, s.N, s.N);
            for (int64_t q = s.blocks - 1; q > 0; --q) {
                row_product(dcolumns + q * s.N, power, s.N, g.turned, s.N, s.N);
                add(dcolumns + (q - 1) * s.N, g.turned, s.N);
            }
            product<double>({dcolumns + s.N, 1, s.N}, c.columns, s.N, dpower, s.N, s.N, s.N, s.blocks - 1, c.panel);
            g.power(c, s, dpower, dpower_transposed, dtable);
        }

        const int64_t N = s.n * (s.pairs ? 2 : 1);
        write_state(b.ddiagonal + channel * N, g.D, s);
        write_state(b.dB + channel * N, dcolumns, s);
        write_state(b.dC + channel * N, g.C, s);
        for (int64_t r = 0; r < s.rank; ++r) {
            write_state(b.dleft + (channel * s.rank + r) * N, g.left + r * s.N, s);
            write_state(b.dright + (channel * s.rank + r) * N, g.right + r * s.N, s);
        }
    });
}

}  // namespace
}  // namespace SSMZOO_ISA
}  // namespace ssmzoo

SSMZOO_EXPORT(dplr_kernel_backward)(const ssmzoo::DplrBackwardArguments* a) {
    using namespace ssmzoo::SSMZOO_ISA;
    return a->forward.single ? gradients<float>(*a) : gradients<double>(*a);
}
