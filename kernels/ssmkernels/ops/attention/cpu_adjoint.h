// Attention's backward pass: each weight is computed again from the log-sum-exp of its query.
//
// The queries are cut into parts by their number alone. A part has gradients of keys and values of its own, which are
// added up in their order: no thread waits for another, and there are the same bits on any number of threads.
#pragma once

#include "attention/cpu_pieces.h"

namespace ssmzoo {
namespace SSMZOO_ISA {

template <class S>
struct Backward {
    Piece<S> keys, values;
    S *dk, *dv;                         // (kKeys k_row), (kKeys v_row)
    S *dq, *lse, *delta;                // (range groups k_row), (range groups) · log2(e), (range groups)
    S *q, *d_out, *weights, *slopes;    // (rows k_row), (rows v_row), (rows kKeys), likewise: gradients of logits
    S *added, *panel;                   // (rows k_row)

    int64_t take(S* p, const AttentionArguments& a, const Sizes& sizes) {
        Memory<S> memory = {p, 0};
        const int64_t all = minimum(a.l, kRange) * sizes.groups;
        keys.take(memory, sizes.k_row);
        values.take(memory, sizes.v_row);
        dk = memory.take(kKeys * sizes.k_row);
        dv = memory.take(kKeys * sizes.v_row);
        dq = memory.take(all * sizes.k_row);
        lse = memory.take(all);
        delta = memory.take(all);
        q = memory.take(sizes.rows * sizes.k_row);
        d_out = memory.take(sizes.rows * sizes.v_row);
        weights = memory.take(sizes.rows * kKeys);
        slopes = memory.take(sizes.rows * kKeys);
        added = memory.take(maximum(sizes.rows * sizes.k_row, sizes.v_row));
        panel = memory.take(panel_size<S>(maximum(maximum(sizes.k_row, sizes.v_row), maximum(sizes.rows, kKeys))));
        return memory.used;
    }

    // Of each row its log-sum-exp, and what the softmax takes off the gradient of every logit: d_out · out - d_lse.
    void begin(const AttentionBackwardArguments& all, const Range& range, const Sizes& sizes) const {
        using V = typename Lanes<S>::V;
        const AttentionArguments& a = all.forward;
        for (int64_t i = range.first; i < range.end; ++i)
            for (int64_t r = 0; r < sizes.groups; ++r) {
                const int64_t place = (i - range.first) * sizes.groups + r, head = range.group * sizes.groups + r;
                const int64_t at = ((range.batch * a.l + i) * a.h + head) * a.v_size;
                const int64_t of_sums = (range.batch * a.h + head) * a.l + i;
                read_row(d_out, all.d_out, a.dtype, at, a.v_size);
                read_row(added, a.out, all.out_dtype, at, a.v_size);
                V sum = {};
                vectors<S>(sizes.v_row, [&](int64_t c) { sum = fma(load(d_out + c), load(added + c), sum); });
                const S d_lse = all.d_lse ? static_cast<const S*>(all.d_lse)[of_sums] : S(0);
                delta[place] = sum_lanes<S, 1>(&sum)[0] - d_lse;
                const S sums = static_cast<const S*>(a.sums)[of_sums];
                lse[place] = sums == kNothing<S> ? S(0) : S(double(sums) * kLog2e);  // nothing has a weight in such a row
            }
    }

    // A row's logits of `count` keys, and products of its d_out with their values → weights, and gradients of the
    // logits; 0 for keys that are not in the span.
    static void weigh(S* weights, S* slopes, int64_t count, Span span, S lse, S delta) {
        using V = typename Lanes<S>::V;
        for (int64_t j = 0; j < count; j += Lanes<S>::count) {
            const V weight = exp2<S>(load(weights + j) - splat(lse));
            const V slope = weight * (load(slopes + j) - splat(delta));
            store(weights + j, within<S>(span, j, weight, S(0)));
            store(slopes + j, within<S>(span, j, slope, S(0)));
        }
    }

