// One token of linear attention, bound by memory: each head's state is read and written once, as it lies.
#include "linear_attention/cpu.h"
#include "native/exports.h"

namespace ssmzoo {

struct LinearAttentionStepArguments {
    void* state;                    // S: (b h k v), contiguous
    const void *q, *k, *v;          // (b g k), likewise, (b h v), any floating dtype, contiguous
    const void *log_decay, *bonus;  // S: (h), (b h), (b h k) or null; (h k) or null; contiguous
    void* o;                        // (b h v)
    int64_t dtype, batch, heads, groups, keys, values, per_token, per_key, threads;
    double scale;
};

namespace SSMZOO_ISA {
namespace {

// o of N vectors of the value's channels, and their part of the state. `last`: how many numbers the last vector has.
template <class S, int N>
SSMZOO_INLINE void step_columns(S* state, int64_t values, int64_t keys, const S* q, const S* k, const S* w, const S* u,
                                const S* v, S* o, int64_t last) {
    using V = typename Lanes<S>::V;
    constexpr int lanes = Lanes<S>::count;
    V y[N] = {};
    for (int64_t r = 0; r < keys; ++r) {
        S* row = state + r * values;
        const V qs = splat(q[r]), ks = splat(k[r]), ws = splat(w[r]);
        for (int n = 0; n < N; ++n) {
            const V vs = load(v + n * lanes);
            const bool whole = n + 1 < N || last >= lanes;
            const V before = whole ? load(row + n * lanes) : load_some(row + n * lanes, last);
            const V after = fma(ws, before, ks * vs);
            y[n] = fma(qs, u ? fma(splat(u[r]) * ks, vs, before) : after, y[n]);
            if (whole)
                store(row + n * lanes, after);
            else
                store_some(row + n * lanes, after, last);
        }
    }
    for (int n = 0; n < N; ++n) store(o + n * lanes, y[n]);
}

template <class S>
int step_as(const LinearAttentionStepArguments& a) {
    constexpr int lanes = Lanes<S>::count, together = 4;
    const int64_t key = round_up(a.keys, kLine<S>), value = round_up(a.values, kLine<S>);
    const size_t bytes = sizeof(S) * static_cast<size_t>(3 * key + 2 * value);
    return parallel_step(a.batch * a.heads, a.threads, bytes, [&](int64_t task, char* scratch) {
        const int64_t batch = task / a.heads, head = task % a.heads;
        const int64_t from = (batch * a.groups + head / (a.heads / a.groups)) * a.keys;
        S *q = reinterpret_cast<S*>(scratch), *k = q + key, *w = k + key, *v = w + key, *o = v + value;
        read_row(q, a.q, a.dtype, from, a.keys, S(a.scale));
        read_row(k, a.k, a.dtype, from, a.keys);
        read_row(v, a.v, a.dtype, task * a.values, a.values);
        const int64_t decay = a.per_key ? task * a.keys : a.per_token ? task : head;
        const S* log = a.log_decay ? at<S>(a.log_decay, decay) : nullptr;
        for (int64_t c = 0; c < a.keys; c += lanes)
            store(w + c, log ? exp<S>(a.per_key ? read_some(log + c, a.keys - c) : splat(*log)) : splat(S(1)));
        const S* u = a.bonus ? at<S>(a.bonus, head * a.keys) : nullptr;
        S* state = static_cast<S*>(a.state) + task * a.keys * a.values;
        int64_t c = 0;
        for (; c + together * lanes <= a.values; c += together * lanes)
            step_columns<S, together>(state + c, a.values, a.keys, q, k, w, u, v + c, o + c, lanes);
        for (; c < a.values; c += lanes)
            step_columns<S, 1>(state + c, a.values, a.keys, q, k, w, u, v + c, o + c, minimum(lanes, a.values - c));
        write_row(a.o, a.dtype, task * a.values, o, a.values);
    });
}

}  // namespace
}  // namespace SSMZOO_ISA
}  // namespace ssmzoo

SSMZOO_EXPORT_SUMS(linear_attention_step, LinearAttentionStepArguments, dtype, step_as)
