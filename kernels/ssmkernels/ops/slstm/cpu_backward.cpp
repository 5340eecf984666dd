// The scalar memory's backward pass, from gates and states that the forward pass has kept.
//
// With D the gradient of decay times decay and W that of weight times weight, as if m were a constant, and M that of m
// through all but these two, the larger of m's two arguments also gets what m does to both, M - D - W:
//
//     where it was the old m     dm_old = M - W     di = W
//     where it was i             dm_old = D         di = M - D
//
// With dm_old for the gradient of log σ(f_t) + m_{t-1}. Either way, what would cancel is never added. Gradients of the
// recurrent weights are products over a few tokens at a time.
#include "native/exports.h"
#include "slstm/cpu.h"

namespace ssmzoo {

struct SlstmBackwardArguments {
    SlstmArguments forward;
    const void* dy;                                     // (b l h p), contiguous
    const void *dfinal_c, *dfinal_n, *dfinal_h, *dfinal_m;  // S: (s h p) each, or null
    void* dx;                                           // (b l 4 h p), contiguous
    void *dR, *dbias;                                   // S: (groups h p 4 p), (groups h 4 p)
    void *dc, *dn, *dh, *dm;                            // S: (s h p) each
};

namespace SSMZOO_ISA {
namespace {

constexpr int64_t kKept = 64;  // rows of gradients that one product with the states before them takes

template <class S>
struct Backward {
    using V = typename Lanes<S>::V;
    Panels<S> R;  // (4 width, p): transposed
    S *dgates, *before, *dR, *dbias;  // (kept, 4 width), (kept, width), (p, 4 width), (4 width)
    S *dy, *dc, *dn, *dh, *dm;        // (width); (rows, width) each, dh as wide as the product is
    S *panel, *zeros;
    int64_t width, kept;

    int64_t take(S* p, const SlstmArguments& a) {
        Memory<S> memory = {p, 0};
        width = round_up(a.p, Lanes<S>::count);
        R.take(memory, 4 * width, a.p);
        dgates = memory.take(kKept * 4 * width);
        before = memory.take(kKept * width);
        dR = memory.take(a.p * 4 * width);
        dbias = memory.take(4 * width);
        dy = memory.take(width);
        dc = memory.take(kSequences * width);
        dn = memory.take(kSequences * width);
        dh = memory.take(kSequences * R.columns);
        dm = memory.take(kSequences * width);
        panel = memory.take(panel_size<S>(kKept));
        zeros = memory.take(width);
        return memory.used;
    }

    void read_weights(const SlstmArguments& a, int64_t head) {
        R.clear();
        for (int64_t k = 0; k < a.p; ++k)
            for (int64_t gate = 0; gate < 4; ++gate)
                for (int64_t j = 0; j < a.p; ++j)
                    R.at(gate * width + j, k) = *at<S>(a.R, ((head * a.p + k) * 4 + gate) * a.p + j);
    }

    // One of a row's states before token t: what was kept of the token before, or the initial one, or zeros.
    const S* state(const SlstmArguments& a, const Group& g, int64_t row, int64_t t, int64_t head, int64_t part) const {
        if (t) return at<S>(a.cells, (token_of(a, g, row, t - 1, head) * 4 + part) * a.p);
        const void* initial[] = {a.c, a.n, a.h, a.m};
        return initial[part] ? at<S>(initial[part], (g.index[row] * a.heads + head) * a.p) : zeros;
    }

    void token(const SlstmBackwardArguments& b, const Group& g, int64_t row, int64_t t, int64_t head) {
        const SlstmArguments& a = b.forward;
        const int64_t place = token_of(a, g, row, t, head), p = a.p;
        const S *gates = at<S>(a.gates, place * 4 * p), *h = state(a, g, row, t, head, 2);
        const S *c = state(a, g, row, t, head, 0), *n = state(a, g, row, t, head, 1), *m = state(a, g, row, t, head, 3);
        S *to = dgates + kept * 4 * width, *dc_row = dc + row * width, *dn_row = dn + row * width;
        S *dm_row = dm + row * width, *dh_row = dh + row * R.columns;
        read_row(dy, b.dy, a.dtype, place * p, p);
        for (int64_t j = 0; j < width; ++j) before[kept * width + j] = j < p ? h[j] : S(0);
        vectors<S>(width, [&](int64_t j) {
            const auto get = [&](const S* from) { return read_some(from + j, p - j); };
            const V i = get(gates), f = get(gates + p);
            const V c_before = get(c), n_before = get(n);
            const Cell<S> cell = Cell<S>::of(i, f, get(gates + 2 * p), get(gates + 3 * p), c_before, n_before, get(m));
            const V one = splat(S(1)), half = splat(S(0.5));
            const V gradient = load(dh_row + j) + load(dy + j), inverse = one / cell.n;
            const V gc = fma(gradient * cell.o, inverse, load(dc_row + j));
            const V gn = load(dn_row + j) - gradient * cell.h * inverse;
            const V M = load(dm_row + j);
            const V D = cell.decay * fma(gc, c_before, gn * n_before), W = cell.weight * fma(gc, cell.z, gn);
            const V both = half * (M - D - W);
            const V dkept = choose<S>(cell.kept > i, M - W, choose<S>(cell.kept < i, D, D + both));
            const V gates_now[] = {
                choose<S>(cell.kept > i, W, choose<S>(cell.kept < i, M - D, W + both)),
                dkept * sigmoid<S>(-f),
                gc * cell.weight * (one - cell.z * cell.z),
                gradient * cell.h * (one - cell.o),
            };
            store(dc_row + j, gc * cell.decay);
            store(dn_row + j, gn * cell.decay);
            store(dm_row + j, dkept);
            for (int64_t gate = 0; gate < 4; ++gate) {
                S* sum = dbias + gate * width + j;
                store(to + gate * width + j, gates_now[gate]);
                store(sum, load(sum) + gates_now[gate]);
            }
        });
        const int64_t first = (g.batch[row] * a.length + g.start[row] + t) * 4 * a.heads + head;
        for (int64_t gate = 0; gate < 4; ++gate)
            write_row(b.dx, a.dtype, (first + gate * a.heads) * p, to + gate * width, p);
    }

