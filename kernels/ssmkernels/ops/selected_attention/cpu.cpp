// Attention to selected blocks, forward: FlashAttention's sums (arXiv 2205.14135, algorithm 1) for a range of queries.
#include "native/choose.h"
#include "selected_attention/cpu.h"

namespace ssmzoo {

namespace SSMZOO_ISA {
namespace {

// The greatest logit of a row so far, and the sum of e^(logit - greatest).
template <class S>
struct Softmax {
    S top, total;
};

// Products of a row with keys → weights e^(logit - greatest), in place; returns what earlier sums are to be multiplied by.
template <class S>
S weigh(S* scores, int64_t count, S scale, Softmax<S>& softmax) {
    using V = typename Lanes<S>::V;
    constexpr int lanes = Lanes<S>::count;
    V tops = splat(kNothing<S>);
    for (int64_t j = 0; j < count; j += lanes) {
        V s = load(scores + j) * splat(scale);
        if (count - j < lanes) s = choose<S>(first_lanes<S>(count - j), s, splat(kNothing<S>));
        tops = larger<S>(tops, s);
        store(scores + j, s);
    }
    S each[lanes];
    store(each, tops);
    const S before = softmax.top;
    S top = before;
    for (int i = 0; i < lanes; ++i) top = each[i] > top ? each[i] : top;
    const S base = top == kNothing<S> ? S(0) : top;
    V sums = {};
    for (int64_t j = 0; j < count; j += lanes) {
        const V weight = exp<S>(load(scores + j) - splat(base));
        sums = sums + weight;
        store(scores + j, weight);
    }
    const S factor = top == before ? S(1) : exp<S>(splat(before - base))[0];
    softmax = {top, softmax.total * factor + sum_lanes<S, 1>(&sums)[0]};
    return factor;
}

template <class S>
struct Forward {
    Piece<S> keys, values;
    Softmax<S>* softmaxes;                   // (range groups)
    S *sums, *q, *scores, *factors, *added;  // (range groups v_row), (rows k_row), (rows kKeys), (rows), (rows v_row)
    S* panel;

    int64_t take(S* p, const SelectedArguments& a, const Sizes& sizes) {
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

    void meet(const SelectedArguments& a, const Range& range, const Sizes& sizes, const Tile& tile) const {
        using V = typename Lanes<S>::V;
        constexpr int64_t lanes = Lanes<S>::count;
        const int64_t rows = tile.count * sizes.groups;
        gather(q, sizes.k_row, range, tile, sizes.groups, a.q, a.dtype, a.q_batch, a.q_time, a.q_head, a.k_size);
        multiply_some<S>({q, sizes.k_row, 1}, keys.turned, kKeys, scores, kKeys, rows, round_up(tile.seen, lanes),
                         a.k_size, panel);
        each_row(tile, sizes.groups, [&](int64_t row, int64_t place) {
            factors[row] = weigh(scores + row * kKeys, tile.seen, S(a.scale), softmaxes[place]);
        });
        multiply_some<S>({scores, kKeys, 1}, values.rows, sizes.v_row, added, sizes.v_row, rows, sizes.v_row, tile.seen,
                         panel);
        each_row(tile, sizes.groups, [&](int64_t row, int64_t place) {
            S *to = sums + place * sizes.v_row, *from = added + row * sizes.v_row;
            const V factor = splat(factors[row]);
            for (int64_t c = 0; c < sizes.v_row; c += lanes) store(to + c, fma(factor, load(to + c), load(from + c)));
        });
    }

    void finish(const SelectedArguments& a, const Range& range, const Sizes& sizes) const {
        using V = typename Lanes<S>::V;
        for (int64_t i = range.first; i < range.end; ++i)
            for (int64_t r = 0; r < sizes.groups; ++r) {
                const int64_t place = (i - range.first) * sizes.groups + r, head = range.head * sizes.groups + r;
                const Softmax<S> softmax = softmaxes[place];
                S* own = sums + place * sizes.v_row;
                const V total = splat(softmax.total == S(0) ? S(1) : softmax.total);
                vectors<S>(sizes.v_row, [&](int64_t c) { store(own + c, load(own + c) / total); });
                const int64_t at = ((range.batch * a.l + i) * a.h + head) * a.v_size;
                write_row(a.out, a.dtype, at, own, a.v_size);
                if (a.exact) narrow_row<S, S>(a.exact, at, own, a.v_size);
                const S lse = softmax.total == S(0)
                                  ? kNothing<S>
                                  : S(double(softmax.top) + __builtin_log(double(softmax.total)));
                const int64_t of_sums = (range.batch * a.h + head) * a.l + i;
                if (a.lse) static_cast<S*>(a.lse)[of_sums] = lse;
                if (a.sums) static_cast<S*>(a.sums)[of_sums] = lse;
            }
    }

    void run(const SelectedArguments& a, const Range& range, const Sizes& sizes, const Lists& lists) {
        const int64_t places = (range.end - range.first) * sizes.groups;
        for (int64_t i = 0; i < places; ++i) softmaxes[i] = {kNothing<S>, S(0)};
        memset(sums, 0, sizeof(S) * static_cast<size_t>(places * sizes.v_row));
        lists.fill(a, range, sizes);
        walk(
            a, range, sizes, lists,
            [&](int64_t key, int64_t count) {
                keys.read(a.k, a.dtype, key_place(a, range, key), a.k_time, count, a.k_size);
                keys.turn(count);
                values.read(a.v, a.dtype, value_place(a, range, key), a.v_time, count, a.v_size);
            },
            [&](const Tile& tile) { meet(a, range, sizes, tile); }, [](int64_t, int64_t) {});
        finish(a, range, sizes);
    }
};

template <class S>
int forward(const SelectedArguments& a) {
    const Sizes sizes(a, Lanes<S>::count);
    Forward<S> layout;
    const int64_t numbers = int64_t(sizeof(S)) * layout.take(nullptr, a, sizes);
    return parallel_for(a.batch * a.g * sizes.ranges, a.threads, numbers + Lists::bytes(a, sizes),
                        [&](int64_t task, char* scratch) {
                            Forward<S> own;
                            own.take(reinterpret_cast<S*>(scratch), a, sizes);
                            const Range range(a, task / sizes.ranges, task % sizes.ranges);
                            own.run(a, range, sizes, Lists(scratch + numbers, sizes));
                        });
}

}  // namespace
}  // namespace SSMZOO_ISA
}  // namespace ssmzoo

SSMZOO_EXPORT_SUMS(selected_attention, SelectedArguments, dtype, forward)
