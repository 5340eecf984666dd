// Attention's forward pass for a range of queries: the online softmax of FlashAttention (arXiv 2205.14135, algorithm
// 1).
#pragma once

#include "attention/cpu_pieces.h"

namespace ssmzoo {
namespace SSMZOO_ISA {

// The greatest logit of a row so far, and the sum of 2^(logit - greatest).
template <class S>
struct Softmax {
    S top, total;
};

// A row's logits of `count` keys → weights 2^(logit - greatest), in place, 0 for keys that are not in the span; returns
// what earlier sums are to be multiplied by.
template <class S>
S weigh(S* scores, int64_t count, Span span, Softmax<S>& softmax) {
    using V = typename Lanes<S>::V;
    constexpr int lanes = Lanes<S>::count;
    V tops = splat(kNothing<S>);
    const bool whole = span.first <= 0 && round_up(count, lanes) <= span.end;
    for (int64_t j = 0; j < count; j += lanes) {
        V s = load(scores + j);
        if (!whole) store(scores + j, s = within<S>(span, j, s, kNothing<S>));
        tops = larger<S>(tops, s);
    }
    S each[lanes];
    store(each, tops);
    const S before = softmax.top;
    S top = before;
    for (int i = 0; i < lanes; ++i) top = each[i] > top ? each[i] : top;
    const S base = top == kNothing<S> ? S(0) : top;
    V sums = {};
    for (int64_t j = 0; j < count; j += lanes) {
        const V weight = exp2<S>(load(scores + j) - splat(base));
        sums = sums + weight;
        store(scores + j, weight);
    }
    const S factor = top == before ? S(1) : exp2<S>(splat(before - base))[0];
    softmax = {top, softmax.total * factor + sum_lanes<S, 1>(&sums)[0]};
    return factor;
}

template <class S>
struct Forward {
    Piece<S> keys, values;
    Softmax<S>* softmaxes;                   // (range groups)
    S *sums, *q, *scores, *factors, *added;  // (range groups v_row), (rows k_row), (rows kKeys), (rows), (rows v_row)
    S* panel;

    int64_t take(S* p, const AttentionArguments& a, const Sizes& sizes) {
        Memory<S> memory = {p, 0};
        const int64_t all = minimum(a.l, kRange) * sizes.groups;
        keys.take(memory, sizes.k_row);
        values.take(memory, sizes.v_row);
        softmaxes = reinterpret_cast<Softmax<S>*>(memory.take(2 * all));
        sums = memory.take(all * sizes.v_row);
        q = memory.take(sizes.rows * sizes.k_row);
        scores = memory.take(sizes.rows * kKeys);
        factors = memory.take(sizes.rows);
        added = memory.take(sizes.rows * sizes.v_row);
        panel = memory.take(panel_size<S>(maximum(sizes.k_row, kKeys)));
        return memory.used;
    }

    void meet(const AttentionArguments& a, const Range& range, const Sizes& sizes, const Tile& tile) const {
        using V = typename Lanes<S>::V;
        constexpr int64_t lanes = Lanes<S>::count;
        const int64_t rows = tile.count * sizes.groups, seen = tile.end - tile.first;
        gather(q, sizes.k_row, S(a.scale * kLog2e), range, tile, sizes.groups, a.q, a.dtype, a.q_batch, a.q_time, a.q_head,
               a.k_size);
        multiply_some<S>({q, sizes.k_row, 1}, keys.turned + tile.first, kKeys, scores, kKeys, rows,
                         round_up(seen, lanes), a.k_size, panel);
        each_row(tile, sizes.groups, [&](int64_t row, int64_t place, Span span) {
            factors[row] = weigh(scores + row * kKeys, seen, span, softmaxes[place]);
        });
        const S* held = values.rows + tile.first * sizes.v_row;
        if (tile.follow()) {  // onto the sums where they lie
            S* own = sums + tile.queries[0] * sizes.groups * sizes.v_row;
            return multiply_some<S>({scores, kKeys, 1}, held, sizes.v_row, own, sizes.v_row, rows, sizes.v_row, seen, panel,
                                    {true, S(1), factors});
        }
        multiply_some<S>({scores, kKeys, 1}, held, sizes.v_row, added, sizes.v_row, rows, sizes.v_row, seen, panel);
        each_row(tile, sizes.groups, [&](int64_t row, int64_t place, Span) {
            S *to = sums + place * sizes.v_row, *from = added + row * sizes.v_row;
            const V factor = splat(factors[row]);
            for (int64_t c = 0; c < sizes.v_row; c += lanes) store(to + c, fma(factor, load(to + c), load(from + c)));
        });
    }

    void finish(const AttentionArguments& a, const Range& range, const Sizes& sizes) const {
        using V = typename Lanes<S>::V;
        for (int64_t i = range.first; i < range.end; ++i)
            for (int64_t r = 0; r < sizes.groups; ++r) {
                const int64_t place = (i - range.first) * sizes.groups + r, head = range.group * sizes.groups + r;
                const Softmax<S> softmax = softmaxes[place];
                S* own = sums + place * sizes.v_row;
                const V total = splat(softmax.total == S(0) ? S(1) : softmax.total);
                vectors<S>(sizes.v_row, [&](int64_t c) { store(own + c, load(own + c) / total); });
                const int64_t at = ((range.batch * a.l + i) * a.h + head) * a.v_size;
                write_row(a.out, a.dtype, at, own, a.v_size);
                if (a.exact) narrow_row<S, S>(a.exact, at, own, a.v_size);
                const S lse = softmax.total == S(0)
                                  ? kNothing<S>
                                  : S(double(softmax.top) / kLog2e + __builtin_log(double(softmax.total)));
                const int64_t of_sums = (range.batch * a.h + head) * a.l + i;
                if (a.lse) static_cast<S*>(a.lse)[of_sums] = lse;
                if (a.sums) static_cast<S*>(a.sums)[of_sums] = lse;
            }
    }

    template <class Keys>
    void run(const AttentionArguments& a, const Range& range, const Sizes& sizes, const Keys& seen) {
        const int64_t places = (range.end - range.first) * sizes.groups;
        for (int64_t i = 0; i < places; ++i) softmaxes[i] = {kNothing<S>, S(0)};
        memset(sums, 0, sizeof(S) * static_cast<size_t>(places * sizes.v_row));
        walk(
            seen, range, sizes,
            [&](int64_t key, int64_t count) {
                keys.read(a.k, a.dtype, key_place(a, range, key), a.k_time, count, a.k_size);
                keys.turn(count);
                values.read(a.v, a.dtype, value_place(a, range, key), a.v_time, count, a.v_size);
                return values.finite;
            },
            [&](const Tile& tile) { meet(a, range, sizes, tile); }, [](int64_t, int64_t) {});
        finish(a, range, sizes);
    }
};

// make(range, scratch of so many bytes) gives what each range's queries see.
template <class S, class Make>
int forward(const AttentionArguments& a, int64_t bytes, const Make& make) {
    const Sizes sizes(a, Lanes<S>::count);
    Forward<S> layout;
    const int64_t numbers = int64_t(sizeof(S)) * layout.take(nullptr, a, sizes);
    return parallel_for(a.batch * a.g * sizes.ranges, a.threads, numbers + bytes, [&](int64_t task, char* scratch) {
        Forward<S> own;
        own.take(reinterpret_cast<S*>(scratch), a, sizes);
        const Range range(a, sizes, task / sizes.ranges, task % sizes.ranges);
        own.run(a, range, sizes, make(range, scratch + numbers));
    });
}

}  // namespace SSMZOO_ISA
}  // namespace ssmzoo
