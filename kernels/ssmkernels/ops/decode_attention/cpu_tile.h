// A few queries that share a head of keys and values, against one tile of these: products, weights, sums of values.
//
// Each sum's order depends on the head's size and on the tile alone, not on which queries are taken together.
#pragma once

#include "native/tanh.h"
#include "native/tiles.h"

namespace ssmzoo {
namespace SSMZOO_ISA {

constexpr int64_t kKeys = 32;  // of a tile

template <class S>
constexpr int kRows = Lanes<S>::count >= 16 ? 4 : 2;  // queries at once: they share each read of a key or value

template <class S>
constexpr S kNothing = -S(__builtin_inf());

inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// The next tile of a cache, brought into the second-level cache a few lines at a time while another is at work. In the
// order of memory: in any other the processor's own prefetching does not help, and memory is two to three times
// slower. Not into the first level, whose few open requests would hold up the computation.
template <class T>
struct Ahead {
    static constexpr int64_t line = 64 / sizeof(T);
    const T* const* rows;
    int64_t count, heads, head_step, size, share;  // `share` of a head's elements at once, a multiple of a line
    int64_t row = 0, head = 0, done = 0;

    SSMZOO_INLINE void fetch() {
        if (row >= count) return;
        const T* from = rows[row] + head * head_step + done;
        for (int64_t i = 0; i < share; i += line) __builtin_prefetch(from + i, 0, 2);
        done += share;
        if (done < size) return;
        done = 0;
        if (++head == heads) head = 0, ++row;
    }
};

// scores[r][j] = q[r] . (keys[j] + at), for so many queries r; of keys as many at once as fill a vector, be they past
// `count`.
template <class T, int rows, class S>
void products(S* scores, const S* q, int64_t q_row, const T* const* keys, int64_t at, int64_t count, int64_t size,
              Ahead<T>& ahead) {
    using V = typename Lanes<S>::V;
    constexpr int lanes = Lanes<S>::count, together = lanes / rows;
    for (int64_t j = 0; j < count; j += together) {
        V sums[lanes] = {};
        int64_t i = 0;
        for (; i + lanes <= size; i += lanes)
            for (int c = 0; c < together; ++c) {
                const V key = read(keys[j + c] + at + i);
                for (int r = 0; r < rows; ++r)
                    sums[r * together + c] = fma(load(q + r * q_row + i), key, sums[r * together + c]);
            }
        if (i < size)
            for (int c = 0; c < together; ++c) {
                const V key = read_some(keys[j + c] + at + i, size - i);
                for (int r = 0; r < rows; ++r)
                    sums[r * together + c] = fma(load(q + r * q_row + i), key, sums[r * together + c]);
            }
        S found[lanes];
        store(found, sum_lanes<S, lanes>(sums));
        for (int r = 0; r < rows; ++r) memcpy(scores + r * kKeys + j, found + r * together, together * sizeof(S));
        for (int c = 0; c < together; ++c) ahead.fetch();
    }
}

// What turns products into logits; `slope` is the head's, the key of index 0 lies `distance` behind the query.
template <class S>
struct Logits {
    S scale, softcap, slope, distance;
    S first, last;  // keys from `first` on and before `last` are seen
};

// The greatest logit so far, and the sum of e^(logit - greatest).
template <class S>
struct Softmax {
    S top, total;
};

// Products of one query → weights e^(logit - greatest), in place; returns what earlier sums have to be multiplied by.
template <class S>
S weigh(S* scores, int64_t count, const Logits<S>& logits, Softmax<S>& softmax) {
    using V = typename Lanes<S>::V;
    constexpr int lanes = Lanes<S>::count;
    S numbers[lanes];
    for (int i = 0; i < lanes; ++i) numbers[i] = S(i);
    const V steps = load(numbers);
    V tops = splat<S>(kNothing<S>);
    for (int64_t j = 0; j < count; j += lanes) {
        const V index = steps + splat<S>(S(j));
        V s = load(scores + j) * splat<S>(logits.scale);
        if (logits.softcap > S(0)) s = splat<S>(logits.softcap) * tanh<S>(s / splat<S>(logits.softcap));
        if (logits.slope != S(0)) s = s - splat<S>(logits.slope) * (splat<S>(logits.distance) - index);
        s = ((index >= splat<S>(logits.first)) & (index < splat<S>(logits.last))) ? s : splat<S>(kNothing<S>);
        tops = s > tops ? s : tops;
        store(scores + j, s);
    }
    S each[lanes], top = softmax.top;
    store(each, tops);
    for (int i = 0; i < lanes; ++i) top = each[i] > top ? each[i] : top;
    const S before = softmax.top, base = top == kNothing<S> ? S(0) : top;
    V sums = {};
    for (int64_t j = 0; j < count; j += lanes) {
        const V weight = exp<S>(load(scores + j) - splat<S>(base));
        sums = sums + weight;
        store(scores + j, weight);
    }
    const S factor = top == before ? S(1) : exp<S>(splat<S>(before - base))[0];
    softmax = {top, softmax.total * factor + sum_lanes<S, 1>(&sums)[0]};
    return factor;
}

// sums[r] = factors[r] sums[r] + weights[r][j] (values[j] + at) over j, for so many queries r and vectors of a head;
// of a single vector only `some` lanes are there.
template <class T, int rows, int vectors, class S>
SSMZOO_INLINE void add_values(S* sums, int64_t sums_row, const S* factors, const S* weights, const T* const* values,
                              int64_t at, int64_t count, int64_t some, Ahead<T>& ahead) {
    using V = typename Lanes<S>::V;
    constexpr int lanes = Lanes<S>::count;
    V acc[rows][vectors];
    for (int r = 0; r < rows; ++r)
        for (int i = 0; i < vectors; ++i)
            acc[r][i] = load(sums + r * sums_row + i * lanes) * splat<S>(factors[r]);
    for (int64_t j = 0; j < count; ++j) {
        V x[vectors];
        for (int i = 0; i < vectors; ++i)
            x[i] = vectors > 1 ? read(values[j] + at + i * lanes) : read_some(values[j] + at, some);
        for (int r = 0; r < rows; ++r) {
            const V weight = splat<S>(weights[r * kKeys + j]);
            for (int i = 0; i < vectors; ++i) acc[r][i] = fma(weight, x[i], acc[r][i]);
        }
        ahead.fetch();
    }
    for (int r = 0; r < rows; ++r)
        for (int i = 0; i < vectors; ++i) store(sums + r * sums_row + i * lanes, acc[r][i]);
}

}  // namespace SSMZOO_ISA
}  // namespace ssmzoo
