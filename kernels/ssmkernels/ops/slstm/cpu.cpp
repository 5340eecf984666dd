// The scalar memory's forward pass.
#include "native/exports.h"
#include "slstm/cpu.h"

namespace ssmzoo {
namespace SSMZOO_ISA {
namespace {

template <class S>
struct Forward {
    using V = typename Lanes<S>::V;
    Panels<S> R;                         // (p, 4 width), zeros beyond p
    S *bias, *gates, *c, *n, *h, *m;     // (4 width); (rows, columns); (rows, width) each
    int64_t width;                       // p in whole vectors

    int64_t take(S* p, const SlstmArguments& a) {
        Memory<S> memory = {p, 0};
        width = round_up(a.p, Lanes<S>::count);
        R.take(memory, a.p, 4 * width);
        bias = memory.take(4 * width);
        gates = memory.take(kSequences * R.columns);
        c = memory.take(kSequences * width);
        n = memory.take(kSequences * width);
        h = memory.take(kSequences * width);
        m = memory.take(kSequences * width);
        return memory.used;
    }

    void read_weights(const SlstmArguments& a, int64_t head) {
        R.clear();
        for (int64_t gate = 0; gate < 4; ++gate) {
            for (int64_t k = 0; k < a.p; ++k)
                for (int64_t j = 0; j < a.p; ++j)
                    R.at(k, gate * width + j) = *at<S>(a.R, ((head * a.p + k) * 4 + gate) * a.p + j);
            for (int64_t j = 0; j < width; ++j)
                bias[gate * width + j] = a.bias && j < a.p ? *at<S>(a.bias, (head * 4 + gate) * a.p + j) : S(0);
        }
    }

    void token(const SlstmArguments& a, const Group& g, int64_t rows, int64_t t, int64_t head) {
        for (int64_t row = 0; row < rows; ++row)
            for (int64_t gate = 0; gate < 4; ++gate) {
                S* to = gates + row * R.columns + gate * width;
                read_row(to, a.x, a.dtype, input_of(a, g, row, t, gate, head), a.p);
                vectors<S>(width, [&](int64_t j) { store(to + j, load(to + j) + load(bias + gate * width + j)); });
            }
        R.multiply(h, width, gates, R.columns, rows, true);
        for (int64_t row = 0; row < rows; ++row) {
            const S* gate = gates + row * R.columns;
            const int64_t place = token_of(a, g, row, t, head), at_row = row * width;
            vectors<S>(width, [&](int64_t j) {
                const Cell<S> cell =
                    Cell<S>::of(load(gate + j), load(gate + width + j), load(gate + 2 * width + j),
                                load(gate + 3 * width + j), load(c + at_row + j), load(n + at_row + j),
                                load(m + at_row + j));
                store(c + at_row + j, cell.c);
                store(n + at_row + j, cell.n);
                store(h + at_row + j, cell.h);
                store(m + at_row + j, cell.m);
            });
            write_row(a.y, a.dtype, place * a.p, h + at_row, a.p);
            if (a.gates) {
                const S* state[] = {c, n, h, m};
                for (int64_t part = 0; part < 4; ++part) {
                    write_wide(a.gates, (place * 4 + part) * a.p, gate + part * width, a.p);
                    write_wide(a.cells, (place * 4 + part) * a.p, state[part] + at_row, a.p);
                }
            }
        }
    }

    void run(const SlstmArguments& a, const Group& g, int64_t head) {
        read_weights(a, head);
        exchange(a, g, head, [](const void* from, void*, S* row, int64_t offset, int64_t p, int64_t width) {
            for (int64_t j = 0; j < width; ++j) row[j] = from && j < p ? *at<S>(from, offset + j) : S(0);
        });
        for (int64_t t = 0; t < g.length[0]; ++t) token(a, g, g.running(t), t, head);
        exchange(a, g, head, [](const void*, void* to, S* row, int64_t offset, int64_t p, int64_t) {
            write_wide(to, offset, row, p);
        });
    }

  private:
    static void write_wide(void* to, int64_t offset, const S* from, int64_t count) {
        memcpy(static_cast<S*>(to) + offset, from, sizeof(S) * static_cast<size_t>(count));
    }

    // f(initial, final, row in memory, offset in both) for each sequence's c, n, h and m.
    template <class F>
    void exchange(const SlstmArguments& a, const Group& g, int64_t head, const F& f) {
        for (int64_t row = 0; row < g.count; ++row) {
            const int64_t offset = (g.index[row] * a.heads + head) * a.p;
            f(a.c, a.final_c, c + row * width, offset, a.p, width);
            f(a.n, a.final_n, n + row * width, offset, a.p, width);
            f(a.h, a.final_h, h + row * width, offset, a.p, width);
            f(a.m, a.final_m, m + row * width, offset, a.p, width);
        }
    }
};

template <class S>
int forward(const SlstmArguments& a) {
    Forward<S> w;
    const size_t bytes = sizeof(S) * static_cast<size_t>(w.take(nullptr, a));
    return parallel_for(groups(a) * a.heads, a.threads, bytes, [&](int64_t task, char* scratch) {
        Forward<S> own;
        own.take(reinterpret_cast<S*>(scratch), a);
        own.run(a, group_of(a, task / a.heads), task % a.heads);
    });
}

}  // namespace
}  // namespace SSMZOO_ISA
}  // namespace ssmzoo

SSMZOO_EXPORT_SUMS(slstm, SlstmArguments, dtype, forward)