    void meet(const AttentionBackwardArguments& all, const Range& range, const Sizes& sizes, const Tile& tile) const {
        constexpr int64_t lanes = Lanes<S>::count;
        const AttentionArguments& a = all.forward;
        const int64_t rows = tile.count * sizes.groups, seen = tile.end - tile.first, columns = round_up(seen, lanes);
        const int64_t k_first = tile.first * sizes.k_row, v_first = tile.first * sizes.v_row;
        const Onto<S> onto = {true, S(1)};
        gather(q, sizes.k_row, S(a.scale * kLog2e), range, tile, sizes.groups, a.q, a.dtype, a.q_batch, a.q_time, a.q_head,
               a.k_size);
        gather(d_out, sizes.v_row, S(1), range, tile, sizes.groups, all.d_out, a.dtype, a.l * a.h * a.v_size,
               a.h * a.v_size, a.v_size, a.v_size);
        multiply_some<S>({q, sizes.k_row, 1}, keys.turned + tile.first, kKeys, weights, kKeys, rows, columns, a.k_size,
                         panel);
        multiply_some<S>({d_out, sizes.v_row, 1}, values.turned + tile.first, kKeys, slopes, kKeys, rows, columns,
                         a.v_size, panel);
        each_row(tile, sizes.groups, [&](int64_t row, int64_t place, Span span) {
            weigh(weights + row * kKeys, slopes + row * kKeys, seen, span, lse[place], delta[place]);
        });
        multiply_some<S>({weights, 1, kKeys}, d_out, sizes.v_row, dv + v_first, sizes.v_row, seen, sizes.v_row, rows,
                         panel, onto);
        multiply_some<S>({slopes, 1, kKeys}, q, sizes.k_row, dk + k_first, sizes.k_row, seen, sizes.k_row, rows, panel,
                         onto);
        if (tile.follow()) {  // onto the sums where they lie
            S* own = dq + tile.queries[0] * sizes.groups * sizes.k_row;
            return multiply_some<S>({slopes, kKeys, 1}, keys.rows + k_first, sizes.k_row, own, sizes.k_row, rows,
                                    sizes.k_row, seen, panel, onto);
        }
        multiply_some<S>({slopes, kKeys, 1}, keys.rows + k_first, sizes.k_row, added, sizes.k_row, rows, sizes.k_row, seen,
                         panel);
        each_row(tile, sizes.groups, [&](int64_t row, int64_t place, Span) {
            S *to = dq + place * sizes.k_row, *from = added + row * sizes.k_row;
            for (int64_t c = 0; c < sizes.k_row; c += lanes) store(to + c, load(to + c) + load(from + c));
        });
    }

    // Adds the gradients of a piece's keys or values to those of a part.
    static void add(S* to, const S* from, int64_t count, int64_t size, int64_t row, S scale) {
        for (int64_t j = 0; j < count; ++j)
            vectors<S>(size, [&](int64_t c) {
                S* p = to + j * size + c;
                write_some(p, fma(splat(scale), load(from + j * row + c), read_some(p, size - c)), size - c);
            });
    }

    template <class Keys>
    void run(const AttentionBackwardArguments& all, int64_t part, const Range& range, const Sizes& sizes,
             const Keys& seen) {
        const AttentionArguments& a = all.forward;
        const int64_t own = ((part * a.batch + range.batch) * a.g + range.group) * a.m;
        memset(dq, 0, sizeof(S) * static_cast<size_t>((range.end - range.first) * sizes.groups * sizes.k_row));
        begin(all, range, sizes);
        walk(
            seen, range, sizes,
            [&](int64_t key, int64_t count) {
                keys.read(a.k, a.dtype, key_place(a, range, key), a.k_time, count, a.k_size);
                keys.turn(count);
                values.read(a.v, a.dtype, value_place(a, range, key), a.v_time, count, a.v_size);
                values.turn(count);
                memset(dk, 0, sizeof(S) * static_cast<size_t>(count * sizes.k_row));
                memset(dv, 0, sizeof(S) * static_cast<size_t>(count * sizes.v_row));
                return keys.finite;
            },
            [&](const Tile& tile) { meet(all, range, sizes, tile); },
            [&](int64_t key, int64_t count) {
                add(static_cast<S*>(all.dk) + (own + key) * a.k_size, dk, count, a.k_size, sizes.k_row, S(1 / kLog2e));
                add(static_cast<S*>(all.dv) + (own + key) * a.v_size, dv, count, a.v_size, sizes.v_row, S(1));
            });
        for (int64_t i = range.first; i < range.end; ++i)
            for (int64_t r = 0; r < sizes.groups; ++r) {
                S* from = dq + ((i - range.first) * sizes.groups + r) * sizes.k_row;
                vectors<S>(sizes.k_row, [&](int64_t c) { store(from + c, splat(S(a.scale)) * load(from + c)); });
                const int64_t at = ((range.batch * a.l + i) * a.h + range.group * sizes.groups + r) * a.k_size;
                write_row(all.dq, a.dtype, at, from, a.k_size);
            }
    }
};

// make(range, scratch of so many bytes) gives what each range's queries see.
template <class S, class Make>
int backward(const AttentionBackwardArguments& all, int64_t bytes, const Make& make) {
    const AttentionArguments& a = all.forward;
    const Sizes sizes(a, Lanes<S>::count);
    Backward<S> layout;
    const int64_t numbers = int64_t(sizeof(S)) * layout.take(nullptr, a, sizes);
    return parallel_for(a.batch * a.g * all.parts, a.threads, numbers + bytes, [&](int64_t task, char* scratch) {
        Backward<S> own;
        own.take(reinterpret_cast<S*>(scratch), a, sizes);
        const int64_t part = task % all.parts, end = (part + 1) * sizes.ranges / all.parts;
        for (int64_t i = part * sizes.ranges / all.parts; i < end; ++i) {
            const Range range(a, sizes, task / all.parts, i);
            own.run(all, part, range, sizes, make(range, scratch + numbers));
        }
    });
}

}  // namespace SSMZOO_ISA
}  // namespace ssmzoo