    // Adds what the rows that are kept give for R.
    void finish_rows(const SlstmArguments& a) {
        product<S>({before, 1, width}, dgates, 4 * width, dR, 4 * width, a.p, 4 * width, kept, panel, 0, {true, S(1)});
        kept = 0;
    }

    void run(const SlstmBackwardArguments& b, const Group& g, int64_t group, int64_t head) {
        const SlstmArguments& a = b.forward;
        const auto clear = [](S* p, int64_t count) { memset(p, 0, sizeof(S) * static_cast<size_t>(count)); };
        read_weights(a, head);
        clear(dR, a.p * 4 * width);
        clear(dbias, 4 * width);
        clear(zeros, width);
        clear(dh, kSequences * R.columns);
        kept = 0;
        for (int64_t row = 0; row < g.count; ++row) begin(b, g, row, head);
        for (int64_t t = g.length[0] - 1; t >= 0; --t) {
            const int64_t rows = g.running(t);
            if (kept + rows > kKept) finish_rows(a);
            const int64_t first = kept;
            for (int64_t row = 0; row < rows; ++row, ++kept) token(b, g, row, t, head);
            R.multiply(dgates + first * 4 * width, 4 * width, dh, R.columns, rows, false);
        }
        finish_rows(a);
        for (int64_t row = 0; row < g.count; ++row) end(b, g, row, head);
        const int64_t at_head = group * a.heads + head;
        for (int64_t gate = 0; gate < 4; ++gate) {
            for (int64_t k = 0; k < a.p; ++k)
                write(b.dR, ((at_head * a.p + k) * 4 + gate) * a.p, dR + k * 4 * width + gate * width, a.p);
            write(b.dbias, (at_head * 4 + gate) * a.p, dbias + gate * width, a.p);
        }
    }

  private:
    static void write(void* to, int64_t offset, const S* from, int64_t count) {
        memcpy(static_cast<S*>(to) + offset, from, sizeof(S) * static_cast<size_t>(count));
    }

    // The gradients of a row's final state.
    void begin(const SlstmBackwardArguments& b, const Group& g, int64_t row, int64_t head) {
        const SlstmArguments& a = b.forward;
        const int64_t offset = (g.index[row] * a.heads + head) * a.p;
        const auto given = [&](const void* from, int64_t j) { return from && j < a.p ? *at<S>(from, offset + j) : S(0); };
        for (int64_t j = 0; j < width; ++j) {
            dc[row * width + j] = given(b.dfinal_c, j);
            dn[row * width + j] = given(b.dfinal_n, j);
            dh[row * R.columns + j] = given(b.dfinal_h, j);
            dm[row * width + j] = given(b.dfinal_m, j);
        }
    }

    void end(const SlstmBackwardArguments& b, const Group& g, int64_t row, int64_t head) {
        const SlstmArguments& a = b.forward;
        const int64_t offset = (g.index[row] * a.heads + head) * a.p;
        write(b.dc, offset, dc + row * width, a.p);
        write(b.dn, offset, dn + row * width, a.p);
        write(b.dh, offset, dh + row * R.columns, a.p);
        write(b.dm, offset, dm + row * width, a.p);
    }
};

template <class S>
int backward(const SlstmBackwardArguments& b) {
    const SlstmArguments& a = b.forward;
    Backward<S> w;
    const size_t bytes = sizeof(S) * static_cast<size_t>(w.take(nullptr, a));
    return parallel_for(groups(a) * a.heads, a.threads, bytes, [&](int64_t task, char* scratch) {
        Backward<S> own;
        own.take(reinterpret_cast<S*>(scratch), a);
        own.run(b, group_of(a, task / a.heads), task / a.heads, task % a.heads);
    });
}

}  // namespace
}  // namespace SSMZOO_ISA
}  // namespace ssmzoo

SSMZOO_EXPORT_SUMS(slstm_backward, SlstmBackwardArguments, forward.dtype, backward)
